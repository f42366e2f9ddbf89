from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from knet_core.config import DataConfig
from knet_core.data.transforms import (
    MEAN,
    STD,
    FitEdges,
    LabelMap,
    Masks,
    VariedCrop,
    as_image,
    evaluation_transforms,
    fitted_size,
    training_transforms,
)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield


def picture(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pixels_of(image: Tensor) -> Tensor:
    """Undo the normalisation."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return image * std + mean


def labels_of(rows: int, columns: int) -> LabelMap:
    """Label every pixel with its place, below 251."""
    return LabelMap((torch.arange(rows * columns) % 251).view(1, rows, columns).to(torch.uint8))


class FitSize(FitEdges):
    """Resizes to any size."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__((1, 1), 1)
        self._size = (height, width)

    def make_params(self, flat_inputs: list[object]) -> dict[str, object]:
        return {"size": self._size}


@pytest.mark.parametrize(
    ("size", "short", "long", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),  # 640 * 800 / 480 = 1066.67
        ((427, 640), 800, 1333, (800, 1199)),
        ((300, 1000), 800, 1333, (400, 1333)),  # the long edge decides
        ((1000, 300), 800, 1333, (1333, 400)),
        ((128, 128), 128, 128, (128, 128)),
        ((4, 4000), 32, 64, (1, 64)),  # never nothing
    ],
)
def test_sizes_keep_proportions_within_both_edges(
    size: tuple[int, int], short: int, long: int, expected: tuple[int, int]
) -> None:
    assert fitted_size(size, short, long) == expected


def test_training_draws_every_short_edge_and_both_flips() -> None:
    config = DataConfig(short_edge=(40, 42), long_edge=100)
    pixels = np.zeros((50, 50, 3), dtype=np.uint8)
    pixels[:, :25] = 255
    training, evaluation = training_transforms(config), evaluation_transforms(config)
    drawn = {
        (image.shape[1:], bool(image[0, 0, 0] < image[0, 0, -1]))
        for _ in range(60)
        for image in [training(as_image(pixels))]
    }
    assert drawn == {((side, side), flip) for side in (40, 41, 42) for flip in (False, True)}
    image = evaluation(as_image(pixels))
    assert image.shape == (3, 42, 42)
    assert image[0, 0, 0] > image[0, 0, -1]


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("size", [(60, 80), (95, 127), (30, 40)])
def test_image_and_masks_stay_aligned(size: tuple[int, int], flip: float) -> None:
    mask = np.zeros((1, 60, 80), dtype=np.uint8)
    mask[0, 10:35, 50:75] = 1
    mask[0, 40:55, 5:20] = 1
    pixels = np.repeat(mask[0, :, :, None] * np.uint8(255), 3, axis=2)
    edges = (2 * size[0], 2 * size[0])
    config = DataConfig(short_edge=edges, long_edge=2000, scale_range=(0.5, 0.5), flip=flip)
    image, masks = training_transforms(config)(as_image(pixels), Masks(torch.from_numpy(mask)))
    assert image.shape[1:] == masks.shape[1:] == size
    assert type(image) is type(masks) is Tensor
    # Bilinear edges and nearest edges differ by a pixel at most, along the outline.
    assert ((pixels_of(image)[0] > 127.5) != masks[0].bool()).float().mean() < 0.03
    left, right = masks[0, :, : size[1] // 2].sum(), masks[0, :, size[1] // 2 :].sum()
    assert (left > right) == bool(flip)


def test_normalisation_is_imagenets_in_rgb_order() -> None:
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    pixels[..., 0] = 255
    image = evaluation_transforms(DataConfig())(as_image(pixels))
    expected = [(255 - 123.675) / 58.395, -116.28 / 57.12, -103.53 / 57.375]
    assert image[:, 0, 0].tolist() == pytest.approx(expected)


def test_resizing_interpolates_half_pixel_centres_without_antialiasing() -> None:
    pixels = picture(9, 12)
    image = FitSize(5, 7)(as_image(pixels))
    for y in range(5):
        for x in range(7):
            v, u = (y + 0.5) * 9 / 5 - 0.5, (x + 0.5) * 12 / 7 - 0.5
            i, j = int(v), int(u)
            a, b = v - i, u - j
            corners = pixels[i : i + 2, j : j + 2].astype(float)
            weights = np.outer([1 - a, a], [1 - b, b])[..., None]
            expected = (corners * weights).sum((0, 1))
            assert image[:, y, x].tolist() == pytest.approx(expected.tolist(), abs=1.0)


# At 467 to 615 float32, as in torchvision's own kernel, would take a neighbour.
@pytest.mark.parametrize(("old", "new"), [((9, 12), (5, 20)), ((467, 4), (615, 4))])
def test_masks_take_the_nearest_pixel_as_opencv_does(
    old: tuple[int, int], new: tuple[int, int]
) -> None:
    mask = np.random.default_rng(0).integers(0, 2, (2, *old), dtype=np.uint8)
    resized = FitSize(*new)(Masks(torch.from_numpy(mask)))
    assert type(resized) is Masks
    for y in range(new[0]):
        for x in range(new[1]):
            nearest = mask[:, y * old[0] // new[0], x * old[1] // new[1]]
            assert resized[:, y, x].tolist() == nearest.tolist()


def test_no_masks_stay_no_masks() -> None:
    empty = Masks(torch.zeros(0, 60, 80, dtype=torch.uint8))
    config = replace(CROPPED, flip=1.0)
    image, masks = training_transforms(config)(as_image(picture(60, 80)), empty)
    assert (image.shape, masks.shape) == ((3, 32, 32), (0, 32, 32))


CROPPED = DataConfig(short_edge=(40, 40), long_edge=160, flip=0.0, scale_range=(0.5, 2.0), crop=32)


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_a_crop_is_a_window_of_the_resized_image_then_padded(flip: float) -> None:
    config = DataConfig(
        short_edge=(48, 48), long_edge=320, scale_range=(0.5, 0.5), flip=flip, crop=32
    )
    pixels, labels = picture(30, 50), labels_of(30, 50)
    masks = Masks(torch.ones(2, 30, 50, dtype=torch.uint8))
    whole = evaluation_transforms(DataConfig(short_edge=(32, 32), long_edge=40))(as_image(pixels))
    every = FitSize(24, 40)(labels)[0]
    cut, objects, found = training_transforms(config)(as_image(pixels), masks, labels)
    assert cut.shape == (3, 32, 32)
    left = next(left for left in range(9) if every[0, left] == found[0, 0, 31 if flip else 0])
    window, expected = whole[:, :, left : left + 32], every[:, left : left + 32]
    assert cut[:, :24].equal(window.flip(-1) if flip else window)
    assert (cut[:, 24:] == 0).all()
    assert found[0, :24].equal(expected.flip(-1) if flip else expected)
    assert (found[0, 24:] == 255).all()
    assert (objects[:, :24] == 1).all()
    assert (objects[:, 24:] == 0).all()


def test_both_edges_are_scaled_by_the_same_number() -> None:
    fit, crop = FitEdges((40, 40), 160, (0.5, 2.0)), VariedCrop(32, 1.0)
    image = as_image(picture(60, 90))
    heights, lefts = [], set()
    for _ in range(400):
        size = fit.make_params([image])["size"]
        heights.append(size[0])
        assert size[1] == pytest.approx(1.5 * size[0], abs=1)
        drawn = crop.make_params([torch.empty(3, *size)])
        lefts.add(drawn["left"])
        for start, length in zip((drawn["top"], drawn["left"]), size, strict=True):
            assert 0 <= start <= max(length - 32, 0)
    assert min(heights) in (20, 21)
    assert max(heights) in (79, 80)
    assert np.mean(heights) == pytest.approx(50, abs=3)
    assert len(lefts) > 30
    assert training_transforms(CROPPED)(image).shape == (3, 32, 32)


def test_crops_that_one_class_fills_are_drawn_again() -> None:
    labels = torch.zeros(1, 100, 200, dtype=torch.uint8)
    labels[..., 170:] = 1
    labels[:, :50] = 255  # does not count

    def shares(share: float) -> list[float]:
        crop = VariedCrop(32, share)
        found = []
        for _ in range(200):
            part = crop(LabelMap(labels)).numpy()
            counts = np.bincount(part[part < 255], minlength=2)
            found.append(counts.max() / max(counts.sum(), 1) if counts.sum() else 1.0)
        return found

    free, bound = shares(1.0), shares(0.75)
    # Six crops in a hundred are varied; eleven draws find one in half of all cases.
    assert np.mean(np.array(free) < 0.75) == pytest.approx(0.06, abs=0.05)
    assert np.mean(np.array(bound) < 0.75) == pytest.approx(1 - 0.94**11, abs=0.1)


def test_the_published_order_of_steps() -> None:
    config = replace(CROPPED, photometric=True)
    names = [type(step).__name__ for step in training_transforms(config).transforms]
    assert names == [
        "FitEdges",
        "VariedCrop",
        "RandomHorizontalFlip",
        "PhotometricDistortion",
        "ToDtype",
        "Normalize",
        "PadTo",
        "ToPureTensor",
    ]
