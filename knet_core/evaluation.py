"""Mask AP over all workers, pictures of a few predictions, and the model's speed."""

import time

import torch

from knet_core.config import EvalConfig
from knet_core.data import SegmentationDataset, collate, eval_loader
from knet_core.distributed import gather_on_zero, on_rank_zero, rank, world_size
from knet_core.errors import DataError
from knet_core.metrics.mask_ap import MaskAP
from knet_core.models.knet import KNet
from knet_core.visualize import contact_sheet, draw_instances

_WARM_UP = 5
"""Untimed passes before the speed is measured, as in mmdet's benchmark."""
_TIMED_IMAGES = 8
"""Images that the timed passes cycle through."""


@torch.no_grad()
def evaluate(
    model: KNet,
    dataset: SegmentationDataset,
    config: EvalConfig,
    *,
    device: torch.device,
    num_workers: int = 0,
) -> tuple[dict[str, float], bytes | None]:
    """Score a model on one split; each worker predicts a share of the images.

    Returns:
        Metrics `val/AP...` on every worker, and on the first a PNG of the first
        `config.probe_images` images, ground truth beside prediction.

    Raises:
        DataError: An image cannot be used, or the split has other classes than the model.
    """
    if model.num_classes != dataset.num_classes:
        raise DataError(
            f"data: the split to evaluate has {dataset.num_classes} categories, the model "
            f"predicts {model.num_classes}; use the data that the model was trained on"
        )
    was_training = model.training
    model.eval()
    metric = MaskAP(dataset.ground_truth(), dataset.categories)
    batches = eval_loader(
        dataset,
        batch_size=config.batch_size,
        rank=rank(),
        world_size=world_size(),
        num_workers=num_workers,
    )
    for batch in batches:
        found = model.postprocess(model(batch.images.to(device, non_blocking=True)), batch.infos)
        for info, instances in zip(batch.infos, found, strict=True):
            metric.add(info, instances)
    metric.merge(gather_on_zero(metric.state()))
    metrics = on_rank_zero(metric.compute)
    picture = None
    if rank() == 0 and config.probe_images > 0:
        picture = _picture(model, dataset, config.probe_images, device)
    model.train(was_training)
    return metrics, picture


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


def _picture(model: KNet, dataset: SegmentationDataset, count: int, device: torch.device) -> bytes:
    cells = []
    for index in range(min(count, len(dataset))):
        batch = collate([dataset.load(index, epoch=0)])
        found = model.postprocess(model(batch.images.to(device)), batch.infos)[0]
        for instances in (dataset.instances(index), found):
            image = dataset.raw_image(index)
            cells.append(draw_instances(image, instances, dataset.categories))
    return contact_sheet(cells, columns=2)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
