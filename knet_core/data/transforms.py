"""Geometry and normalisation of images and masks as torchvision transforms (spec 1.1 and 7).

What torchvision has is used as it is; what the published recipes add stands here and in
`photometric`. Every draw comes from torch's global generator, as in torchvision: `dataset` seeds
it for each sample (ADR 0008).
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from knet_core.config import DataConfig
from knet_core.data.photometric import PhotometricDistortion
from knet_core.structures import IGNORE

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
"""ImageNet's, RGB, for pixels of 0 to 255."""

_BILINEAR = v2.InterpolationMode.BILINEAR
_CROP_TRIES = 10


class Masks(tv_tensors.Mask):  # type: ignore[misc]  # torchvision is untyped
    """Masks (G, H, W) uint8, 0 or 1."""


class LabelMap(Masks):
    """The label of every pixel (1, H, W) uint8; `IGNORE` where nobody knows."""


@functional.register_kernel(functional.resize, Masks)  # type: ignore[untyped-decorator]
def _resize(masks: Masks, size: list[int], **_: Any) -> Masks:
    """Take the nearest pixel, floor(i * old / new), as OpenCV does.

    Torchvision's kernel computes this place in float32, which is one off at some sizes, and takes
    three times as long.
    """
    rows, columns = (
        np.arange(new, dtype=np.int64) * old // new
        for old, new in zip(masks.shape[1:], size, strict=True)
    )
    resized = masks.numpy().take(columns, axis=2).take(rows, axis=1)
    wrapped: Masks = tv_tensors.wrap(torch.from_numpy(resized), like=masks)
    return wrapped


class FitEdges(v2.Transform):  # type: ignore[misc]  # torchvision is untyped
    """Resize to the largest size with the image's proportions that fits a short and a long edge.

    Images are resized bilinearly between half-pixel centres, without antialiasing, as by OpenCV.

    Args:
        short_edge: Smallest and largest short edge in pixels, both drawn.
        long_edge: Largest long edge in pixels.
        scale_range: Both edges are scaled by one number drawn from it.
    """

    def __init__(
        self,
        short_edge: tuple[int, int],
        long_edge: int,
        scale_range: tuple[float, float] = (1.0, 1.0),
    ) -> None:
        super().__init__()
        self._short_edge = short_edge
        self._long_edge = long_edge
        self._scale_range = scale_range

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the size."""
        low, high = self._short_edge
        short = int(torch.randint(low, high + 1, ()))
        ratio = float(torch.empty((), dtype=torch.float64).uniform_(*self._scale_range))
        # Both edges become whole numbers before the scale follows from them, as in mmseg.
        edges = (max(int(edge * ratio), 1) for edge in (short, self._long_edge))
        height, width = functional.get_size(flat_inputs[0])
        return {"size": fitted_size((height, width), *edges)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize to the drawn size."""
        resized = functional.resize(inpt, params["size"], _BILINEAR, antialias=False)
        # Decoders interleave channels; with planes, normalising takes an eighth of the time.
        return tv_tensors.wrap(resized.contiguous(), like=inpt)


class VariedCrop(v2.Transform):  # type: ignore[misc]  # torchvision is untyped
    """Cut out a square; one that a single class fills is drawn again, up to ten times.

    Where the image is smaller than the square, all of it is kept.

    Args:
        side: Of the square, in pixels.
        max_share: One class must cover less of the crop's labelled pixels; 1 takes any crop.
    """

    def __init__(self, side: int, max_share: float) -> None:
        super().__init__()
        self._side = side
        self._max_share = max_share

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the crop's top, left, height and width."""
        size = functional.get_size(flat_inputs[0])
        labels = next((found for found in flat_inputs if isinstance(found, LabelMap)), None)
        crop = self._draw(size)
        if labels is not None and self._max_share < 1:
            for _ in range(_CROP_TRIES):
                if self._is_varied(functional.crop(labels, **crop)):
                    break
                crop = self._draw(size)
        return crop

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Cut out the drawn crop."""
        return functional.crop(inpt, **params)

    def _draw(self, size: list[int]) -> dict[str, int]:
        height, width = (min(self._side, length) for length in size)
        top, left = (int(torch.randint(max(length - self._side, 0) + 1, ())) for length in size)
        return {"top": top, "left": left, "height": height, "width": width}

    def _is_varied(self, labels: Tensor) -> bool:
        counts = np.bincount(labels.numpy().ravel(), minlength=IGNORE + 1)[:IGNORE]
        return bool(counts.max() < self._max_share * counts.sum())


class PadTo(v2.Transform):  # type: ignore[misc]  # torchvision is untyped
    """Pad to a square at the bottom and right: images and masks with 0, label maps with `IGNORE`.

    Args:
        side: Of the square, in pixels.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self._side = side

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Pad."""
        height, width = functional.get_size(inpt)
        if (height, width) == (self._side, self._side):
            return inpt
        missing = [0, 0, self._side - width, self._side - height]
        return functional.pad(inpt, missing, fill=IGNORE if isinstance(inpt, LabelMap) else 0)


def training_transforms(config: DataConfig) -> v2.Compose:
    """Return what training does to an image and its masks, in the published order."""
    steps: list[v2.Transform] = [FitEdges(config.short_edge, config.long_edge, config.scale_range)]
    if config.crop is not None:
        steps.append(VariedCrop(config.crop, config.crop_max_share))
    steps.append(v2.RandomHorizontalFlip(config.flip))
    if config.photometric:
        steps.append(PhotometricDistortion())
    steps += _normalisation()
    if config.crop is not None:
        steps.append(PadTo(config.crop))
    return v2.Compose([*steps, v2.ToPureTensor()])


def evaluation_transforms(config: DataConfig) -> v2.Compose:
    """Return what evaluation does: resize to the upper end of `data.short_edge`, and normalise."""
    largest = config.short_edge[1]
    fit = FitEdges((largest, largest), config.long_edge)
    return v2.Compose([fit, *_normalisation(), v2.ToPureTensor()])


def _normalisation() -> list[v2.Transform]:
    return [v2.ToDtype(torch.float32), v2.Normalize(MEAN, STD, inplace=True)]


def fitted_size(size: tuple[int, int], short: int, long: int) -> tuple[int, int]:
    """Return (height, width) scaled, with its proportions, to fit both edges; never below 1.

    A side becomes floor(side * scale + 0.5), as in mmcv's `rescale_size`.
    """
    scale = min(long / max(size), short / min(size))
    height, width = (max(int(side * scale + 0.5), 1) for side in size)
    return height, width


def as_image(pixels: NDArray[np.uint8]) -> tv_tensors.Image:
    """Return pixels (H, W, 3) RGB as an image (3, H, W), sharing memory."""
    return tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))
