"""The two building blocks that every part shares."""

from torch import Tensor, nn

GROUPS = 32


class ConvGroupNorm(nn.Sequential):
    """Convolution without bias, group normalisation (32 groups), ReLU; "CGR" in the comments.

    Args:
        kernel_size: Odd; padding keeps the size at stride 1.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1
    ) -> None:
        conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False
        )
        nn.init.normal_(conv.weight, std=0.01)
        super().__init__(conv, nn.GroupNorm(GROUPS, out_channels), nn.ReLU(inplace=True))


class ProjectionBranch(nn.Module):
    """Linear without bias, layer normalisation, ReLU, linear: the class and the mask branch."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, channels, bias=False)
        self.norm = nn.LayerNorm(channels)
        self.out = nn.Linear(channels, out_channels)

    def forward(self, kernels: Tensor) -> Tensor:
        """Map kernels (B, N, D) to (B, N, out_channels)."""
        projected: Tensor = self.out(self.norm(self.hidden(kernels)).relu())
        return projected
