"""Random brightness, contrast, saturation and hue, as published for ADE20K (spec 7)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision import tv_tensors
from torchvision.transforms import v2

_SHIFT = 32
_FACTOR = (0.5, 1.5)
_HUE = 18
"""Largest turn of the colour circle, in OpenCV's steps of 2 degrees; the published code never
draws the upper end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distortion:
    """What happens to the colours of one image; the defaults change nothing."""

    brightness: float = 0.0
    """Added to every channel of 0 to 255."""
    contrast: float = 1.0
    """Factor of every channel."""
    contrast_first: bool = True
    """Contrast before saturation and hue, not after."""
    saturation: float = 1.0
    """Factor of the HSV saturation, at most up to full saturation."""
    hue: int = 0
    """Turn of the colour circle in steps of 2 degrees."""


class PhotometricDistortion(v2.Transform):  # type: ignore[misc]  # torchvision is untyped
    """Change the colours of images (3, H, W) uint8.

    Torchvision's `RandomPhotometricDistort` is another: it scales the brightness, blends with grey
    where this multiplies, and may swap channels.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw every change."""
        return {"distortion": draw_distortion()}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Change the colours of an image as drawn; masks stay."""
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        distorted = distort(inpt.permute(1, 2, 0).numpy(), params["distortion"])
        return tv_tensors.wrap(torch.from_numpy(distorted).permute(2, 0, 1), like=inpt)


def draw_distortion() -> Distortion:
    """Draw every change with probability one half, from torch's global generator."""
    brightness, contrast, saturation, hue, contrast_first = (torch.rand(5) < 0.5).tolist()
    limits = ((-_SHIFT, _SHIFT), _FACTOR, _FACTOR)
    shift, first, second = (float(torch.empty(()).uniform_(*bounds)) for bounds in limits)
    turn = int(torch.randint(-_HUE, _HUE, ()))
    return Distortion(
        brightness=shift if brightness else 0.0,
        contrast=first if contrast else 1.0,
        contrast_first=contrast_first,
        saturation=second if saturation else 1.0,
        hue=turn if hue else 0,
    )


def distort(pixels: NDArray[np.uint8], distortion: Distortion) -> NDArray[np.uint8]:
    """Change the colours of an image (H, W, 3) RGB; each step is cut to 0 to 255."""
    image = pixels.astype(np.float32)
    if distortion.brightness:
        image = np.clip(image + np.float32(distortion.brightness), 0, 255)
    if distortion.contrast_first:
        image = _scale(image, distortion.contrast)
    if distortion.saturation != 1.0 or distortion.hue:
        image = _turn(image, distortion.saturation, distortion.hue * 2 / 60)
    if not distortion.contrast_first:
        image = _scale(image, distortion.contrast)
    return (image + np.float32(0.5)).astype(np.uint8)


def _scale(image: NDArray[np.float32], factor: float) -> NDArray[np.float32]:
    scaled: NDArray[np.float32] = np.clip(image * np.float32(factor), 0, 255)
    return scaled


def _turn(image: NDArray[np.float32], factor: float, turn: float) -> NDArray[np.float32]:
    """Scale the saturation and turn the hue by sixths of the circle; the HSV value stays."""
    red, green, blue = np.moveaxis(image, -1, 0)
    value = image.max(axis=-1)
    chroma = value - image.min(axis=-1)
    divisor = np.where(chroma > 0, chroma, 1)
    sector = np.where(
        value == red,
        (green - blue) / divisor,
        np.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    chroma = np.minimum(chroma * np.float32(factor), value)  # saturation is chroma / value
    # Each channel lies below the value by a trapezoid over the colour circle.
    k = (np.array([5, 3, 1], dtype=np.float32) + sector[..., None] + np.float32(turn)) % 6
    turned: NDArray[np.float32] = value[..., None] - chroma[..., None] * np.clip(
        np.minimum(k, 4 - k), 0, 1
    )
    return turned
