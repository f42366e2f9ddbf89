"""Feature pyramid (Lin et al., CVPR 2017) as K-Net uses it: four levels, no extra ones."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class FPN(nn.Module):
    """Laterals, nearest-neighbour top-down sums, 3x3 output convolutions."""

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.outputs = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels
        )
        for conv in (*self.laterals, *self.outputs):
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Map backbone features, finest first, to as many maps of `channels` channels.

        Returns:
            The finest map, which `outputs[0]` has yet to convolve (see `PyramidKernels`), and the
            others.
        """
        merged = [
            lateral(feature) for lateral, feature in zip(self.laterals, features, strict=True)
        ]
        for level in range(len(merged) - 1, 0, -1):
            size = merged[level - 1].shape[-2:]
            merged[level - 1] = merged[level - 1] + F.interpolate(merged[level], size=size)
        finest, *coarser = merged
        convolved = [
            output(level) for output, level in zip(self.outputs[1:], coarser, strict=True)
        ]
        return finest, convolved
