"""Where a pixel is: sine encoding and coordinate channels (paper, Table 4b)."""

import math

import torch
from torch import Tensor

TEMPERATURE = 10000.0


def sine_encoding(height: int, width: int, channels: int, like: Tensor) -> Tensor:
    """Return (channels, height, width): first half the row, second half the column.

    Positions are 1-based and scaled to 2 pi; neighbouring channels are sine and cosine of one
    frequency (Carion et al., ECCV 2020, with normalised positions).
    """
    half = channels // 2
    index = torch.arange(half, device=like.device)
    wavelength = TEMPERATURE ** (2 * (index // 2) / half)

    def axis(size: int) -> Tensor:
        position = torch.arange(1, size + 1, device=like.device) / (size + 1e-6) * 2 * math.pi
        angle = position[:, None] / wavelength
        return torch.where(index % 2 == 0, angle.sin(), angle.cos()).T

    rows = axis(height)[:, :, None].expand(half, height, width)
    columns = axis(width)[:, None, :].expand(half, height, width)
    return torch.cat([rows, columns]).to(like.dtype)


def coordinate_channels(height: int, width: int, like: Tensor) -> Tensor:
    """Return (2, height, width): x then y, each from -1 to 1 inclusive."""
    x = torch.linspace(-1, 1, width, device=like.device, dtype=like.dtype)
    y = torch.linspace(-1, 1, height, device=like.device, dtype=like.dtype)
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)])
