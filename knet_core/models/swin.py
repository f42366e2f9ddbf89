"""Swin's shifted windows as its authors' code has them: pad the map, then roll it.

timm rolls first and pads then, which gives other windows, and other results, wherever a map is not
a multiple of the window (KNET_SPEC 1.2). Weights and their names are timm's.

Shapes:  B images · h, w the map · D channels, last · W windows · A places of a window
"""

from collections.abc import Sequence
from typing import cast

import torch
from timm.models.swin_transformer import (
    SwinTransformerBlock,
    SwinTransformerStage,
    window_partition,
    window_reverse,
)
from torch import Tensor, nn
from torch.nn import functional as F

Pair = tuple[int, int]

_APART = -100.0
"""Added to the attention between places that only the roll made neighbours, as published."""


class ShiftedWindowStage(nn.Module):
    """One of timm's stages, its blocks run on the padded grid.

    Args:
        stage: Built with `always_partition`, so that small maps keep their windows too.
    """

    def __init__(self, stage: SwinTransformerStage) -> None:
        super().__init__()
        self.downsample = stage.downsample
        self.blocks = stage.blocks

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps (B, h', w', D') of maps (B, h, w, D)."""
        maps = self.downsample(maps)
        blocks = cast("Sequence[SwinTransformerBlock]", self.blocks)
        shifted = next((block for block in blocks if any(block.shift_size)), None)
        mask = None if shifted is None else _shift_mask(shifted, maps)  # one for all blocks
        for block in blocks:
            maps = maps + block.drop_path1(_attend(block, block.norm1(maps), mask))
            maps = maps + block.drop_path2(block.mlp(block.norm2(maps)))
        return maps


def pad_before_roll(trunk: nn.Module) -> None:
    """Replace the stages of a Swin among a trunk's children; weights and their names stay."""
    for name, child in list(trunk.named_children()):
        if isinstance(child, SwinTransformerStage):
            setattr(trunk, name, ShiftedWindowStage(child))


def _attend(block: SwinTransformerBlock, maps: Tensor, mask: Tensor | None) -> Tensor:
    """Return the attention (B, h, w, D) within the windows of a block."""
    window, (down, right) = block.window_size, block.shift_size
    _, height, width, _ = maps.shape
    padded_height, padded_width = _padded_size(maps, window)
    if (padded_height, padded_width) != (height, width):  # padding by nothing would copy
        maps = F.pad(maps, (0, 0, 0, padded_width - width, 0, padded_height - height))
    shifts = bool(down or right)
    if shifts:
        maps = maps.roll((-down, -right), dims=(1, 2))
    windows = window_partition(maps, window).flatten(1, 2)
    windows = block.attn(windows, mask=mask if shifts else None)
    windows = windows.unflatten(1, window)
    maps = window_reverse(windows, window, padded_height, padded_width)
    if shifts:
        maps = maps.roll((down, right), dims=(1, 2))
    return maps[:, :height, :width]


def _padded_size(maps: Tensor, window: Pair) -> Pair:
    _, height, width, _ = maps.shape
    return (
        height + -height % window[0],
        width + -width % window[1],
    )


def _shift_mask(block: SwinTransformerBlock, maps: Tensor) -> Tensor:
    """Return (W, A, A): 0 between places of one region of the rolled, padded grid."""
    rows, columns = (
        _regions(size, window, shift, maps.device)
        for size, window, shift in zip(
            _padded_size(maps, block.window_size), block.window_size, block.shift_size, strict=True
        )
    )
    regions = (3 * rows[:, None] + columns)[None, :, :, None]
    regions = window_partition(regions, block.window_size).flatten(1)
    apart = regions[:, :, None] != regions[:, None, :]
    return apart.to(maps.dtype) * _APART


def _regions(size: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Number the rows of a rolled grid: 2 for those that came round, 1 their window's rest."""
    place = torch.arange(size, device=device)
    return (place >= size - window).long() + (place >= size - shift).long()
