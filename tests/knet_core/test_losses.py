"""Losses against their definitions, written out in float64."""

import math

import pytest
import torch
from torch.nn import functional as F

from knet_core.losses import dice_loss, focal_loss_sum, mask_loss, quarter_masks


def random_masks(seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 20, generator=g, dtype=torch.float64) * 4
    return logits, torch.randint(0, 5, (3, 20), generator=g).double() / 4


def test_mask_loss_is_mean_binary_cross_entropy():
    logits, targets = random_masks()
    total = 0.0
    for x, t in zip(logits.flatten().tolist(), targets.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-x))
        total -= t * math.log(p) + (1 - t) * math.log(1 - p)
    assert mask_loss(logits, targets).item() == pytest.approx(total / 60, rel=1e-10)


def test_dice_loss_uses_squared_sums():
    logits, targets = random_masks()
    total = 0.0
    for row, target in zip(logits.sigmoid(), targets, strict=True):
        squares = (row**2).sum() + 1e-3 + (target**2).sum() + 1e-3
        total += 1 - 2 * (row * target).sum() / squares
    assert dice_loss(logits, targets).item() == pytest.approx((total / 3).item(), rel=1e-12)


def test_focal_loss_equals_its_elementwise_form():
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 4, generator=g, dtype=torch.float64) * 5
    labels = torch.tensor([0, 4, 2, 4, 3, 1])  # 4 is background: no positive in its row
    onehot = F.one_hot(labels, 5)[:, :4].double()
    p = logits.sigmoid()
    pt = (1 - p) * onehot + p * (1 - onehot)
    weight = 0.25 * onehot + 0.75 * (1 - onehot)
    bce = F.binary_cross_entropy_with_logits(logits, onehot, reduction="none")
    expected = (weight * pt**2 * bce).sum()
    rows = torch.tensor([0, 2, 4, 5])
    result = focal_loss_sum(logits, logits[rows, labels[rows]])
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=0)


def test_losses_of_no_mask_are_zero_with_a_gradient():
    logits = torch.randn(5, 8, requires_grad=True)
    none = logits[torch.zeros(0, dtype=torch.long)]
    loss = mask_loss(none, none.detach()) + dice_loss(none, none.detach())
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros(5, 8))


@pytest.mark.parametrize("size", [(64, 96), (61, 90), (33, 64)])
def test_quarter_masks_equal_bilinear_interpolation_of_the_padded_mask(size):
    masks = (torch.rand(4, *size, generator=torch.Generator().manual_seed(2)) > 0.5).byte()
    padded = F.pad(masks, (0, 96 - size[1], 0, 64 - size[0])).float()[None]
    expected = F.interpolate(padded, scale_factor=0.25, mode="bilinear", align_corners=False)[0]
    assert torch.equal(quarter_masks(masks, (64, 96)), expected)
