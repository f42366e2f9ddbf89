"""Deformable convolution without modulation (Dai et al., ICCV 2017), as in "dcn-c3-c5"."""

import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d


class DeformableConv(nn.Module):
    """A 3x3 convolution that samples beside its grid, by offsets that a second one predicts.

    Offsets start at zero, where it equals the plain convolution.

    Args:
        conv: The plain convolution, without bias; its weight is taken over, not copied.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        assert conv.bias is None
        assert isinstance(conv.padding, tuple)
        assert conv.kernel_size == (3, 3)
        self.weight = conv.weight
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        self.conv_offset = nn.Conv2d(
            conv.in_channels,
            18,  # (dy, dx) of nine taps
            3,
            stride=conv.stride[0],
            padding=conv.padding[0],
            dilation=conv.dilation[0],
        )
        assert self.conv_offset.bias is not None
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Convolve (B, D, h, w); in float32 under autocast, as the operator asks for."""
        dtype = torch.promote_types(features.dtype, torch.float32)
        convolved: Tensor = deform_conv2d(
            features.to(dtype),
            self.conv_offset(features).to(dtype),
            self.weight.to(dtype),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
        )
        return convolved.to(features.dtype)


def make_deformable(trunk: nn.Module, stages: tuple[str, ...]) -> int:
    """Replace the 3x3 convolution of every bottleneck in these children; return how many."""
    bottlenecks = [
        block
        for name, child in trunk.named_children()
        if name in stages
        for block in child.modules()
        if hasattr(block, "conv3")
    ]
    for block in bottlenecks:
        assert isinstance(block.conv2, nn.Conv2d)
        block.conv2 = DeformableConv(block.conv2)
    return len(bottlenecks)
