"""One-to-one assignment of kernels to objects by the Hungarian method (Sec. 3.3)."""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from knet_core.config import LossConfig
from knet_core.errors import NonFiniteError
from knet_core.losses import DICE_EPS, FOCAL_ALPHA
from knet_core.structures import Matches


@torch.no_grad()
def match(
    masks: Tensor,
    class_logits: Tensor | None,
    target_masks: Tensor,
    labels: Tensor,
    weights: LossConfig,
) -> Matches:
    """Return the cheapest assignment for one image; min(N, G) pairs, in kernel order.

    With more objects than kernels the surplus objects stay unassigned; without objects the result
    is empty.

    Args:
        masks: (N, h, w) logits, at the size of the targets.
        class_logits: (N, C), or None to leave classes out of the cost (static kernels).
        target_masks: (G, h, w) soft masks in [0, 1].
        labels: (G,) int64.
        weights: Weights of the mask, dice and class costs.

    Raises:
        NonFiniteError: A cost is NaN or infinite.
    """
    if len(labels) == 0:
        return Matches(kernels=labels, objects=labels)
    cost = assignment_cost(masks, class_logits, target_masks, labels, weights).cpu().numpy()
    if not np.isfinite(cost).all():
        bad = int((~np.isfinite(cost)).any(axis=1).sum())
        raise NonFiniteError(f"matching cost is NaN or infinite for {bad} of {len(cost)} kernels")
    kernels, objects = linear_sum_assignment(cost)
    pairs = torch.from_numpy(np.stack([kernels, objects])).to(labels.device)
    return Matches(kernels=pairs[0], objects=pairs[1])


def assignment_cost(
    masks: Tensor,
    class_logits: Tensor | None,
    target_masks: Tensor,
    labels: Tensor,
    weights: LossConfig,
) -> Tensor:
    """Return costs (N, G): one matrix product, everything else from sums over each mask."""
    probability = masks.flatten(1).sigmoid()
    target = target_masks.flatten(1)
    overlap = probability @ target.T
    num_pixels = probability.shape[1]

    both_empty = num_pixels - probability.sum(1)[:, None] - target.sum(1) + overlap
    mask_cost = -(overlap + both_empty) / num_pixels
    squares = probability.square().sum(1)[:, None] + target.square().sum(1)
    dice_cost = -2 * overlap / (squares + 2 * DICE_EPS)
    cost = weights.mask * mask_cost + weights.dice * dice_cost
    if class_logits is not None:
        score = class_logits.sigmoid()
        positive = -FOCAL_ALPHA * (1 - score).square() * (score + 1e-12).log()
        negative = -(1 - FOCAL_ALPHA) * score.square() * (1 - score + 1e-12).log()
        cost = cost + weights.cls * (positive - negative)[:, labels]
    return cost
