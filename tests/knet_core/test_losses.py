"""Losses and their written-out gradients against the definitions, in float64."""

import math

import pytest
import torch
from torch.nn import functional as F

from knet_core.losses import (
    cross_entropy_map,
    focal_loss_sum,
    focal_map,
    mask_and_dice,
    on_the_spot,
    quarter_masks,
    upsample2,
)

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def random_masks(seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 20, generator=g, dtype=torch.float64) * 4
    return logits, torch.randint(0, 5, (3, 20), generator=g).double() / 4


def test_mask_loss_is_each_masks_mean_binary_cross_entropy():
    logits, targets = random_masks()
    values, _ = mask_and_dice(logits, targets)
    for row, (xs, ts) in enumerate(zip(logits.tolist(), targets.tolist(), strict=True)):
        total = 0.0
        for x, t in zip(xs, ts, strict=True):
            p = 1 / (1 + math.exp(-x))
            total -= t * math.log(p) + (1 - t) * math.log(1 - p)
        assert values[0, row].item() == pytest.approx(total / 20, rel=1e-10)


def test_dice_loss_uses_squared_sums():
    logits, targets = random_masks()
    values, _ = mask_and_dice(logits, targets)
    for row, (p, t) in enumerate(zip(logits.sigmoid(), targets, strict=True)):
        squares = (p**2).sum() + 1e-3 + (t**2).sum() + 1e-3
        expected = 1 - 2 * (p * t).sum() / squares
        assert values[1, row].item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("which", [0, 1])
def test_gradients_of_mask_losses_are_those_of_the_definition(which):
    logits, targets = random_masks()
    logits.requires_grad_()
    p = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
    dice = 1 - 2 * (p * targets).sum(1) / ((p**2).sum(1) + (targets**2).sum(1) + 2e-3)
    (expected,) = torch.autograd.grad([cross_entropy, dice][which].sum(), logits)
    _, gradients = mask_and_dice(logits.detach(), targets)
    torch.testing.assert_close(gradients[which], expected, **EXACT)


def focal_by_definition(logits, onehot):
    p = logits.sigmoid()
    pt = (1 - p) * onehot + p * (1 - onehot)
    weight = 0.25 * onehot + 0.75 * (1 - onehot)
    return weight * pt**2 * F.binary_cross_entropy_with_logits(logits, onehot, reduction="none")


def test_focal_loss_equals_its_elementwise_form():
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 4, generator=g, dtype=torch.float64) * 5
    labels = torch.tensor([0, 4, 2, 4, 3, 1])  # 4 is background: no positive in its row
    onehot = F.one_hot(labels, 5)[:, :4].double()
    rows = torch.tensor([0, 2, 4, 5])
    result = focal_loss_sum(logits, logits[rows, labels[rows]])
    expected = focal_by_definition(logits, onehot).sum()
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=0)


def label_map(num_classes, *, background):
    """Logits (P, C) and labels (P,) with every class, background where there is one, and -1."""
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(40, num_classes, generator=g, dtype=torch.float64) * 5
    labels = torch.randint(-1, num_classes + background, (40,), generator=g)
    assert set(labels.tolist()) == set(range(-1, num_classes + background))
    return logits.requires_grad_(), labels


def test_focal_loss_of_a_map_leaves_out_undecided_pixels_in_value_and_gradient():
    logits, labels = label_map(3, background=True)
    decided = labels >= 0
    onehot = F.one_hot(labels[decided], 4)[:, :3].double()
    expected = focal_by_definition(logits[decided], onehot).sum()
    (gradient,) = torch.autograd.grad(expected, logits)
    found = logits.detach().clone()
    value = focal_map(found, labels)
    torch.testing.assert_close(value, expected.detach(), **EXACT)
    torch.testing.assert_close(found, gradient, **EXACT)
    assert (found[~decided] == 0).all()


def test_cross_entropy_of_a_map_leaves_out_undecided_pixels_in_value_and_gradient():
    logits, labels = label_map(4, background=False)
    expected = torch.zeros((), dtype=torch.float64)
    for pixel, label in enumerate(labels.tolist()):
        if label >= 0:
            powers = logits[pixel].exp()
            expected = expected - (powers[label] / powers.sum()).log()
    (gradient,) = torch.autograd.grad(expected, logits)
    found = logits.detach().clone()
    value = cross_entropy_map(found, labels)
    torch.testing.assert_close(value, expected.detach(), **EXACT)
    torch.testing.assert_close(found, gradient, **EXACT)


@pytest.mark.parametrize("loss", [focal_map, cross_entropy_map])
def test_saturated_logits_have_finite_losses_and_gradients(loss):
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0], [200.0, -200.0]])
    value = loss(logits, torch.tensor([0, 0, -1]))
    assert torch.isfinite(value)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("pieces", [[slice(0, 5)], [slice(0, 2), slice(2, 3), slice(3, 5)]])
def test_on_the_spot_gives_the_values_and_gradients_of_automatic_differentiation(pieces):
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 3, 4, generator=g, requires_grad=True)
    targets = torch.rand(5, 48, generator=g)
    factors = torch.rand(2, 5, generator=g)
    up = upsample2(logits[None])[0].flatten(1)
    p = up.sigmoid()
    expected = torch.stack(
        [
            F.binary_cross_entropy_with_logits(up, targets, reduction="none").mean(1),
            1 - 2 * (p * targets).sum(1) / ((p**2).sum(1) + (targets**2).sum(1) + 2e-3),
        ]
    )
    values = on_the_spot(
        logits,
        lambda rows, _: upsample2(rows[None])[0].flatten(1),
        lambda seen, piece: mask_and_dice(seen, targets[pieces[piece]]),
        pieces,
        num_losses=2,
    )
    torch.testing.assert_close(values, expected.detach())
    (gradient,) = torch.autograd.grad((values * factors).sum(), logits)
    (by_definition,) = torch.autograd.grad((expected * factors).sum(), logits)
    torch.testing.assert_close(gradient, by_definition)


def test_losses_of_no_mask_are_zero_with_a_gradient():
    logits = torch.randn(5, 2, 4, requires_grad=True)
    none = logits[torch.zeros(0, dtype=torch.long)]
    values = on_the_spot(
        none, lambda rows, _: rows, lambda *_: pytest.fail("there is no piece"), [], num_losses=2
    )
    assert values.shape == (2, 0)
    values.sum().backward()
    assert torch.equal(logits.grad, torch.zeros(5, 2, 4))


@pytest.mark.parametrize("size", [(64, 96), (61, 90), (33, 64), (62, 91)])
def test_quarter_masks_equal_bilinear_interpolation_of_the_padded_mask(size):
    masks = (torch.rand(4, *size, generator=torch.Generator().manual_seed(2)) > 0.5).byte()
    padded = F.pad(masks, (0, 96 - size[1], 0, 64 - size[0])).float()[None]
    expected = F.interpolate(padded, scale_factor=0.25, mode="bilinear", align_corners=False)[0]
    assert torch.equal(quarter_masks(masks, (64, 96)), expected)
