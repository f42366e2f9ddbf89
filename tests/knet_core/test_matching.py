"""Matching against enumeration of every assignment, with costs from the definitions."""

import itertools
import math

import pytest
import torch

from knet_core import LossConfig, NonFiniteError
from knet_core.matching import assignment_cost, match

WEIGHTS = LossConfig(mask=1.0, dice=4.0, cls=2.0)


def problem(num_kernels, num_objects, *, num_classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    masks = torch.randn(num_kernels, 4, 5, generator=g, dtype=torch.float64) * 3
    logits = torch.randn(num_kernels, num_classes, generator=g, dtype=torch.float64)
    targets = torch.randint(0, 5, (num_objects, 4, 5), generator=g).double() / 4
    labels = torch.randint(0, num_classes, (num_objects,), generator=g)
    return masks, logits, targets, labels


def cost_by_definition(mask, logits, target, label):
    """KNET_SPEC section 4, pixel by pixel."""
    inter = agree = p2 = t2 = 0.0
    for x, t in zip(mask.flatten().tolist(), target.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-x))
        inter += p * t
        agree += p * t + (1 - p) * (1 - t)
        p2 += p * p
        t2 += t * t
    dice = -2 * inter / (p2 + 1e-3 + t2 + 1e-3)
    q = 1 / (1 + math.exp(-logits[label].item()))
    positive = 0.25 * (1 - q) ** 2 * -math.log(q + 1e-12)
    negative = 0.75 * q**2 * -math.log(1 - q + 1e-12)
    return 2 * (positive - negative) + 4 * dice - agree / mask.numel()


def solve(masks, logits, targets, labels):
    (matches,) = match([assignment_cost(masks, logits, targets, labels, WEIGHTS)])
    return matches


def test_costs_follow_the_definition():
    masks, logits, targets, labels = problem(4, 3)
    cost = assignment_cost(masks, logits, targets, labels, WEIGHTS)
    for n in range(4):
        for g in range(3):
            expected = cost_by_definition(masks[n], logits[n], targets[g], labels[g])
            assert cost[n, g].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("num_kernels", "num_objects"), [(5, 3), (4, 4), (2, 4)])
def test_no_other_assignment_is_cheaper(num_kernels, num_objects):
    for seed in range(5):
        masks, logits, targets, labels = problem(num_kernels, num_objects, seed=seed)
        cost = assignment_cost(masks, logits, targets, labels, WEIGHTS).numpy()
        matches = solve(masks, logits, targets, labels)
        found = cost[matches.kernels.numpy(), matches.objects.numpy()].sum()
        size = min(num_kernels, num_objects)
        cheapest = min(
            sum(cost[k, o] for k, o in zip(kernels, objects, strict=True))
            for kernels in itertools.permutations(range(num_kernels), size)
            for objects in itertools.combinations(range(num_objects), size)
        )
        assert found == pytest.approx(cheapest, abs=1e-12)


def test_permuted_objects_get_the_same_kernels():
    masks, logits, targets, labels = problem(8, 5)
    order = torch.tensor([3, 0, 4, 1, 2])
    plain = solve(masks, logits, targets, labels)
    permuted = solve(masks, logits, targets[order], labels[order])
    assert torch.equal(plain.kernels, permuted.kernels)
    assert torch.equal(plain.objects, order[permuted.objects])


def test_an_image_without_objects_matches_nothing():
    matches = solve(*problem(4, 0))
    assert len(matches.kernels) == len(matches.objects) == 0


def test_surplus_objects_stay_unassigned():
    matches = solve(*problem(3, 7))
    assert len(matches.kernels) == 3
    assert len(set(matches.objects.tolist())) == 3


@pytest.mark.parametrize("where", ["masks", "logits"])
def test_a_nan_cost_is_never_hidden(where):
    masks, logits, targets, labels = problem(4, 2)
    (masks if where == "masks" else logits)[1] = torch.nan
    with pytest.raises(NonFiniteError, match="1 of 4 kernels"):
        solve(masks, logits, targets, labels)


def test_images_of_a_batch_are_matched_as_if_alone():
    problems = [problem(6, count, seed=count) for count in (3, 0, 8)]
    together = match([assignment_cost(*parts, WEIGHTS) for parts in problems])
    for found, parts in zip(together, problems, strict=True):
        alone = solve(*parts)
        assert torch.equal(found.kernels, alone.kernels)
        assert torch.equal(found.objects, alone.objects)


def test_a_nan_cost_names_its_image():
    costs = [torch.zeros(4, 0), torch.zeros(4, 2), torch.full((4, 1), torch.nan)]
    with pytest.raises(NonFiniteError, match=r"image 2 of the batch.* 4 of 4 kernels"):
        match(costs)
