"""Building blocks that several parts share."""

from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = 32


def conv_group_norm(
    in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1
) -> nn.Sequential:
    """Return convolution without bias, group normalisation (32 groups), ReLU ("CGR").

    Args:
        in_channels: Of the map that the convolution reads.
        out_channels: A multiple of 32.
        kernel_size: Odd; padding keeps the size at stride 1.
        stride: Of the convolution.
    """
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
    nn.init.normal_(conv.weight, std=0.01)
    return nn.Sequential(conv, nn.GroupNorm(GROUPS, out_channels), nn.ReLU(inplace=True))


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


def merge_convolutions(first: nn.Conv2d, second: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Return weight and bias of one 5x5 convolution of stride 2 for two 3x3 ones.

    A weight of the product is the sum over all ways through the map between the two.

    Args:
        first: Stride 1, padding 1, with bias.
        second: Stride 2, padding 1, without bias.
    """
    assert first.bias is not None
    # Full correlation of the two: out[o, i, y] = sum over m, k of second[o, m, k] *
    # first[m, i, y - k], which is a convolution with the flipped kernel.
    flipped = second.weight.flip(-1, -2)
    product = F.conv2d(first.weight.transpose(0, 1), flipped, padding=2).transpose(0, 1)
    return product, second.weight.sum((2, 3)) @ first.bias


def convolve_merged(
    maps: Tensor, first: nn.Conv2d, second: nn.Conv2d, product: tuple[Tensor, Tensor]
) -> Tensor:
    """Return `second(first(maps))` by their product (`merge_convolutions`): 0.55 of the work.

    The map between the two ends at the border, where the second convolution reads zeros; the
    product would read its continuation, so the first row and column are made in two steps. With
    even sides the last row and column never reach beyond the map.

    Args:
        maps: (B, C, H, W), H and W even.
        first: As `merge_convolutions` takes it.
        second: As `merge_convolutions` takes it.
        product: What `merge_convolutions` made of them.

    Returns:
        (B, D, H / 2, W / 2).
    """
    weight, bias = product
    result = F.conv2d(maps, weight, bias, stride=2, padding=2)
    # Two rows of the map between are enough for one row of the result, and need three. Of columns
    # there is one more: at a width of 2 oneDNN is wrong (convolutions of stride 2, bf16, AMX).
    result[..., :1, :] = second(first(maps[..., :3, :])[..., :2, :])
    result[..., :1] = second(first(maps[..., :4])[..., :3])[..., :1]
    return result
