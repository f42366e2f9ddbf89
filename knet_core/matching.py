"""One-to-one assignment of kernels to objects by the Hungarian method (Sec. 3.3)."""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from knet_core.config import LossConfig
from knet_core.errors import NonFiniteError
from knet_core.losses import DICE_EPS, FOCAL_ALPHA
from knet_core.structures import Matches


def match(costs: Sequence[Tensor]) -> list[Matches]:
    """Return each image's cheapest assignment, on the CPU; min(N, G) pairs, in kernel order.

    With more objects than kernels the surplus objects stay unassigned; without objects the result
    is empty. All costs travel to the solver together, so the host waits for the device once.

    Args:
        costs: (N, G) for each image (`assignment_cost`).

    Raises:
        NonFiniteError: A cost is NaN or infinite; names the image's place in the batch.
    """
    together = torch.cat([cost.flatten() for cost in costs]).cpu()
    matches: list[Matches] = []
    for image, flat in enumerate(torch.split(together, [cost.numel() for cost in costs])):
        cost = flat.view(costs[image].shape).numpy()
        if not np.isfinite(cost).all():
            bad = int((~np.isfinite(cost)).any(axis=1).sum())
            raise NonFiniteError(
                f"image {image} of the batch: matching cost is NaN or infinite for {bad} of "
                f"{len(cost)} kernels",
                costs,
            )
        kernels, objects = linear_sum_assignment(cost)
        matches.append(
            Matches(kernels=torch.from_numpy(kernels), objects=torch.from_numpy(objects))
        )
    return matches


@torch.no_grad()
def assignment_cost(
    masks: Tensor,
    class_logits: Tensor | None,
    target_masks: Tensor,
    labels: Tensor,
    weights: LossConfig,
) -> Tensor:
    """Return costs (N, G): one matrix product, and sums over each mask.

    Args:
        masks: (N, ...) logits, at the size of the targets.
        class_logits: (N, C), or None to leave classes out of the cost (static kernels).
        target_masks: (G, ...) soft masks in [0, 1].
        labels: (G,) int64.
        weights: Weights of the mask, dice and class costs.
    """
    probability = masks.flatten(1).sigmoid()
    target = target_masks.flatten(1)
    num_pixels = probability.shape[1]
    # A last object that is everywhere gives the masks' sizes without a pass of their own.
    # Objects times masks, in this order, is fast for either layout of the masks.
    products = torch.cat([target, target.new_ones(1, num_pixels)]) @ probability.T
    overlap, sizes = products[:-1].T, products[-1]
    both_empty = num_pixels - sizes[:, None] - target.sum(1) + overlap
    mask_cost = -(overlap + both_empty) / num_pixels
    squares = _squares(probability)[:, None] + _squares(target)
    dice_cost = -2 * overlap / (squares + 2 * DICE_EPS)
    cost: Tensor = weights.mask * mask_cost + weights.dice * dice_cost
    if class_logits is not None:
        score = class_logits.sigmoid()
        positive = -FOCAL_ALPHA * (1 - score).square() * (score + 1e-12).log()
        negative = -(1 - FOCAL_ALPHA) * score.square() * (1 - score + 1e-12).log()
        cost = cost + weights.cls * (positive - negative)[:, labels]
    return cost


def _squares(maps: Tensor) -> Tensor:
    """Return the sum of squares of each row."""
    squares: Tensor = torch.linalg.vector_norm(maps, dim=1).square()
    return squares
