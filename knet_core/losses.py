"""Elementary losses (Sec. 3.3), unweighted, the large ones with their gradients written out.

At the resolution of the targets one map of logits outweighs the layer that made it, and automatic
differentiation would keep several of each. So a loss is valued and differentiated piece by piece
as soon as it is met (`on_the_spot`), and only gradients of the prediction's own size remain.

Shapes:  M masks · C classes or competing kernels · P pixels or points

Losses of single masks take rows of pixels. Losses over classes take rows of classes: memory laid
out like that ("channels last") is also enlarged several times faster.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

DICE_EPS = 1e-3
FOCAL_ALPHA = 0.25
_ELEMENTS_AT_ONCE = 2**20
"""Of a map's logits, 4 MB: what a loss makes of them stays in the cache."""
MASK_STRIDE = 8
"""Of the masks that kernels predict; losses and results see them enlarged."""

Valued = tuple[Tensor, tuple[Tensor, ...]]
"""Values (K, r) of K losses for r rows, and each loss's gradient by what was given to it."""


def on_the_spot(
    logits: Tensor,
    look: Callable[[Tensor, int], Tensor],
    loss: Callable[[Tensor, int], Valued],
    pieces: Sequence[slice],
    *,
    num_losses: int = 1,
) -> Tensor:
    """Return the values (num_losses, R) of logits (R, ...), each row a problem of its own.

    Args:
        logits: What the gradient is wanted for, float32 or wider.
        look: Differentiable; from the rows of a piece, and its number, to what the loss sees.
        loss: Values, and gradients by what it sees; may overwrite what it sees.
        pieces: Rows to take at once; together they are all rows.
        num_losses: How many values `loss` returns for a row.
    """
    values: Tensor = _OnTheSpot.apply(logits, look, loss, pieces, num_losses)
    return values


class _OnTheSpot(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        look: Callable[[Tensor, int], Tensor],
        loss: Callable[[Tensor, int], Valued],
        pieces: Sequence[slice],
        num_losses: int,
    ) -> Tensor:
        values = logits.new_empty(num_losses, len(logits))
        gradients = logits.new_empty(num_losses, *logits.shape)
        for number, piece in enumerate(pieces):
            with torch.enable_grad():
                rows = logits[piece].detach().requires_grad_()
                seen = look(rows, number)
            values[:, piece], by_seen = loss(seen.detach(), number)
            for index, gradient in enumerate(by_seen):
                (gradients[index, piece],) = torch.autograd.grad(
                    seen, rows, gradient, retain_graph=index + 1 < num_losses
                )
        ctx.save_for_backward(gradients)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factors: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradients,) = ctx.saved_tensors
        factors = factors.reshape(factors.shape + (1,) * (gradients.dim() - 2))
        return (gradients * factors).sum(0), None, None, None, None


def map_losses(
    maps: Tensor, labels: Tensor, size: tuple[int, int], loss: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Return each image's loss (B,) of maps (B, C, h, w), resized to `size`.

    Args:
        maps: Logits.
        labels: (B, P), what `loss` takes.
        size: (height, width) of the labels, P pixels.
        loss: Of some pixels, such as `focal_map`: writes its gradient over the logits.
    """
    values = on_the_spot(
        maps.float(),
        lambda image, _: pixel_rows(image, size),
        lambda seen, image: _by_parts(loss, seen, labels[image]),
        [slice(image, image + 1) for image in range(len(maps))],
    )
    return values[0]


def _by_parts(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, labels: Tensor) -> Valued:
    """Value a map's loss some pixels at a time; its gradient overwrites the logits."""
    total = logits.new_zeros(1, 1)
    step = max(1, _ELEMENTS_AT_ONCE // logits.shape[1])
    for part, wanted in zip(torch.split(logits, step), torch.split(labels, step), strict=True):
        total += loss(part, wanted)
    return total, (logits,)


def upsample2(maps: Tensor) -> Tensor:
    """Resize (B, N, h, w) bilinearly to twice the size, in float32."""
    return F.interpolate(maps.float(), scale_factor=2, mode="bilinear", align_corners=False)


def pixel_rows(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps (1, C, h, w) bilinearly to `size`, and return its pixels (P, C) as rows."""
    maps = maps.contiguous(memory_format=torch.channels_last)
    maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    return maps.permute(0, 2, 3, 1).flatten(0, 2)  # views only: so is the way back


def mask_and_dice(logits: Tensor, targets: Tensor) -> Valued:
    """Value each mask's binary cross-entropy, and one minus its dice coefficient (squared sums).

    Args:
        logits: (M, P).
        targets: (M, P) in [0, 1].

    Returns:
        Values (2, M): mean over pixels of the cross-entropy, dice loss.
    """
    num_pixels = logits.shape[1]
    probability = logits.sigmoid()
    cross_entropy = F.softplus(logits).addcmul_(logits, targets, value=-1).sum(1) / num_pixels
    overlap = torch.linalg.vecdot(probability, targets)
    squares = torch.linalg.vector_norm(probability, dim=1).square()
    squares = squares + torch.linalg.vector_norm(targets, dim=1).square() + 2 * DICE_EPS
    dice = 1 - 2 * overlap / squares

    by_cross_entropy = (probability - targets).div_(num_pixels)
    by_probability = (probability * (4 * overlap / squares.square())[:, None]).addcmul_(
        targets, (-2 / squares)[:, None]
    )
    by_dice = by_probability.mul_(probability).mul_(1 - probability)
    return torch.stack([cross_entropy, dice]), (by_cross_entropy, by_dice)


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


def focal_map(logits: Tensor, labels: Tensor) -> Tensor:
    """Value the sigmoid focal loss of a map of labels, summed over classes and pixels.

    Args:
        logits: (P, C); the loss's gradient by them takes their place.
        labels: (P,) int64; C is background, a negative of every class; -1 is left out.
    """
    num_classes = logits.shape[1]
    is_positive = ((labels >= 0) & (labels < num_classes))[:, None]
    index = labels.clamp(0, num_classes - 1)[:, None]
    chosen = logits.gather(1, index)
    missing = (-chosen).sigmoid()
    by_positive = (2 * (1 - missing) * F.softplus(-chosen) + missing) * missing.square()

    weight = ((1 - FOCAL_ALPHA) * (labels >= 0))[:, None]
    surprise = F.softplus(logits)  # of a negative: -log(1 - probability)
    probability = logits.sigmoid_()
    square = probability * probability
    by_negative = (1 - probability).mul_(surprise).mul_(2).add_(probability).mul_(square)
    torch.mul(by_negative, weight, out=logits)
    total = (surprise.mul_(square).sum(1, keepdim=True) * weight).sum()

    correction = _focal_positive(chosen) - _focal_negative(chosen)
    by_chosen = torch.where(is_positive, -FOCAL_ALPHA * by_positive, logits.gather(1, index))
    logits.scatter_(1, index, by_chosen)
    return total + (correction * is_positive).sum()


def cross_entropy_map(logits: Tensor, labels: Tensor) -> Tensor:
    """Value the softmax cross-entropy of a map of labels, summed over pixels.

    Args:
        logits: (P, C); the loss's gradient by them takes their place.
        labels: (P,) int64; -1 is left out.
    """
    decided = (labels >= 0)[:, None].to(logits.dtype)
    index = labels.clamp(min=0)[:, None]
    logits.sub_(logits.amax(1, keepdim=True))
    chosen = logits.gather(1, index)
    sums = logits.exp_().sum(1, keepdim=True)
    logits.mul_(decided / sums).scatter_add_(1, index, -decided)
    return ((sums.log() - chosen) * decided).sum()


def quarter_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Pad masks (G, height, width) of 0 and 1 to `size` and resize them to a quarter.

    Equal to bilinear interpolation without corner alignment: each value is the mean of the central
    2x2 pixels of a 4x4 block, so one of 0, .25, .5, .75, 1.

    Returns:
        (G, size[0] / 4, size[1] / 4) float32.
    """
    quarters = masks.new_zeros(len(masks), size[0] // 4, size[1] // 4, dtype=torch.float32)
    for top in (1, 2):
        for left in (1, 2):
            pixels = masks[:, top::4, left::4]
            quarters[:, : pixels.shape[1], : pixels.shape[2]] += pixels
    return quarters.mul_(0.25)
