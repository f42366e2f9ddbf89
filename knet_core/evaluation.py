"""Scores over all workers, pictures of a few predictions, and the model's speed."""

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from knet_core.config import EvalConfig
from knet_core.data import SegmentationDataset, collate, eval_loader
from knet_core.distributed import gather_on_zero, on_rank_zero, rank, world_size
from knet_core.errors import ConfigError, DataError, EvaluationMemoryError
from knet_core.metrics.metric import Metric, metric_factory
from knet_core.models.knet import KNet
from knet_core.prediction import predict, predict_stages
from knet_core.structures import ImageInfo, Prediction
from knet_core.visualize import contact_sheet, draw

_WARM_UP = 5
"""Untimed passes before the speed is measured, as in mmdet's benchmark."""
_TIMED_IMAGES = 8
"""Images that the timed passes cycle through."""


class MemoryLimit:
    """How many images of a worker may be predicted together; halved where memory runs out."""

    def __init__(self, images: int) -> None:
        self.images = images

    def predict(
        self,
        images: Tensor,
        infos: Sequence[ImageInfo],
        predict: Callable[[Tensor, Sequence[ImageInfo]], Sequence[Sequence[Prediction]]],
    ) -> list[list[Prediction]]:
        """Predict a batch in as few pieces as fit.

        Args:
            images: (B, 3, H, W); no piece has another padding than the batch.
            infos: One per image.
            predict: From a piece to its results: for each stage, for each image.

        Raises:
            EvaluationMemoryError: A single image does not fit.
        """
        while True:
            pieces = [
                slice(start, start + self.images) for start in range(0, len(images), self.images)
            ]
            try:
                found = [predict(images[piece], infos[piece]) for piece in pieces]
            except torch.OutOfMemoryError as error:
                largest = min(self.images, len(images))
                if largest == 1:
                    raise EvaluationMemoryError(_no_memory(infos, error)) from error
                self.images = -(-largest // 2)
            else:
                return [[p for part in stage for p in part] for stage in zip(*found, strict=True)]


def _no_memory(infos: Sequence[ImageInfo], error: Exception) -> str:
    images = ", ".join(info.file_name for info in infos)
    reason = str(error).partition(". ")[0]
    return (
        f"evaluation: no memory to predict one image at a time, of {images} ({reason}); lower "
        f"data.short_edge or data.long_edge, or set eval.window for semantic models"
    )


@torch.no_grad()
def evaluate(
    model: KNet,
    dataset: SegmentationDataset,
    config: EvalConfig,
    *,
    device: torch.device,
    num_workers: int = 0,
    per_stage: bool = False,
    scored: bool = True,
    on_prediction: Callable[[ImageInfo, Prediction], None] | None = None,
    limit: MemoryLimit | None = None,
    on_progress: Callable[[], None] | None = None,
) -> tuple[dict[str, float], bytes | None]:
    """Score a model on one split; each worker predicts a share of the images.

    Args:
        model: Of the data set's task.
        dataset: The split.
        config: How images are predicted and how many are drawn.
        device: Where the model is.
        num_workers: Loader processes.
        per_stage: Score every stage as well; it costs a post-processing each.
        scored: Compare with the ground truth; without it there need not be any.
        on_prediction: Takes the prediction of every image of this worker as it comes.
        limit: What earlier evaluations learnt about memory; unset: `config.batch_size` is tried.
        on_progress: Called after each batch.

    Returns:
        Metrics `val/<name>` on every worker, with `per_stage` also `val/stage<i>/<name>` (0 the
        static kernels), and on the first worker a PNG of the first `config.probe_images` images,
        ground truth beside prediction. A metric that is not defined, as AP without any ground
        truth, is left out.

    Raises:
        ConfigError: `per_stage` is asked together with scales, flips or a window.
        DataError: An image cannot be used, or an annotated split has other classes than the model.
        EvaluationMemoryError: The device has no memory to predict a single image.
    """
    if dataset.annotated and model.num_classes != dataset.num_classes:
        raise DataError(
            f"data: the split to evaluate has {dataset.num_classes} categories, the model "
            f"predicts {model.num_classes}; use the data that the model was trained on"
        )
    if per_stage and config.views:
        raise ConfigError(
            f"{config.views[0]}: stages are compared on images seen once and whole; leave out "
            f"{', '.join(config.views)}, or the evaluation per stage"
        )
    was_training = model.training
    model.eval()
    scores: list[Metric] = []
    if scored:
        new_metric = metric_factory(dataset)
        scores = [new_metric() for _ in range(len(model.updates) + 1 if per_stage else 1)]
    batches = eval_loader(
        dataset,
        batch_size=config.batch_size,
        rank=rank(),
        world_size=world_size(),
        num_workers=num_workers,
    )
    limit = limit or MemoryLimit(config.batch_size)

    def find(images: Tensor, infos: Sequence[ImageInfo]) -> Sequence[Sequence[Prediction]]:
        there = images.to(device, non_blocking=True)
        if per_stage:
            return predict_stages(model, there, infos)
        return [predict(model, there, infos, config)]

    for batch in batches:
        found = limit.predict(batch.images, batch.infos, find)
        for metric, predictions in zip(scores, found, strict=scored):
            for info, prediction in zip(batch.infos, predictions, strict=True):
                metric.add(info, prediction)
        if on_prediction is not None:
            for info, prediction in zip(batch.infos, found[-1], strict=True):
                on_prediction(info, prediction)
        if on_progress is not None:
            on_progress()
    results = [_gathered(metric) for metric in scores]
    metrics = dict(results[-1]) if scored else {}
    if per_stage:
        for number, result in enumerate(results):
            metrics |= {
                name.replace("val/", f"val/stage{number}/"): value
                for name, value in result.items()
            }
    picture = None
    if rank() == 0 and config.probe_images > 0:
        picture = _picture(model, dataset, config, device)
    model.train(was_training)
    return metrics, picture


def _gathered(metric: Metric) -> dict[str, float]:
    """Return the scores of all workers together, on every worker.

    A score that is no number is left out, like one that is not defined.
    """
    metric.merge(gather_on_zero(metric.state()))
    scores = on_rank_zero(metric.compute)
    return {name: value for name, value in scores.items() if math.isfinite(value)}


@torch.no_grad()
def measure_fps(
    model: KNet, dataset: SegmentationDataset, iterations: int, *, device: torch.device
) -> float:
    """Return images per second, one at a time; loading is not counted, post-processing is.

    The published protocol (mmdet's benchmark script) on this machine's device, over `iterations`
    passes through the first images of the split.
    """
    was_training = model.training
    model.eval()
    samples = [
        collate([dataset.load(index, epoch=0)]).to(device)
        for index in range(min(_TIMED_IMAGES, len(dataset)))
    ]
    start = 0.0
    for iteration in range(_WARM_UP + iterations):
        if iteration == _WARM_UP:
            _synchronize(device)
            start = time.perf_counter()
        batch = samples[iteration % len(samples)]
        model.postprocess(model(batch.images), batch.infos)
    _synchronize(device)
    seconds = time.perf_counter() - start
    model.train(was_training)
    return iterations / seconds


def _picture(
    model: KNet, dataset: SegmentationDataset, config: EvalConfig, device: torch.device
) -> bytes:
    cells = []
    for index in range(min(config.probe_images, len(dataset))):
        batch = collate([dataset.load(index, epoch=0)])
        found = predict(model, batch.images.to(device), batch.infos, config)[0]
        for prediction in (dataset.truth(index), found):
            cells.append(draw(dataset.raw_image(index), prediction, dataset.categories))
    return contact_sheet(cells, columns=2)


@torch.no_grad()
def stage_picture(
    model: KNet, dataset: SegmentationDataset, num_images: int, *, device: torch.device
) -> bytes:
    """Return a PNG of how masks come about, one image a row.

    From left to right: ground truth, the static kernels' masks, those after every update; images
    are seen once and whole.
    """
    was_training = model.training
    model.eval()
    cells = []
    for index in range(min(num_images, len(dataset))):
        batch = collate([dataset.load(index, epoch=0)]).to(device)
        stages = [found[0] for found in predict_stages(model, batch.images, batch.infos)]
        for prediction in (dataset.truth(index), *stages):
            cells.append(draw(dataset.raw_image(index), prediction, dataset.categories))
    model.train(was_training)
    return contact_sheet(cells, columns=len(model.updates) + 2)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
