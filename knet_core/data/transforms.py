"""Geometry and normalisation of images and masks (K-Net's detection recipe, spec 1.1 and 7)."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from knet_core.config import DataConfig

MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
"""ImageNet's, RGB, for pixels of 0 to 255."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """What happens to one image and its masks alike."""

    size: tuple[int, int]
    """(height, width) after resizing."""
    flip: bool
    """Mirror left and right, after resizing."""


def training_geometry(
    size: tuple[int, int], config: DataConfig, rng: np.random.Generator
) -> Geometry:
    """Draw the shorter side and the flip for an image of `size` (height, width)."""
    short = int(rng.integers(*config.short_edge, endpoint=True))
    return Geometry(
        size=fitted_size(size, short, config.long_edge), flip=bool(rng.random() < config.flip)
    )


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


def image_tensor(pixels: NDArray[np.uint8], geometry: Geometry) -> Tensor:
    """Resize bilinearly (half-pixel centres, no antialiasing, as OpenCV does) and normalise.

    Returns:
        (3, height, width) float32.
    """
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    if tuple(image.shape[1:]) != geometry.size:
        image = F.interpolate(image[None], geometry.size, mode="bilinear", align_corners=False)[0]
    if geometry.flip:
        image = image.flip(-1)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return ((image.float() - mean) / std).contiguous()


def mask_tensor(masks: NDArray[np.uint8], geometry: Geometry) -> Tensor:
    """Resize (G, H0, W0) by nearest neighbour and flip; (G, height, width) uint8, 0 or 1."""
    if masks.shape[1:] != geometry.size:
        masks = masks.take(_nearest(masks.shape[2], geometry.size[1]), axis=2)
        masks = masks.take(_nearest(masks.shape[1], geometry.size[0]), axis=1)
    resized = torch.from_numpy(masks)
    return resized.flip(-1) if geometry.flip else resized


def _nearest(old: int, new: int) -> NDArray[np.int64]:
    """Return the source position of each of `new` pixels: floor(i * old / new), as OpenCV."""
    return np.arange(new, dtype=np.int64) * old // new
