"""The paste of kernels into a panoptic map, against loops over kernels and pixels."""

import random

import pytest
import torch
from torch.nn import functional as F

from knet_core import panoptic_tiles
from knet_core.config import EvalConfig
from knet_core.panoptic_paste import FullContest, panoptic_maps
from knet_core.panoptic_tiles import ROUNDING, TiledContest
from knet_core.resizing import rounds_alike
from knet_core.structures import ImageSize, StageOutput

THINGS, STUFF = 3, 2


def image_size(input_size, original_size):
    return ImageSize(input_size=input_size, original_size=original_size)


def blobs(count, height, width, seed, *, cells=4, scale=12.0):
    """Smooth logits: a coarse random grid, enlarged."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.randn(1, count, cells, cells + 1, generator=generator)
    return scale * F.interpolate(grid, size=(height, width), mode="bicubic")[0] - scale / 4


def stage(*masks, seed=0, low=-2.0):
    """A stage of images with one set of masks (K, h, w) each, K - 2 of them instances."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(masks), len(masks[0]), THINGS + STUFF, generator=generator) * 2 + low
    return StageOutput(
        masks=torch.stack(masks), class_logits=logits, kernels=torch.zeros(len(masks), 1, 1)
    )


def straightforward_probabilities(masks, size):
    """Every map at full size, by the four steps of the specification."""
    height, width = masks.shape[-2:]
    p = F.interpolate(masks[None], scale_factor=2, mode="bilinear").sigmoid()
    p = F.interpolate(p, size=(8 * height, 8 * width), mode="bilinear")
    p = p[..., : size.input_size[0], : size.input_size[1]]
    return F.interpolate(p, size=size.original_size, mode="bilinear")[0]


def scores_and_labels(class_logits):
    probabilities = class_logits.sigmoid()
    pairs = []
    num_instances = len(probabilities) - STUFF
    for k, row in enumerate(probabilities):
        label = k - num_instances + THINGS if k >= num_instances else int(row[:THINGS].argmax())
        pairs.append((row[label], label))
    return [score for score, _ in pairs], [label for _, label in pairs]


def naive_map(prediction, image, size, evaluation, *, first_rank=1):
    """The rules of the docstring, pixel by pixel, each kernel's set of pixels a python set."""
    p = straightforward_probabilities(prediction.masks[image], size)
    scores, labels = scores_and_labels(prediction.class_logits[image])
    num_instances = len(scores) - STUFF
    weighed = (torch.stack(scores)[:, None, None] * p).tolist()
    inside = (p >= 0.5).tolist()
    pixels = [(y, x) for y in range(p.shape[1]) for x in range(p.shape[2])]
    masks = [{(y, x) for y, x in pixels if inside[k][y][x]} for k in range(len(scores))]

    def compete(rows, pixels, *, only_inside):
        owned = {k: set() for k in rows}
        for y, x in pixels:
            owner = max(rows, key=lambda k: (weighed[k][y][x], -k))
            if not only_inside or inside[owner][y][x]:
                owned[owner].add((y, x))
        ranked = sorted(rows, key=lambda k: (-scores[k].item(), k))
        return [
            (k, owned[k])
            for k in ranked
            if (k >= num_instances or scores[k] >= evaluation.score_threshold)
            and owned[k]
            and masks[k]
            and len(owned[k]) / len(masks[k]) >= evaluation.overlap_threshold
        ]

    if evaluation.pasting == "mixed":
        kept = compete(range(len(scores)), pixels, only_inside=False)
    else:
        kept = compete(range(num_instances), pixels, only_inside=True)
        taken = set().union(*(owned for _, owned in kept))
        left = [pixel for pixel in pixels if pixel not in taken]
        kept += compete(range(num_instances, len(scores)), left, only_inside=False)
    ids = torch.zeros(size.original_size, dtype=torch.int32)
    segments = []
    for rank, (k, owned) in enumerate(kept, start=first_rank):
        segments.append((labels[k] + 1000 * rank, labels[k], scores[k].item()))
        for y, x in owned:
            ids[y, x] = labels[k] + 1000 * rank
    return ids, segments


def assert_naive(prediction, sizes, evaluation, *, compat="none"):
    found = panoptic_maps(prediction, sizes, evaluation, num_things=THINGS, compat=compat)
    for image, (size, result) in enumerate(zip(sizes, found, strict=True)):
        first_rank = 0 if compat == "published" else 1
        ids, segments = naive_map(prediction, image, size, evaluation, first_rank=first_rank)
        assert result.ids.dtype == torch.int32
        assert torch.equal(result.ids, ids)
        assert [(s.id, s.label, s.score) for s in result.segments] == segments
    return found


@pytest.mark.parametrize("compat", ["none", "published"])
@pytest.mark.parametrize("pasting", ["mixed", "separate"])
@pytest.mark.parametrize("seed", range(4))
def test_maps_equal_loops_over_pixels(pasting, compat, seed):
    prediction = stage(
        blobs(12, 8, 12, seed), blobs(12, 8, 12, seed + 50, cells=2), seed=seed, low=-0.5
    )
    sizes = [image_size((60, 90), (120, 181)), image_size((64, 96), (64, 96))]
    evaluation = EvalConfig(pasting=pasting, overlap_threshold=0.4)
    found = assert_naive(prediction, sizes, evaluation, compat=compat)
    assert any(result.segments for result in found)


@pytest.mark.parametrize("pasting", ["mixed", "separate"])
def test_maps_of_larger_images_equal_loops_over_pixels(pasting):
    prediction = stage(blobs(14, 32, 36, 1), seed=1, low=-0.5)
    evaluation = EvalConfig(pasting=pasting, overlap_threshold=0.4)
    (result,) = assert_naive(prediction, [image_size((250, 281), (99, 111))], evaluation)
    assert len(result.segments) > 1


def test_separate_pasting_gives_a_thing_what_better_stuff_would_take():
    shared = torch.full((1, 8, 8), 2.0)
    logits = torch.full((1, 4, 5), -9.0)
    logits[0, 0, 1] = 1.0
    logits[0, 2, 3] = 3.0
    prediction = StageOutput(
        masks=torch.cat([shared, shared - 9, shared, shared - 9])[None],
        class_logits=logits,
        kernels=torch.zeros(1, 4, 1),
    )
    sizes = [image_size((64, 64), (64, 64))]
    for pasting, label in (("mixed", 3), ("separate", 1)):
        (result,) = panoptic_maps(
            prediction, sizes, EvalConfig(pasting=pasting), num_things=3, compat="none"
        )
        assert [segment.label for segment in result.segments] == [label]
        assert result.ids.unique().tolist() == [label + 1000]


def test_published_compatibility_gives_the_best_person_the_id_of_empty_pixels():
    logits = torch.full((1, 4, 5), -9.0)
    logits[0, 0, 0] = 3.0
    prediction = StageOutput(
        masks=torch.full((1, 4, 4, 4), -9.0), class_logits=logits, kernels=torch.zeros(1, 4, 1)
    )
    prediction.masks[0, 0] = 4.0
    sizes = [image_size((32, 32), (32, 32))]
    published, right = (
        panoptic_maps(prediction, sizes, EvalConfig(), num_things=3, compat=compat)[0]
        for compat in ("published", "none")
    )
    assert [segment.id for segment in published.segments] == [0]
    assert [segment.id for segment in right.segments] == [1000]
    assert (published.ids == 0).all()
    assert (right.ids == 1000).all()


def test_a_kernel_that_falls_out_leaves_a_hole():
    logits = torch.full((1, 4, 5), -9.0)
    logits[0, 0, 1] = -1.0  # score .27, under the threshold, but above every rival
    logits[0, 2, 3] = -4.0
    masks = torch.full((1, 4, 8, 8), 4.0)
    masks[0, 0, :, 4:] = -20.0
    prediction = StageOutput(masks=masks, class_logits=logits, kernels=torch.zeros(1, 4, 1))
    sizes = [image_size((64, 64), (64, 64))]
    (result,) = assert_naive(prediction, sizes, EvalConfig(overlap_threshold=0.1))
    assert [segment.label for segment in result.segments] == [3]
    assert (result.ids[:, :20] == 0).all()
    assert (result.ids[:, 44:] == 1003).all()


@pytest.mark.parametrize("pasting", ["mixed", "separate"])
def test_an_image_without_segments_is_all_empty(pasting):
    prediction = StageOutput(
        masks=torch.full((1, 5, 4, 6), -3.0),
        class_logits=torch.full((1, 5, 5), -3.0),
        kernels=torch.zeros(1, 5, 1),
    )
    sizes = [image_size((30, 40), (45, 60))]
    (result,) = assert_naive(prediction, sizes, EvalConfig(pasting=pasting))
    assert result.segments == ()
    assert not result.ids.any()


@pytest.mark.parametrize("pasting", ["mixed", "separate"])
@pytest.mark.parametrize("value", [200.0, 0.0, -200.0])
def test_equal_kernels_are_decided_for_the_first(pasting, value):
    """Saturated at 1, at the threshold of masks exactly, and underflown to 0."""
    prediction = StageOutput(
        masks=torch.full((1, 5, 4, 6), value),
        class_logits=torch.full((1, 5, 5), 1.0),
        kernels=torch.zeros(1, 5, 1),
    )
    sizes = [image_size((30, 40), (70, 90))]
    (result,) = assert_naive(prediction, sizes, EvalConfig(pasting=pasting))
    assert len(result.segments) == (value >= 0)


def test_a_class_set_without_stuff_pastes_things_alone():
    prediction = stage(blobs(6, 8, 8, 3), low=1.0)
    sizes = [image_size((64, 64), (50, 70))]
    mixed, separate = (
        panoptic_maps(prediction, sizes, EvalConfig(pasting=p), num_things=5, compat="none")[0]
        for p in ("mixed", "separate")
    )
    assert mixed.segments
    assert separate.segments


def test_a_batch_gives_what_its_images_give_alone():
    masks = [blobs(12, 32, 36, seed) for seed in range(3)]
    together = stage(*masks, low=0.0)
    sizes = [
        image_size((256, 288), (256, 288)),
        image_size((133, 288), (200, 301)),
        image_size((256, 150), (140, 91)),
    ]
    found = panoptic_maps(together, sizes, EvalConfig(), num_things=THINGS, compat="none")
    for image, size in enumerate(sizes):
        alone = StageOutput(
            masks=together.masks[image : image + 1],
            class_logits=together.class_logits[image : image + 1],
            kernels=together.kernels[image : image + 1],
        )
        (result,) = panoptic_maps(alone, [size], EvalConfig(), num_things=THINGS, compat="none")
        assert torch.equal(result.ids, found[image].ids)
        assert result.segments == found[image].segments


def contest_sizes():
    """Sizes of maps, inputs and originals: round, odd, smaller and larger than the input."""
    rng = random.Random(0)
    cases = [
        (4, 4, (32, 32), (1, 1)),  # torch rounds otherwise below some size
        (16, 20, (121, 133), (333, 350)),
        (40, 40, (320, 320), (57, 61)),
        (32, 36, (256, 288), (256, 288)),
        (32, 36, (251, 257), (251, 257)),
        (32, 36, (256, 288), (128, 144)),
        (4, 68, (32, 540), (5, 450)),
        (68, 4, (520, 32), (700, 7)),
    ]
    for _ in range(14):
        h = 4 * rng.randint(3, 12)
        w = 4 * rng.randint(max(3, 17 - h // 4), 13)
        height, width = rng.randint(8 * h - 31, 8 * h), rng.randint(8 * w - 31, 8 * w)
        shrink = rng.uniform(0.4, 2.0)
        cases.append((h, w, (height, width), (round(height * shrink), round(width * shrink))))
    return cases


@pytest.mark.parametrize(("h", "w", "input_size", "original_size"), contest_sizes())
@pytest.mark.parametrize("kind", ["smooth", "noise", "twins"])
def test_tiles_decide_as_full_maps_do(kind, h, w, input_size, original_size):
    """Owners are equal in every pixel to those of all maps at full size, areas in number."""
    size = image_size(input_size, original_size)
    generator = torch.Generator().manual_seed(h * w + original_size[0])
    if kind == "noise":
        masks = torch.randn(20, h, w, generator=generator) * 6
    else:
        masks = blobs(20, h, w, seed=h + w)
    scores = torch.rand(20, generator=generator)
    if kind == "twins":  # every kernel has an equal: no pixel is decided by a margin
        masks, scores = torch.cat([masks, masks]), torch.cat([scores, scores])
    p = straightforward_probabilities(masks, size)
    owners = (scores[:, None, None] * p).argmax(dim=0)
    rows = owners.unique().tolist()
    owned = [int((owners == row).sum()) for row in rows]
    areas = [int((p[row] >= 0.5).sum()) for row in rows]
    pairs = list(zip(owned, areas, strict=True))
    shares = [own / area for own, area in pairs if area]
    contests = [FullContest(masks, scores, size)]
    if rounds_alike(masks, size):
        contests.append(TiledContest(masks, scores, size))
    for contest in contests:
        assert torch.equal(contest.owners(), owners)
        for threshold in (0.6, *shares[:3]):  # at a share itself one pixel decides
            held = [area > 0 and own / area >= threshold for own, area in pairs]
            assert contest.hold(rows, owned, threshold) == held


def test_the_composed_resizes_equal_the_chain_within_the_allowed_rounding():
    for h, w, input_size, original_size in contest_sizes():
        size = image_size(input_size, original_size)
        masks = blobs(4, h, w, seed=h)
        if not rounds_alike(masks, size):
            continue
        contest = TiledContest(masks, torch.ones(4), size)
        members = torch.arange(len(contest.alive))
        chain = straightforward_probabilities(masks[contest.alive], size).double()
        for row in contest.rows:
            for column in contest.columns:
                values = contest._values(members, row, column)
                there = chain[:, row.pixels, column.pixels]
                assert ((values - there).abs() <= ROUNDING / 4 * there).all()


def test_where_kernels_are_clearly_apart_no_map_is_made_at_full_size(monkeypatch):
    def refuse(*_):
        raise AssertionError("the plain form was used")

    monkeypatch.setattr(panoptic_tiles, "resize_probabilities", refuse)
    masks = blobs(10, 32, 40, seed=3)
    contest = TiledContest(masks, torch.linspace(0.1, 0.9, 10), image_size((256, 320), (200, 250)))
    rows, owned = contest.owners().unique(return_counts=True)
    contest.hold(rows.tolist(), owned.tolist(), 0.6)
