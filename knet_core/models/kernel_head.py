"""Static kernels: the first partition of an image, the same kernels for every image (Sec. 3.2)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from knet_core.config import ModelConfig
from knet_core.models.fpn import FPN
from knet_core.models.layers import convolve_merged, merge_convolutions
from knet_core.models.semantic_fpn import SemanticFPN
from knet_core.structures import StageOutput, StaticOutput

# A focal loss starts stable when every class begins at probability 0.01.
PRIOR_BIAS = -math.log((1 - 0.01) / 0.01)


def hard_groups(masks: Tensor) -> Tensor:
    """Return 1 where a mask's probability exceeds one half, else 0; no gradient passes.

    The paper's Eq. 3 weighs by the soft mask; the authors' instance and panoptic models cut it.
    """
    return (masks.detach().sigmoid() > 0.5).to(masks.dtype)


def soft_groups(masks: Tensor) -> Tensor:
    """Return each mask's probability, as the paper's Eq. 3 weighs features; gradients pass."""
    return masks.sigmoid()


def hard_classes(masks: Tensor) -> Tensor:
    """Return 1 for the likeliest of competing masks (B, N, h, w), else 0; no gradient passes."""
    best = masks.detach().argmax(dim=1, keepdim=True)
    return torch.zeros_like(masks).scatter_(1, best, 1.0)


def soft_classes(masks: Tensor) -> Tensor:
    """Return the softmax over competing masks (B, N, h, w); gradients pass."""
    return masks.softmax(dim=1)


def assemble_group_features(groups: Tensor, features: Tensor) -> Tensor:
    """Sum features (B, D, h, w) under each of groups (B, N, h, w), giving (B, N, D) (Eq. 3).

    The sum is not divided by the area; the normalisations that follow absorb its scale.
    """
    return torch.bmm(groups.flatten(2), features.flatten(2).transpose(1, 2))


class StaticKernels(nn.Module):
    """Learned instance kernels, and a semantic classifier whose stuff rows are kernels too.

    Args:
        config: Width and number of kernels.
        num_classes: Things and stuff together; things come first.
        num_stuff: Classes of stuff; 0 in instance segmentation.
    """

    def __init__(self, config: ModelConfig, *, num_classes: int, num_stuff: int) -> None:
        super().__init__()
        self.num_stuff = num_stuff
        self.group = hard_groups if config.grouping == "hard" else soft_groups
        self.instance = nn.Conv2d(config.channels, config.num_kernels, 1, bias=False)
        self.semantic = nn.Conv2d(config.channels, num_classes, 1)
        nn.init.normal_(self.instance.weight, std=1.0)
        nn.init.normal_(self.semantic.weight, std=0.01)
        assert self.semantic.bias is not None
        nn.init.constant_(self.semantic.bias, PRIOR_BIAS)

    def forward(
        self, instance_features: Tensor, semantic_features: Tensor, features: Tensor
    ) -> StaticOutput:
        """Make first masks and kernels, and semantic logits.

        An instance kernel is handed on with the features that it grouped; a stuff kernel is the
        classifier's weight alone, and its mask the class's logit.

        Args:
            instance_features: (B, D, h, w), convolved by the instance kernels.
            semantic_features: (B, D, h, w), convolved by the classifier.
            features: (B, D, h, w), the map F of the updates.
        """
        masks = self.instance(instance_features)
        semantic = self.semantic(semantic_features)
        kernels = self.instance.weight.flatten(1) + assemble_group_features(
            self.group(masks), features
        )
        if self.num_stuff:
            stuff = self.semantic.weight.flatten(1)[-self.num_stuff :]
            kernels = torch.cat([kernels, stuff.expand(len(kernels), -1, -1)], dim=1)
            masks = torch.cat([masks, semantic[:, -self.num_stuff :]], dim=1)
        stage = StageOutput(masks=masks, class_logits=None, kernels=kernels)
        return StaticOutput(stage=stage, features=features, semantic=semantic)


class PyramidKernels(nn.Module):
    """From backbone features to static kernels, for instance and panoptic segmentation.

    Between the pyramid's output convolution at stride 4 and the one that halves its map, the
    network's largest, lies nothing and nobody else reads: the two are made as one.
    """

    def __init__(self, *, fpn: FPN, semantic_fpn: SemanticFPN, kernels: StaticKernels) -> None:
        super().__init__()
        self.fpn = fpn
        self.semantic_fpn = semantic_fpn
        self.kernels = kernels
        self.product: nn.ParameterList | None = None
        """Set by `freeze_product`."""

    def forward(self, features: Sequence[Tensor]) -> StaticOutput:
        """Predict from four maps at strides 4, 8, 16 and 32; all results are at stride 8."""
        finest, coarser = self.fpn(features)
        product = self._merge() if self.product is None else (self.product[0], self.product[1])
        finest = convolve_merged(finest, *self._finest_convolutions(), product)
        branches = self.semantic_fpn(finest, coarser)
        together = branches[0] if len(branches) == 1 else branches[0] + branches[1]
        static: StaticOutput = self.kernels(branches[0], branches[-1], together)
        return static

    def freeze_product(self) -> None:
        """Keep the product of the two convolutions: their weights change no more."""
        self.product = nn.ParameterList(
            nn.Parameter(tensor.detach().contiguous(), requires_grad=False)
            for tensor in self._merge()
        )

    def _merge(self) -> tuple[Tensor, Tensor]:
        return merge_convolutions(*self._finest_convolutions())

    def _finest_convolutions(self) -> tuple[nn.Conv2d, nn.Conv2d]:
        first, second = self.fpn.outputs[0], self.semantic_fpn.halving[0]
        assert isinstance(first, nn.Conv2d)
        assert isinstance(second, nn.Conv2d)
        return first, second
