"""Semantic FPN: the pyramid summed at stride 8, split into an instance and a semantic branch.

Kirillov et al., CVPR 2019, as K-Net's localisation branch changes it: the common stride is 8,
positions enter at the coarsest level, and every chain ends in a convolution.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from knet_core.models.layers import ConvGroupNorm
from knet_core.models.positional import coordinate_channels, sine_encoding


class SemanticFPN(nn.Module):
    """Turns P2..P5 into the two feature maps that the static kernels convolve."""

    def __init__(self, channels: int, *, positional_encoding: bool, coordinates: bool) -> None:
        super().__init__()
        self.positional_encoding = positional_encoding
        self.coordinates = coordinates

        def cgr(in_channels: int = channels, stride: int = 1) -> ConvGroupNorm:
            return ConvGroupNorm(in_channels, channels, 3, stride=stride)

        def up2() -> nn.Upsample:
            return nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)

        coarsest = channels + 2 if coordinates else channels
        self.levels = nn.ModuleList(
            [
                cgr(stride=2),
                cgr(),
                nn.Sequential(cgr(), up2(), cgr()),
                nn.Sequential(cgr(coarsest), up2(), cgr(), up2(), cgr()),
            ]
        )
        self.instance_branch = nn.Sequential(
            ConvGroupNorm(channels, channels, 1), ConvGroupNorm(channels, channels, 1)
        )
        self.semantic_branch = nn.Sequential(
            ConvGroupNorm(channels, channels, 1), ConvGroupNorm(channels, channels, 1)
        )

    def forward(self, pyramid: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return instance and semantic features, each (B, channels, H/8, W/8)."""
        *finer, coarsest = pyramid
        batch, channels, height, width = coarsest.shape
        if self.positional_encoding:
            coarsest = coarsest + sine_encoding(height, width, channels, coarsest)
        if self.coordinates:
            position = coordinate_channels(height, width, coarsest).expand(batch, -1, -1, -1)
            coarsest = torch.cat([coarsest, position], dim=1)
        levels = [level(p) for level, p in zip(self.levels, (*finer, coarsest), strict=True)]
        total = levels[0] + levels[1] + levels[2] + levels[3]
        return self.instance_branch(total), self.semantic_branch(total)
