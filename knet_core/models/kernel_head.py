"""Static kernels: the first partition of an image, the same kernels for every image (Sec. 3.2)."""

import math

import torch
from torch import Tensor, nn

from knet_core.structures import StageOutput

# A focal loss starts stable when every class begins at probability 0.01.
PRIOR_BIAS = -math.log((1 - 0.01) / 0.01)


def hard_groups(masks: Tensor) -> Tensor:
    """Return 1 where a mask's probability exceeds one half, else 0; no gradient passes.

    The paper's Eq. 3 weighs by the soft mask; the authors' instance and panoptic models cut it.
    """
    return (masks.detach().sigmoid() > 0.5).to(masks.dtype)


def assemble_group_features(groups: Tensor, features: Tensor) -> Tensor:
    """Sum features (B, D, h, w) under each of groups (B, N, h, w), giving (B, N, D) (Eq. 3).

    The sum is not divided by the area; the normalisations that follow absorb its scale.
    """
    return torch.bmm(groups.flatten(2), features.flatten(2).transpose(1, 2))


class StaticKernels(nn.Module):
    """Learned instance kernels and the auxiliary semantic classifier."""

    def __init__(self, channels: int, num_kernels: int, num_classes: int) -> None:
        super().__init__()
        self.instance = nn.Conv2d(channels, num_kernels, 1, bias=False)
        self.semantic = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.instance.weight, std=1.0)
        nn.init.normal_(self.semantic.weight, std=0.01)
        assert self.semantic.bias is not None
        nn.init.constant_(self.semantic.bias, PRIOR_BIAS)

    def forward(
        self, instance_features: Tensor, semantic_features: Tensor
    ) -> tuple[StageOutput, Tensor, Tensor]:
        """Return the static stage, the features F of the update heads, and the semantic logits.

        The kernels handed on are the learned ones plus the features that they grouped.
        """
        features = instance_features + semantic_features
        masks = self.instance(instance_features)
        learned = self.instance.weight.flatten(1)
        kernels = learned + assemble_group_features(hard_groups(masks), features)
        stage = StageOutput(masks=masks, class_logits=None, kernels=kernels)
        return stage, features, self.semantic(semantic_features)
