"""One round of kernel update (Sec. 3.2): group, adapt, interact, predict.

Shapes:  B images · N kernels · D channels · h, w the stride-8 map
"""

import torch
from torch import Tensor, nn

from knet_core.config import ModelConfig
from knet_core.models.kernel_head import (
    PRIOR_BIAS,
    assemble_group_features,
    hard_classes,
    hard_groups,
    soft_classes,
    soft_groups,
)
from knet_core.models.layers import ProjectionBranch
from knet_core.structures import StageOutput


class AdaptiveKernelUpdate(nn.Module):
    """Gated mix of a kernel and the features it grouped (Eq. 4-5)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.group_projection = nn.Linear(channels, 2 * channels)
        self.kernel_projection = nn.Linear(channels, 2 * channels)
        self.group_gate = nn.Sequential(
            nn.Linear(channels, channels), nn.LayerNorm(channels), nn.Sigmoid()
        )
        self.kernel_gate = nn.Sequential(
            nn.Linear(channels, channels), nn.LayerNorm(channels), nn.Sigmoid()
        )
        self.group_norm = nn.LayerNorm(channels)
        self.kernel_norm = nn.LayerNorm(channels)
        self.out = nn.Sequential(nn.Linear(channels, channels), nn.LayerNorm(channels), nn.ReLU())

    def forward(self, group_features: Tensor, kernels: Tensor) -> Tensor:
        """Return updated kernels (B, N, D) from group features and kernels of that shape.

        D may be a multiple of the module's width: each part is then updated by itself, by the same
        weights (as in the authors' semantic models).
        """
        shape = kernels.shape
        group_features, kernels = (
            vectors.reshape(*shape[:-1], -1, self.channels)
            for vectors in (group_features, kernels)
        )
        group_query, group_value = self.group_projection(group_features).chunk(2, dim=-1)
        kernel_query, kernel_value = self.kernel_projection(kernels).chunk(2, dim=-1)
        agreement = group_query * kernel_query
        mixed = self.group_gate(agreement) * self.group_norm(group_value)
        mixed = mixed + self.kernel_gate(agreement) * self.kernel_norm(kernel_value)
        updated: Tensor = self.out(mixed).reshape(shape)
        return updated


class SummedKernelUpdate(nn.Module):
    """The ablation without adaptive update: FC-LN-ReLU of the plain sum (Table 4a)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out = nn.Sequential(nn.Linear(channels, channels), nn.LayerNorm(channels), nn.ReLU())

    def forward(self, group_features: Tensor, kernels: Tensor) -> Tensor:
        """Return updated kernels (B, N, D)."""
        updated: Tensor = self.out(group_features + kernels)
        return updated


class KernelInteraction(nn.Module):
    """Self-attention among the kernels of an image, then a feed-forward layer; both post-norm."""

    def __init__(self, channels: int, num_heads: int, ffn_channels: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(channels, num_heads, batch_first=True)
        self.attention_norm = nn.LayerNorm(channels)
        self.ffn = nn.Sequential(
            nn.Linear(channels, ffn_channels), nn.ReLU(), nn.Linear(ffn_channels, channels)
        )
        self.ffn_norm = nn.LayerNorm(channels)

    def forward(self, kernels: Tensor) -> Tensor:
        """Return kernels (B, N, D) that know of each other."""
        attended, _ = self.attention(kernels, kernels, kernels, need_weights=False)
        kernels = self.attention_norm(kernels + attended)
        interacted: Tensor = self.ffn_norm(kernels + self.ffn(kernels))
        return interacted


class KernelUpdateHead(nn.Module):
    """One stage: new kernels, classes and masks from the previous stage's kernels and masks.

    Args:
        config: Width and switches.
        num_classes: Classes that a kernel is scored for; 0 where kernels are classes themselves.
    """

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        channels = config.channels
        competing = config.task == "semantic"
        groupings = {"hard": (hard_groups, hard_classes), "soft": (soft_groups, soft_classes)}
        self.group = groupings[config.grouping][competing]
        self.feature_transform = nn.Conv2d(channels, channels, 1)
        self.update = (
            AdaptiveKernelUpdate(config.update_channels or channels)
            if config.adaptive_update
            else SummedKernelUpdate(channels)
        )
        self.interaction = (
            KernelInteraction(channels, config.num_heads, config.ffn_channels)
            if config.interaction
            else nn.Identity()
        )
        self.class_branch = ProjectionBranch(channels, num_classes) if num_classes else None
        self.mask_branch = ProjectionBranch(channels, channels)
        self._initialise(xavier=not competing)

    def _initialise(self, *, xavier: bool) -> None:
        """Xavier for every matrix, zero for the attention's and the transform's biases.

        The authors' semantic models never call their own initialiser: they keep PyTorch's, with
        the transform as other convolutions of theirs.
        """
        assert self.feature_transform.bias is not None
        nn.init.zeros_(self.feature_transform.bias)
        if not xavier:
            nn.init.kaiming_normal_(
                self.feature_transform.weight, mode="fan_out", nonlinearity="relu"
            )
            return
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        if self.class_branch is not None:
            nn.init.constant_(self.class_branch.out.bias, PRIOR_BIAS)

    def forward(self, features: Tensor, previous: StageOutput) -> StageOutput:
        """Update every kernel once.

        Args:
            features: (B, D, h, w), the same map for every stage.
            previous: The stage before; its masks have the size of `features`.
        """
        # Both products with the transformed map are linear in it, so that the transform is applied
        # to their kernels' side: to N vectors instead of h * w.
        weight = self.feature_transform.weight.flatten(1)
        bias = self.feature_transform.bias
        assert bias is not None
        groups = self.group(previous.masks)
        areas = groups.flatten(2).sum(2, keepdim=True)
        group_features = assemble_group_features(groups, features) @ weight.T + areas * bias
        kernels = self.interaction(self.update(group_features, previous.kernels))
        dynamic = self.mask_branch(kernels)
        offsets = (dynamic @ bias)[..., None]
        masks = torch.baddbmm(offsets, dynamic @ weight, features.flatten(2))
        masks = masks.view(*masks.shape[:2], *features.shape[-2:])
        scores = None if self.class_branch is None else self.class_branch(kernels)
        return StageOutput(masks=masks, class_logits=scores, kernels=kernels)
