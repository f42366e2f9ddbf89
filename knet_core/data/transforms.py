"""Geometry and normalisation of images and masks (K-Net's recipes, spec 1.1 and 7)."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from knet_core.config import DataConfig
from knet_core.data.photometric import Distortion, distort
from knet_core.structures import IGNORE

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
"""ImageNet's, RGB, for pixels of 0 to 255."""

_CROP_TRIES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Crop:
    """A square cut out after resizing; where the image is smaller, it is padded."""

    top: int
    left: int
    side: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """What happens to one image and its masks alike."""

    size: tuple[int, int]
    """(height, width) after resizing."""
    flip: bool
    """Mirror left and right, after resizing and cropping, before padding."""
    crop: Crop | None = None

    @property
    def final_size(self) -> tuple[int, int]:
        """(height, width) in the end."""
        return self.size if self.crop is None else (self.crop.side, self.crop.side)


def training_geometry(
    size: tuple[int, int],
    config: DataConfig,
    rng: np.random.Generator,
    labels: NDArray[np.uint8] | None = None,
) -> Geometry:
    """Draw scale, flip and crop.

    Args:
        size: (height, width) as stored.
        config: The ranges.
        rng: Decides everything.
        labels: The stored label map (H0, W0), for the largest share of one class in a crop.
    """
    short = int(rng.integers(*config.short_edge, endpoint=True))
    flip = bool(rng.random() < config.flip)
    ratio = float(rng.uniform(*config.scale_range))
    # Both edges become whole numbers before the scale follows from them, as in mmseg.
    resized = fitted_size(size, max(int(short * ratio), 1), max(int(config.long_edge * ratio), 1))
    geometry = Geometry(size=resized, flip=flip)
    if config.crop is None:
        return geometry
    crop = _draw_crop(resized, config.crop, rng)
    if labels is not None and config.crop_max_share < 1:
        whole = mask_tensor(labels[None], replace(geometry, flip=False))[0].numpy()
        for _ in range(_CROP_TRIES):
            if _is_varied(whole, crop, config.crop_max_share):
                break
            crop = _draw_crop(resized, config.crop, rng)
    return replace(geometry, crop=crop)


def _draw_crop(size: tuple[int, int], side: int, rng: np.random.Generator) -> Crop:
    top, left = (int(rng.integers(max(length - side, 0), endpoint=True)) for length in size)
    return Crop(top=top, left=left, side=side)


def _is_varied(labels: NDArray[np.uint8], crop: Crop, share: float) -> bool:
    """Tell whether no class covers `share` of a crop's labelled pixels, or more."""
    part = labels[crop.top : crop.top + crop.side, crop.left : crop.left + crop.side]
    counts = np.bincount(part.ravel(), minlength=IGNORE + 1)[:IGNORE]
    return bool(counts.max() < share * counts.sum())


def evaluation_geometry(size: tuple[int, int], config: DataConfig) -> Geometry:
    """Resize to the upper end of `data.short_edge`; never flip."""
    return Geometry(size=fitted_size(size, config.short_edge[1], config.long_edge), flip=False)


def fitted_size(size: tuple[int, int], short: int, long: int) -> tuple[int, int]:
    """Return (height, width) scaled, with its proportions, to fit both edges; never below 1.

    A side becomes floor(side * scale + 0.5), as in mmcv's `rescale_size`.
    """
    scale = min(long / max(size), short / min(size))
    height, width = (max(int(side * scale + 0.5), 1) for side in size)
    return height, width


def image_tensor(
    pixels: NDArray[np.uint8], geometry: Geometry, distortion: Distortion | None = None
) -> Tensor:
    """Resize bilinearly (half-pixel centres, no antialiasing, as OpenCV does) and normalise.

    Returns:
        (3, height, width) float32 of `geometry.final_size`; padding is 0.
    """
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    if tuple(image.shape[1:]) != geometry.size:
        image = F.interpolate(image[None], geometry.size, mode="bilinear", align_corners=False)[0]
    if crop := geometry.crop:
        image = image[:, crop.top : crop.top + crop.side, crop.left : crop.left + crop.side]
    if geometry.flip:
        image = image.flip(-1)
    if distortion is not None:
        distorted = distort(image.permute(1, 2, 0).numpy(), distortion)
        image = torch.from_numpy(distorted).permute(2, 0, 1)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return _padded((image.float() - mean) / std, geometry, 0).contiguous()


def mask_tensor(masks: NDArray[np.uint8], geometry: Geometry, *, padding: int = 0) -> Tensor:
    """Resize (G, H0, W0) by nearest neighbour, crop and flip.

    Returns:
        (G, height, width) uint8 of `geometry.final_size`; `padding` fills what a crop lacks.
    """
    rows, columns = (
        _nearest(old, new) for old, new in zip(masks.shape[1:], geometry.size, strict=True)
    )
    if crop := geometry.crop:
        rows = rows[crop.top : crop.top + crop.side]
        columns = columns[crop.left : crop.left + crop.side]
    if geometry.flip:
        columns = columns[::-1]
    resized = masks.take(columns, axis=2).take(rows, axis=1)
    return _padded(torch.from_numpy(resized), geometry, padding)


def _padded(maps: Tensor, geometry: Geometry, value: int) -> Tensor:
    """Pad (K, height, width) at the bottom and right to the final size."""
    missing = [new - old for new, old in zip(geometry.final_size, maps.shape[1:], strict=True)]
    return F.pad(maps, (0, missing[1], 0, missing[0]), value=value) if any(missing) else maps


def _nearest(old: int, new: int) -> NDArray[np.int64]:
    """Return the source position of each of `new` pixels: floor(i * old / new), as OpenCV."""
    return np.arange(new, dtype=np.int64) * old // new
