"""Elementary losses (Sec. 3.3): pure functions of logits and targets, unweighted."""

import torch
from torch import Tensor
from torch.nn import functional as F

DICE_EPS = 1e-3
FOCAL_ALPHA = 0.25


def mask_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy, the mean over masks and pixels; 0 without masks.

    Args:
        logits: (M, P).
        targets: (M, P) in [0, 1].
    """
    total = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    return total / max(logits.numel(), 1)


def dice_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """One minus the dice coefficient with squared sums, the mean over masks; 0 without masks.

    Args:
        logits: (M, P).
        targets: (M, P) in [0, 1].
    """
    probability = logits.sigmoid()
    overlap = (probability * targets).sum(1)
    squares = probability.square().sum(1) + targets.square().sum(1)
    return (1 - 2 * overlap / (squares + 2 * DICE_EPS)).sum() / max(len(logits), 1)


def focal_loss_sum(logits: Tensor, positives: Tensor) -> Tensor:
    """Sigmoid focal loss (gamma 2, alpha 0.25), summed over all elements.

    Almost every element is a negative, so all are summed as negatives and the few positives are
    corrected: no one-hot target of the logits' size is made.

    Args:
        logits: Any shape.
        positives: (K,) the elements of `logits` whose target is 1.
    """
    correction = _focal_positive(positives) - _focal_negative(positives)
    return _focal_negative(logits).sum() + correction.sum()


def _focal_positive(logits: Tensor) -> Tensor:
    return FOCAL_ALPHA * (-logits).sigmoid().square() * F.softplus(-logits)


def _focal_negative(logits: Tensor) -> Tensor:
    return (1 - FOCAL_ALPHA) * logits.sigmoid().square() * F.softplus(logits)


def quarter_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Pad masks (G, height, width) of 0 and 1 to `size` and resize them to a quarter.

    Equal to bilinear interpolation without corner alignment: each value is the mean of the central
    2x2 pixels of a 4x4 block, so one of 0, .25, .5, .75, 1.

    Returns:
        (G, size[0] / 4, size[1] / 4) float32.
    """
    height, width = masks.shape[-2:]
    padded = F.pad(masks, (0, size[1] - width, 0, size[0] - height))
    upper, lower = padded[:, 1::4], padded[:, 2::4]
    total = upper[:, :, 1::4] + upper[:, :, 2::4] + lower[:, :, 1::4] + lower[:, :, 2::4]
    return total.to(torch.float32) * 0.25
