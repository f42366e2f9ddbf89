"""The panoptic losses against KNET_SPEC 3 and 4 as plain loops, in float64, one GPU at a time."""

import dataclasses
import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

from knet_core import LossConfig
from knet_core.criterion import kernel_criterion
from knet_core.structures import IGNORE, KNetOutput, StageOutput, Targets

WEIGHTS = LossConfig(rank=0.1)
N, THINGS, STUFF = 5, 3, 2
CLASSES = THINGS + STUFF
H, W = 32, 64


def random_output(batch, seed=0, *, num_kernels=N, size=(H, W), updates=2):
    g = torch.Generator().manual_seed(seed)
    h, w = size[0] // 8, size[1] // 8
    rows = num_kernels + STUFF

    def maps(*shape):
        return (torch.randn(*shape, generator=g) * 2).requires_grad_()

    stages = [
        StageOutput(
            masks=maps(batch, rows, h, w),
            class_logits=maps(batch, rows, CLASSES) if index else None,
            kernels=torch.zeros(batch, rows, 4),
        )
        for index in range(updates + 1)
    ]
    return KNetOutput(stages=tuple(stages), semantic=maps(batch, CLASSES, h, w), padded_size=size)


def random_target(count, stuff=(3, 4), *, size=(H - 3, W - 6), void=0.1, seed=0):
    """Objects that overlap; stuff, background (5) and void between them."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, THINGS, (count,), generator=g)
    # Squares of 4x4, so that not every central block mixes everything, with noise at the edges.
    coarse = torch.rand(count, size[0] // 4 + 1, size[1] // 4 + 1, generator=g) > 0.75
    masks = coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, : size[0], : size[1]]
    masks = (masks & (torch.rand(count, *size, generator=g) > 0.1)).byte()
    choices = torch.tensor([*stuff, CLASSES])
    picked = torch.randint(0, len(choices), (size[0] // 2 + 1, size[1] // 2 + 1), generator=g)
    semantic = choices[picked].repeat_interleave(2, 0).repeat_interleave(2, 1)
    semantic = semantic[: size[0], : size[1]].to(torch.uint8)
    for label, mask in zip(labels, masks, strict=True):
        semantic = semantic.where(mask == 0, label.to(torch.uint8))
    semantic = semantic.where(torch.rand(size, generator=g) >= void, IGNORE)
    return Targets(labels=labels, masks=masks, semantic=semantic)


BATCHES = {
    "objects and stuff": lambda: [random_target(3, seed=1), random_target(2, (4,), seed=2)],
    "more objects than kernels": lambda: [random_target(9, seed=3), random_target(1, seed=4)],
    "an image of one kind of stuff": lambda: [random_target(0, (3,), seed=5), random_target(4)],
    "things without stuff": lambda: [random_target(2, (), seed=6), random_target(0, ())],
    "nothing but void": lambda: [random_target(0, void=1.1), random_target(0, void=1.1)],
    "no padding": lambda: [random_target(3, size=(H, W)), random_target(3, size=(H, W), void=0.0)],
    "three images": lambda: [random_target(n, (3,), seed=n) for n in (1, 3, 2)],
    "five images, three of them empty": lambda: [
        random_target(2, seed=7),
        random_target(1, seed=8),
        random_target(0, (), void=1.1),
        random_target(0, (), void=1.1),
        random_target(0, (), seed=9),
    ],
}


def up2(maps):
    return F.interpolate(maps.double(), scale_factor=2, mode="bilinear", align_corners=False)


def quarter(mask, size):
    """Pad a map of 0 and 1 with 0, and resize it to a quarter."""
    padded = F.pad(mask.double(), (0, size[1] - mask.shape[1], 0, size[0] - mask.shape[0]))
    return F.interpolate(padded[None, None], scale_factor=0.25, mode="bilinear")[0, 0]


def focal(logit, positive):
    p = logit.sigmoid()
    pt = 1 - p if positive else p
    alpha = 0.25 if positive else 0.75
    return alpha * pt**2 * (F.softplus(-logit) if positive else F.softplus(logit))


def match_loops(masks, scores, soft, labels):
    """KNET_SPEC 4, for one image; pairs of kernel and object."""
    cost = torch.zeros(len(masks), len(labels), dtype=torch.float64)
    for n, mask in enumerate(masks):
        p = mask.sigmoid()
        for g, (t, label) in enumerate(zip(soft, labels.tolist(), strict=True)):
            dice = -2 * (p * t).sum() / ((p * p).sum() + 1e-3 + (t * t).sum() + 1e-3)
            same = -((p * t).sum() + ((1 - p) * (1 - t)).sum()) / p.numel()
            cost[n, g] = 4 * dice + same
            if scores is not None:
                q = scores[n, label].double().sigmoid()
                positive = 0.25 * (1 - q) ** 2 * -(q + 1e-12).log()
                negative = 0.75 * q**2 * -(1 - q + 1e-12).log()
                cost[n, g] += 2 * (positive - negative)
    if not len(labels):
        return []
    return sorted(zip(*linear_sum_assignment(cost.detach().numpy()), strict=True))


def one_gpu(output, targets, num_positive, *, compat, num_kernels, size):
    """All terms of the images of one GPU; `num_positive(stage)` is averaged over GPUs already."""
    terms = {}
    batch = range(len(targets))
    soft = [[quarter(mask, size) for mask in t.masks] for t in targets]
    stuff = [
        {
            c: quarter(t.semantic == c, size)
            for c in range(THINGS, CLASSES)
            if (t.semantic == c).any()
        }
        for t in targets
    ]

    def assign(stage):
        found = []
        for b in batch:
            scores = None if stage.class_logits is None else stage.class_logits[b]
            masks = up2(stage.masks)[b, :num_kernels]
            found.append(match_loops(masks, scores, soft[b], targets[b].labels))
        return found

    def mask_terms(stage, rows):
        masks, bce, dice = up2(stage.masks), [], []
        for b, row, t in rows:
            p = masks[b, row].sigmoid()
            bce.append(-(t * p.log() + (1 - t) * (1 - p).log()).mean())
            dice.append(1 - 2 * (p * t).sum() / ((p * p).sum() + 1e-3 + (t * t).sum() + 1e-3))
        zero = 0 * masks.sum()
        return (
            sum(bce, zero) / max(len(rows), 1),
            4 * sum(dice, zero) / max(len(rows), 1),
        )

    def rank_term(masks, rows):
        """Cross-entropy over kernels; rows are painted in increasing order of kernels."""
        logits = up2(masks)
        target = torch.full((len(targets), *logits.shape[2:]), -1)
        for b, row, t in sorted(rows, key=lambda item: item[1]):
            target[b][t > 0] = row
        if compat == "published":
            target[target == 255] = -1
        total = 0 * logits.sum()
        for b, i, j in (target >= 0).nonzero().tolist():
            column = logits[b, :, i, j]
            total = total - column[target[b, i, j]] + column.exp().sum().log()
        return 0.1 * total / target.numel()

    def class_term(stage, pairs):
        total = torch.zeros((), dtype=torch.float64)
        for b in batch:
            logits = stage.class_logits[b].double()
            label_of = {k: int(targets[b].labels[o]) for k, o in pairs[b]}
            for row in range(num_kernels):
                for c in range(THINGS):
                    total = total + focal(logits[row, c], label_of.get(row) == c)
            for c in range(THINGS, CLASSES):
                total = total + focal(logits[num_kernels + c - THINGS, c], c in stuff[b])
        return 2 * total / max(1, num_positive)

    def seg_term(pairs):
        logits = up2(output.semantic)
        painted = torch.full((len(targets), *logits.shape[2:]), CLASSES)
        if compat == "none":
            for b in batch:
                known = targets[b].semantic != IGNORE
                painted[b][quarter(known, size) < 1] = -1
        for b in batch:
            for c in sorted(stuff[b]):
                painted[b][stuff[b][c] > 0] = c
            for _, o in pairs[b]:
                painted[b][soft[b][o] > 0] = targets[b].labels[o]
        total = 0 * logits.sum()
        for b, i, j in (painted >= 0).nonzero().tolist():
            for c in range(CLASSES):
                total = total + focal(logits[b, c, i, j], painted[b, i, j] == c)
        count = int(((painted >= 0) & (painted < CLASSES)).sum())
        if count == 0 and compat == "none":
            count = int((painted >= 0).sum())
        return total / max(1, count)

    static, *updates = output.stages
    pairs = assign(static)
    things = [(b, int(k), soft[b][o]) for b in batch for k, o in pairs[b]]
    terms["seg"] = seg_term(pairs)
    terms["stage0/mask"], terms["stage0/dice"] = mask_terms(static, things)
    terms["stage0/rank"] = rank_term(static.masks[:, :num_kernels], things)
    for s, stage in enumerate(updates, start=1):
        if s > 1:
            pairs = assign(output.stages[s - 1])
        rows = [(b, int(k), soft[b][o]) for b in batch for k, o in pairs[b]]
        rows += [(b, num_kernels + c - THINGS, t) for b in batch for c, t in stuff[b].items()]
        terms[f"stage{s}/mask"], terms[f"stage{s}/dice"] = mask_terms(stage, rows)
        terms[f"stage{s}/cls"] = class_term(stage, pairs)
        terms[f"stage{s}/rank"] = rank_term(stage.masks, rows)
    return terms


def reference(output, targets, compat, *, num_kernels=N, size=(H, W)):
    group = 2 if compat == "published" else len(targets)
    starts = range(0, len(targets), group)
    positives = sum(
        min(len(t.labels), num_kernels)
        + len({c for c in t.semantic.unique().tolist() if THINGS <= c < CLASSES})
        for t in targets
    )
    per_gpu = []
    for start in starts:
        images = slice(start, start + group)
        stages = tuple(
            dataclasses.replace(
                stage,
                masks=stage.masks[images],
                class_logits=None if stage.class_logits is None else stage.class_logits[images],
            )
            for stage in output.stages
        )
        part = dataclasses.replace(output, stages=stages, semantic=output.semantic[images])
        per_gpu.append(
            one_gpu(
                part,
                targets[images],
                positives / len(starts),
                compat=compat,
                num_kernels=num_kernels,
                size=size,
            )
        )
    return {name: sum(terms[name] for terms in per_gpu) / len(per_gpu) for name in per_gpu[0]}


def leaves(output):
    yield output.semantic
    for stage in output.stages:
        yield stage.masks
        if stage.class_logits is not None:
            yield stage.class_logits


def criterion(output, targets, weights=WEIGHTS, compat="none"):
    return kernel_criterion(output, targets, weights, num_things=THINGS, compat=compat)


@pytest.mark.parametrize("compat", ["none", "published"])
@pytest.mark.parametrize("name", BATCHES)
def test_every_term_and_gradient_follows_the_published_rules(name, compat):
    targets = BATCHES[name]()
    output = random_output(len(targets))
    terms = criterion(output, targets, compat=compat)
    expected = reference(output, targets, compat)
    assert terms.named().keys() == expected.keys()
    for term, value in terms.named().items():
        torch.testing.assert_close(
            value.double(), expected[term], rtol=2e-5, atol=1e-6, msg=f"{term}: {value.item()}"
        )
    found = torch.autograd.grad(terms.total(), list(leaves(output)))
    by_definition = torch.autograd.grad(sum(expected.values()), list(leaves(output)))
    for one, other in zip(found, by_definition, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("compat", ["none", "published"])
def test_kernel_255_is_left_out_of_the_rank_loss_as_published_only(compat):
    size, num_kernels = (32, 32), 256
    output = random_output(1, num_kernels=num_kernels, size=size, updates=1)
    target = random_target(1, (3,), size=size)
    target.masks[:] = 0
    target.masks[:, :16, :16] = 1
    with torch.no_grad():  # the last kernel fits the only object, so it is matched
        output.stages[0].masks[0, 255] = F.avg_pool2d(target.masks[0:1].float(), 8)[0] * 20 - 10
    terms = criterion(output, [target], compat=compat)
    expected = reference(output, [target], compat, num_kernels=num_kernels, size=size)
    for name in ("stage0/rank", "stage1/rank"):
        torch.testing.assert_close(
            terms.named()[name].double(), expected[name], rtol=2e-5, atol=1e-6
        )
    left_out = terms.stages[0].rank.item() == 0
    assert left_out == (compat == "published")


def test_rank_weight_0_leaves_the_term_out():
    weights = dataclasses.replace(WEIGHTS, rank=0.0)
    output, targets = random_output(2), [random_target(2), random_target(1)]
    terms = criterion(output, targets, weights).named()
    assert not any("rank" in name for name in terms)
    full = criterion(output, targets).named()
    assert all(torch.equal(value, full[name]) for name, value in terms.items())


@pytest.mark.parametrize("compat", ["none", "published"])
def test_order_of_the_objects_does_not_matter(compat):
    output, targets = random_output(2), [random_target(4, seed=1), random_target(3, seed=2)]
    flipped = [
        dataclasses.replace(t, labels=t.labels.flip(0), masks=t.masks.flip(0)) for t in targets
    ]
    plain, other = (criterion(output, t, compat=compat).named() for t in (targets, flipped))
    for name, value in plain.items():
        torch.testing.assert_close(value, other[name], rtol=1e-6, atol=0)


def test_void_and_padding_teach_the_semantic_map_nothing_unless_published():
    target = random_target(0, (), size=(16, 32))
    target.semantic[:] = CLASSES
    target.semantic[:, 20:] = IGNORE
    for compat in ("none", "published"):
        output = random_output(1)
        gradient = torch.autograd.grad(
            criterion(output, [target], compat=compat).seg, output.semantic
        )[0]
        # Enlarging shares a gradient with the neighbours, at most one stride-8 pixel away.
        far = gradient[..., 4:], gradient[:, :, 3:]
        assert all(bool((part != 0).any()) == (compat == "published") for part in far)


def test_half_precision_output_gives_finite_losses_near_those_of_single():
    output, targets = random_output(2), [random_target(2), random_target(1)]
    stages = tuple(
        dataclasses.replace(
            stage,
            masks=stage.masks.bfloat16(),
            class_logits=None if stage.class_logits is None else stage.class_logits.bfloat16(),
        )
        for stage in output.stages
    )
    half = dataclasses.replace(output, stages=stages, semantic=output.semantic.bfloat16())
    total = criterion(half, targets).total()
    total.backward()
    assert math.isclose(total.item(), criterion(output, targets).total().item(), rel_tol=0.02)
    assert torch.isfinite(output.semantic.grad).all()


def all_pixels(batch, number):
    """Centres of all stride-4 pixels, row by row."""
    ys, xs = torch.meshgrid(
        (torch.arange(H // 4) + 0.5) / (H // 4),
        (torch.arange(W // 4) + 0.5) / (W // 4),
        indexing="ij",
    )
    assert number == xs.numel()
    return torch.stack([xs, ys], dim=-1).reshape(1, -1, 2).expand(batch, -1, -1)


def test_points_at_all_pixels_give_the_full_losses(monkeypatch):
    monkeypatch.setattr("knet_core.criterion.draw_points", all_pixels)
    weights = dataclasses.replace(WEIGHTS, points=H * W // 16)
    output, targets = random_output(2), [random_target(3), random_target(0, (4,))]
    full, sampled = criterion(output, targets), criterion(output, targets, weights)
    for name, value in sampled.named().items():
        torch.testing.assert_close(value, full.named()[name], rtol=1e-5, atol=1e-6, msg=name)
    for one, other in zip(
        *(torch.autograd.grad(t.total(), list(leaves(output))) for t in (full, sampled)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_points_are_drawn_once_from_the_global_generator():
    weights = dataclasses.replace(WEIGHTS, points=40)
    output, targets = random_output(2), [random_target(3), random_target(2)]
    full = criterion(output, targets).named()
    torch.manual_seed(3)
    first, second = (criterion(output, targets, weights).named() for _ in range(2))
    after = torch.rand(1)
    torch.manual_seed(3)
    again = criterion(output, targets, weights).named()
    torch.rand(2, 40, 2)
    assert torch.equal(torch.rand(1), after)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert first["stage2/mask"] != second["stage2/mask"] != full["stage2/mask"]


def test_points_leave_whole_maps_to_the_semantic_and_rank_losses():
    weights = dataclasses.replace(WEIGHTS, points=40)
    targets = [random_target(1), random_target(0)]
    # One kernel can only be matched one way, so the sampled costs do not change the painting.
    output = random_output(2, num_kernels=1)
    full, sampled = (criterion(output, targets, w).named() for w in (WEIGHTS, weights))
    for name in full:
        if "rank" in name or name == "seg":
            assert torch.equal(full[name], sampled[name]), name
