"""The one way from normalised images to results, for evaluation and for single pictures.

Semantic models may see an image at several scales, mirrored, and through a sliding window.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from knet_core.config import EvalConfig
from knet_core.errors import ConfigError, DataError, NonFiniteError
from knet_core.models.knet import KNet
from knet_core.resizing import chunks, resize, to_original
from knet_core.structures import ImageInfo, ImageSize, KNetOutput, Prediction, SemanticMap

LEAST_SIDE = 32
"""Pixels; the coarsest map of a network has one position for as many."""
_STRIDE = 32
_SLAB = 64
"""Rows of pixels that a softmax takes at a time."""


@torch.no_grad()
def predict(
    model: KNet,
    images: Tensor,
    sizes: Sequence[ImageSize],
    evaluation: EvalConfig,
    *,
    stage: int = -1,
) -> Sequence[Prediction]:
    """Return what a model finds in each image.

    Args:
        model: In evaluation mode.
        images: (B, 3, H, W) normalised, on the model's device, padded at the bottom and right to
            multiples of 32.
        sizes: One per image.
        evaluation: Its scales, flip and window; thresholds are the model's own.
        stage: 0 the static kernels, s the s-th update, -1 the last stage.

    Raises:
        ConfigError: Scales, flips or a window are asked of a model that is not semantic.
        DataError: An image has a side under 32 pixels.
        NonFiniteError: An image holds NaN or infinity.
    """
    _check_images(images, sizes)
    if not evaluation.views:
        return model.postprocess(model(images), sizes, stage=stage)
    if not model.task.takes_views:
        raise ConfigError(
            f"{evaluation.views[0]}: only semantic models are averaged over scales, flips and "
            f"windows; leave out {', '.join(evaluation.views)}"
        )
    return [
        _semantic_map(
            model, image[:, : size.input_size[0], : size.input_size[1]], size, evaluation, stage
        )
        for image, size in zip(images, sizes, strict=True)
    ]


@torch.no_grad()
def predict_stages(
    model: KNet, images: Tensor, sizes: Sequence[ImageSize]
) -> list[Sequence[Prediction]]:
    """Return each stage's results, static kernels first, of one pass through the network.

    Arguments and errors are those of `predict`; images are seen once and whole.
    """
    _check_images(images, sizes)
    output = model(images)
    return [model.postprocess(output, sizes, stage=stage) for stage in range(len(output.stages))]


def _check_images(images: Tensor, sizes: Sequence[ImageSize]) -> None:
    for place, size in enumerate(sizes):
        height, width = size.input_size
        if min(height, width) < LEAST_SIDE:
            raise DataError(
                f"{_name(place, size)}: enters the network with {height} x {width} pixels "
                f"(height x width), expected at least {LEAST_SIDE} each; enlarge it "
                f"(data.short_edge, data.long_edge) or leave it out"
            )
    if images.float().sum().isfinite():  # one pass; a NaN or an infinity would survive the sum
        return
    wrong = (~images.isfinite()).nonzero()
    if len(wrong):
        place, channel, y, x = wrong[0].tolist()
        raise NonFiniteError(
            f"{_name(place, sizes[place])}: value {float(images[place, channel, y, x])} in "
            f"channel {channel} at row {y}, column {x}, and {len(wrong) - 1} more like it; "
            f"expected finite numbers, check the image's file and its normalisation"
        )


def _name(place: int, size: ImageSize) -> str:
    file_name = f" ({size.file_name})" if isinstance(size, ImageInfo) else ""
    return f"image {place} of the batch{file_name}"


def _semantic_map(
    model: KNet, image: Tensor, size: ImageSize, evaluation: EvalConfig, stage: int
) -> SemanticMap:
    """Average one image's probabilities at its original size over all views (spec 6.6).

    Args:
        model: A semantic model.
        image: (3, height, width) without padding.
        size: Of the image.
        evaluation: Its scales, flip and window.
        stage: As in `predict`.
    """
    total: Tensor | None = None
    views = [
        (scale, flip)
        for scale in evaluation.scales
        for flip in ((False, True) if evaluation.flip else (False,))
    ]
    for scale, flip in views:
        view = resize(image[None], _scaled(size.input_size, scale))[0]
        logits = _logits(
            model, view.flip(-1) if flip else view, size.original_size, evaluation, stage
        )
        logits = logits.flip(-1) if flip else logits
        if len(views) > 1:
            _softmax_(logits)
        total = logits if total is None else total.add_(logits)
    assert total is not None
    return SemanticMap(labels=total.argmax(dim=0).to(torch.uint8))


def _scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Return (height, width) scaled and rounded, as `data.transforms.fitted_size`."""
    height, width = (max(int(side * scale + 0.5), 1) for side in size)
    return height, width


def _softmax_(logits: Tensor) -> None:
    """Turn logits (C, H0, W0) into probabilities in place."""
    for start in range(0, logits.shape[1], _SLAB):
        slab = logits[:, start : start + _SLAB]
        slab.copy_(slab.softmax(dim=0))


def _logits(
    model: KNet,
    view: Tensor,
    original_size: tuple[int, int],
    evaluation: EvalConfig,
    stage: int,
) -> Tensor:
    """Return logits (C, H0, W0) of one view (3, height, width), whole or through a window."""
    if evaluation.window is None:
        return _whole_logits(model, view, original_size, stage)
    stride = evaluation.window_stride or evaluation.window * 2 // 3
    logits = _window_logits(model, view, evaluation.window, stride, stage)
    return _resize_logits(logits, original_size)


def _whole_logits(model: KNet, view: Tensor, original_size: tuple[int, int], stage: int) -> Tensor:
    height, width = view.shape[-2:]
    size = ImageSize(input_size=(height, width), original_size=original_size)
    padded = F.pad(view, (0, -width % _STRIDE, 0, -height % _STRIDE))
    output: KNetOutput = model(padded[None])
    masks: Tensor = output.stages[stage].masks[0].float().contiguous()
    logits = masks.new_empty((len(masks), *original_size))
    for part in chunks(len(masks)):
        logits[part] = to_original(masks[None, part], output.padded_size, size)[0]
    return logits


def _resize_logits(logits: Tensor, size: tuple[int, int]) -> Tensor:
    result = logits.new_empty((len(logits), *size))
    for part in chunks(len(logits)):
        result[part] = resize(logits[None, part], size)[0]
    return result


def _window_logits(model: KNet, view: Tensor, window: int, stride: int, stage: int) -> Tensor:
    """Return logits (C, height, width) of a view, averaged over the windows that cover a pixel."""
    height, width = view.shape[-2:]
    total: Tensor | None = None
    cover = view.new_zeros((height, width))
    for rows in _windows(height, window, stride):
        for columns in _windows(width, window, stride):
            crop = view[:, rows, columns]
            logits = _whole_logits(model, crop, (crop.shape[1], crop.shape[2]), stage)
            if total is None:
                total = logits.new_zeros((len(logits), height, width))
            total[:, rows, columns] += logits
            cover[rows, columns] += 1
    assert total is not None
    mean: Tensor = total.div_(cover)
    return mean


def _windows(length: int, window: int, stride: int) -> Iterator[slice]:
    """Return windows along one axis; the last is shifted inwards, all are cut to the image."""
    for number in range(max(length - window + stride - 1, 0) // stride + 1):
        start = min(number * stride, max(length - window, 0))
        yield slice(start, min(start + window, length))
