"""The losses of the instance task against a plain rendering of the published rules."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

from knet_core import LossConfig, NonFiniteError
from knet_core.criterion import kernel_criterion
from knet_core.matching import assignment_cost
from knet_core.structures import IGNORE, KNetOutput, StageOutput, Targets

WEIGHTS = LossConfig()
B, N, C, H, W = 2, 6, 3, 64, 96


def criterion(output, targets, weights=WEIGHTS, compat="none"):
    return kernel_criterion(output, targets, weights, num_things=C, compat=compat)


def random_output(seed=0, *, updates=2, requires_grad=False):
    g = torch.Generator().manual_seed(seed)

    def maps(*shape):
        return (torch.randn(*shape, generator=g) * 2).requires_grad_(requires_grad)

    stages = [
        StageOutput(masks=maps(B, N, H // 8, W // 8), class_logits=None, kernels=maps(B, N, 4))
    ]
    stages += [
        StageOutput(
            masks=maps(B, N, H // 8, W // 8), class_logits=maps(B, N, C), kernels=maps(B, N, 4)
        )
        for _ in range(updates)
    ]
    return KNetOutput(
        stages=tuple(stages), semantic=maps(B, C, H // 8, W // 8), padded_size=(H, W)
    )


def random_targets(counts=(3, 2), seed=0):
    """Images smaller than the batch; the first marks a crowd, the other has no semantic map."""
    g = torch.Generator().manual_seed(seed)
    crowd = torch.full((H - 4, W - 6), C, dtype=torch.uint8)
    crowd[11:30, 20:43] = IGNORE
    return [
        Targets(
            labels=torch.randint(0, C, (count,), generator=g),
            masks=(torch.rand(count, H - 4, W - 6, generator=g) > 0.7).byte(),
            semantic=semantic,
        )
        for count, semantic in zip(counts, (crowd, None), strict=True)
    ]


def reference(output, targets, compat):
    """KNET_SPEC 3.3 and 3.4 for the instance task, without any of the rewrites.

    Published: padding and crowds are negatives of the semantic map. Otherwise they are left out,
    where any of the four pixels that a pixel at stride 4 stands for is one.
    """

    def up(x):
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)

    soft = []
    for t in targets:
        height, width = t.masks.shape[-2:]
        padded = F.pad(t.masks.float(), (0, W - width, 0, H - height))[:, None]
        soft.append(F.interpolate(padded, size=(H // 4, W // 4), mode="bilinear")[:, 0])

    def assign(stage):
        pairs = []
        for b, t in enumerate(targets):
            cls = None if stage.class_logits is None else stage.class_logits[b]
            cost = assignment_cost(up(stage.masks)[b], cls, soft[b], t.labels, WEIGHTS)
            pairs.append(linear_sum_assignment(cost.detach().numpy()))
        return pairs

    def stage_terms(stage, pairs):
        bce = dice = 0.0
        rows = 0
        cls_target = torch.zeros(B, N, C)
        for b, (kernels, objects) in enumerate(pairs):
            for k, o in zip(kernels, objects, strict=True):
                x, t = up(stage.masks)[b, k], soft[b][o]
                bce = bce + F.binary_cross_entropy_with_logits(x, t)
                p = x.sigmoid()
                dice = dice + 1 - 2 * (p * t).sum() / ((p**2).sum() + (t**2).sum() + 2e-3)
                cls_target[b, k, targets[b].labels[o]] = 1
                rows += 1
        cls = None
        if stage.class_logits is not None:
            cls = 2 * focal(stage.class_logits, cls_target) / max(1, rows)
        return bce / rows, 4 * dice / rows, cls

    def focal(x, y):
        p = x.sigmoid()
        pt = (1 - p) * y + p * (1 - y)
        bce = F.binary_cross_entropy_with_logits(x, y, reduction="none")
        return ((0.25 * y + 0.75 * (1 - y)) * pt**2 * bce).sum()

    static_pairs = assign(output.stages[0])
    expected = {}
    for s, stage in enumerate(output.stages):
        pairs = static_pairs if s <= 1 else assign(output.stages[s - 1])
        bce, dice, cls = stage_terms(stage, pairs)
        expected |= {f"stage{s}/mask": bce, f"stage{s}/dice": dice}
        if cls is not None:
            expected[f"stage{s}/cls"] = cls

    painted = torch.full((B, H // 4, W // 4), C)
    if compat == "none":
        for b, t in enumerate(targets):
            known = torch.zeros(H, W)
            known[: t.masks.shape[1], : t.masks.shape[2]] = 1
            if t.semantic is not None:
                known[: t.masks.shape[1], : t.masks.shape[2]][t.semantic == IGNORE] = 0
            quarter = F.interpolate(known[None, None], scale_factor=0.25, mode="bilinear")[0, 0]
            painted[b][quarter < 1] = IGNORE
    for b, (kernels, objects) in enumerate(static_pairs):
        for _, o in sorted(zip(kernels, objects, strict=True)):
            painted[b][soft[b][o] > 0] = targets[b].labels[o]
    decided = painted != IGNORE
    onehot = F.one_hot(painted[decided], C + 1)[:, :C].float()
    logits = up(output.semantic).permute(0, 2, 3, 1)[decided]
    expected["seg"] = focal(logits, onehot) / (painted < C).sum()
    return expected


@pytest.mark.parametrize("compat", ["none", "published"])
@pytest.mark.parametrize("counts", [(3, 2), (5, 0), (9, 1)])
def test_every_term_follows_the_published_rules(counts, compat):
    for seed in range(3):
        output, targets = random_output(seed), random_targets(counts, seed)
        terms = criterion(output, targets, compat=compat).named()
        expected = reference(output, targets, compat)
        assert terms.keys() == expected.keys()
        for name, value in terms.items():
            torch.testing.assert_close(value, expected[name], rtol=2e-5, atol=1e-6, msg=name)


def test_a_batch_without_objects_has_finite_losses_and_gradients():
    output = random_output(requires_grad=True)
    terms = criterion(output, random_targets((0, 0)))
    terms.total().backward()
    assert terms.stages[1].mask.item() == 0
    assert 0 < terms.seg.item() < 10
    for stage in output.stages:
        assert torch.isfinite(stage.masks.grad).all()


def test_a_batch_without_objects_drowns_all_else_as_published_only():
    output, targets = random_output(), random_targets((0, 0))
    plain, published = (criterion(output, targets, compat=c).seg for c in ("none", "published"))
    assert published.item() > 100 * plain.item()


def test_order_of_the_objects_does_not_matter():
    output, targets = random_output(), random_targets()
    flipped = [Targets(labels=t.labels.flip(0), masks=t.masks.flip(0)) for t in targets]
    plain, other = (criterion(output, t).total() for t in (targets, flipped))
    torch.testing.assert_close(plain, other)


def test_a_cost_that_is_not_finite_names_the_image():
    output = random_output()
    output.stages[0].masks[1, 2, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="image 1 of the batch"):
        criterion(output, random_targets())
