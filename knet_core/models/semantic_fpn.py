"""Semantic FPN: the pyramid summed at stride 8, split into an instance and a semantic branch.

Kirillov et al., CVPR 2019, as K-Net's localisation branch changes it: the common stride is 8,
positions enter at the coarsest level, and every chain ends in a convolution.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from knet_core.models.layers import conv_group_norm
from knet_core.models.positional import coordinate_channels, sine_encoding


class SemanticFPN(nn.Module):
    """Turns P2..P5 into the feature maps that static kernels convolve and updates group.

    Args:
        channels: Width of all maps.
        positional_encoding: Add sine positions to P5.
        coordinates: Append x and y to P5.
        branches: 2 gives instances and semantics features of their own; 1 shares one map.
    """

    def __init__(
        self, channels: int, *, positional_encoding: bool, coordinates: bool, branches: int = 2
    ) -> None:
        super().__init__()
        self.positional_encoding = positional_encoding
        self.coordinates = coordinates

        def cgr(in_channels: int = channels, stride: int = 1) -> nn.Sequential:
            return conv_group_norm(in_channels, channels, 3, stride=stride)

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
        self.branches = nn.ModuleList(
            nn.Sequential(
                conv_group_norm(channels, channels, 1), conv_group_norm(channels, channels, 1)
            )
            for _ in range(branches)
        )

    @property
    def halving(self) -> nn.Sequential:
        """The level of P2: a convolution of stride 2, normalisation, activation."""
        level = self.levels[0]
        assert isinstance(level, nn.Sequential)
        return level

    def forward(self, finest: Tensor, coarser: Sequence[Tensor]) -> list[Tensor]:
        """Return each branch's features (B, channels, H/8, W/8); instances' first.

        Args:
            finest: P2 after its level's convolution, which halves it; see `PyramidKernels`.
            coarser: P3, P4 and P5.
        """
        *finer, coarsest = coarser
        batch, channels, height, width = coarsest.shape
        if self.positional_encoding:
            coarsest = coarsest + sine_encoding(height, width, channels, coarsest)
        if self.coordinates:
            position = coordinate_channels(height, width, coarsest).expand(batch, -1, -1, -1)
            coarsest = torch.cat([coarsest, position], dim=1)
        norm, activation = self.halving[1], self.halving[2]
        total = activation(norm(finest))
        for level, p in zip(self.levels[1:], (*finer, coarsest), strict=True):
            total = total + level(p)
        return [branch(total) for branch in self.branches]
