"""Ground truth at stride 4 against loops over pixels."""

import torch

from knet_core.structures import IGNORE, Targets
from knet_core.truth import batch_truth, read

THINGS, CLASSES = 2, 5
SIZE = (16, 32)


def truth_of(*semantic, points=None):
    targets = [
        Targets(
            labels=torch.zeros(1, dtype=torch.int64),
            masks=torch.ones(1, *labels.shape, dtype=torch.uint8),
            semantic=labels,
        )
        for labels in semantic
    ]
    return batch_truth(targets, SIZE, num_things=THINGS, num_classes=CLASSES, points=points)


def random_map(height, width, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES + 1, (height, width), generator=g, dtype=torch.uint8)
    return labels.where(torch.rand(height, width, generator=g) > 0.1, IGNORE)


def test_stuff_masks_maps_and_undecided_pixels_follow_the_central_four():
    maps = [random_map(13, 30, 1), random_map(16, 32, 2)]
    truth = truth_of(*maps)
    regions = iter(truth.masks[2:].view(-1, 4, 8))
    for image, labels in enumerate(maps):
        padded = torch.full(SIZE, IGNORE)
        padded[: labels.shape[0], : labels.shape[1]] = labels
        central = {
            (i, j): padded[4 * i + 1 : 4 * i + 3, 4 * j + 1 : 4 * j + 3].flatten().tolist()
            for i in range(4)
            for j in range(8)
        }
        present = [c for c in range(THINGS, CLASSES) if (labels == c).any()]
        assert truth.stuff[image] == tuple(present)
        for label in present:
            mask = next(regions)
            for (i, j), four in central.items():
                assert mask[i, j].item() == four.count(label) / 4
        for (i, j), four in central.items():
            stuff = [label for label in four if THINGS <= label < CLASSES]
            assert truth.stuff_map[image, 8 * i + j].item() == max(stuff, default=-1)
            assert truth.undecided[image, 8 * i + j].item() == (IGNORE in four)
    assert next(regions, None) is None


def test_stuff_too_thin_for_stride_4_is_still_there():
    labels = torch.zeros(16, 32, dtype=torch.uint8)
    labels[4] = THINGS  # the first row of a block, never among its central pixels
    truth = truth_of(labels)
    assert truth.stuff == ((THINGS,),)
    assert truth.labels.tolist() == [0, THINGS]
    assert (truth.masks[1] == 0).all()


def test_without_a_map_only_padding_is_undecided():
    target = Targets(
        labels=torch.zeros(0, dtype=torch.int64), masks=torch.zeros(0, 12, 22, dtype=torch.uint8)
    )
    truth = batch_truth([target], SIZE, num_things=THINGS, num_classes=THINGS, points=None)
    expected = torch.ones(4, 8, dtype=torch.bool)
    expected[:3, :5] = False  # the sixth column's central pixels are 21, inside, and 22
    assert torch.equal(truth.undecided.view(4, 8), expected)


def test_points_read_masks_bilinearly_and_painting_keeps_all_pixels():
    points = torch.tensor([[[2.5 / 8, 1.5 / 4], [3 / 8, 2 / 4], [0.0, 0.0]]])
    truth = truth_of(random_map(16, 32), points=points)
    full = truth_of(random_map(16, 32))
    maps = full.masks.view(-1, 4, 8)
    expected = torch.stack([maps[:, 1, 2], maps[:, 1:3, 2:4].mean((1, 2)), maps[:, 0, 0]], dim=1)
    torch.testing.assert_close(truth.masks, expected)
    assert torch.equal(truth.covered, full.covered)
    assert torch.equal(truth.stuff_map, full.stuff_map)


def test_no_maps_have_no_values_at_points():
    assert read(torch.zeros(0, 4, 8), torch.rand(7, 2)).shape == (0, 7)
