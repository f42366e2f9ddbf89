from dataclasses import replace

import numpy as np
import pytest
import torch

from knet_core.config import DataConfig
from knet_core.data.transforms import (
    MEAN,
    STD,
    Crop,
    Geometry,
    evaluation_geometry,
    fitted_size,
    image_tensor,
    mask_tensor,
    training_geometry,
)


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
    drawn = {
        (g.size[0], g.flip)
        for seed in range(60)
        for g in [training_geometry((50, 50), config, np.random.default_rng(seed))]
    }
    assert drawn == {(side, flip) for side in (40, 41, 42) for flip in (False, True)}
    assert evaluation_geometry((50, 50), config) == Geometry(size=(42, 42), flip=False)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(60, 80), (95, 127), (30, 40)])
def test_image_and_masks_stay_aligned(size: tuple[int, int], flip: bool) -> None:
    mask = np.zeros((1, 60, 80), dtype=np.uint8)
    mask[0, 10:35, 50:75] = 1
    mask[0, 40:55, 5:20] = 1
    picture = np.repeat(mask[0, :, :, None] * np.uint8(255), 3, axis=2)
    geometry = Geometry(size=size, flip=flip)
    image = image_tensor(picture, geometry) * torch.tensor(STD)[:, None, None]
    image += torch.tensor(MEAN)[:, None, None]
    masks = mask_tensor(mask, geometry)
    assert image.shape[1:] == masks.shape[1:] == size
    # Bilinear edges and nearest edges differ by a pixel at most, along the outline.
    assert ((image[0] > 127.5) != masks[0].bool()).float().mean() < 0.03
    left, right = masks[0, :, : size[1] // 2].sum(), masks[0, :, size[1] // 2 :].sum()
    assert (left > right) == flip


def test_normalisation_is_imagenets_in_rgb_order() -> None:
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    pixels[..., 0] = 255
    image = image_tensor(pixels, Geometry(size=(4, 4), flip=False))
    expected = [(255 - 123.675) / 58.395, -116.28 / 57.12, -103.53 / 57.375]
    assert image[:, 0, 0].tolist() == pytest.approx(expected)


def test_resizing_interpolates_half_pixel_centres_without_antialiasing() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    geometry = Geometry(size=(5, 7), flip=False)
    image = image_tensor(pixels, geometry) * torch.tensor(STD)[:, None, None]
    image += torch.tensor(MEAN)[:, None, None]
    for y in range(5):
        for x in range(7):
            v, u = (y + 0.5) * 9 / 5 - 0.5, (x + 0.5) * 12 / 7 - 0.5
            i, j = int(v), int(u)
            a, b = v - i, u - j
            corners = pixels[i : i + 2, j : j + 2].astype(float)
            weights = np.outer([1 - a, a], [1 - b, b])[..., None]
            expected = (corners * weights).sum((0, 1))
            assert image[:, y, x].tolist() == pytest.approx(expected.tolist(), abs=1.0)


def test_masks_take_the_nearest_pixel_as_opencv_does() -> None:
    mask = np.random.default_rng(0).integers(0, 2, (2, 9, 12), dtype=np.uint8)
    resized = mask_tensor(mask, Geometry(size=(5, 20), flip=False))
    for y in range(5):
        for x in range(20):
            assert resized[:, y, x].tolist() == mask[:, y * 9 // 5, x * 12 // 20].tolist()


def test_no_masks_stay_no_masks() -> None:
    empty = np.zeros((0, 60, 80), dtype=np.uint8)
    assert mask_tensor(empty, Geometry(size=(30, 40), flip=True)).shape == (0, 30, 40)


CROPPED = DataConfig(short_edge=(40, 40), long_edge=160, flip=0.0, scale_range=(0.5, 2.0), crop=32)


@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_is_a_window_of_the_resized_image_then_padded(flip: bool) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (30, 50, 3), dtype=np.uint8)
    labels = rng.integers(0, 9, (30, 50), dtype=np.uint8)
    whole = Geometry(size=(24, 40), flip=False)
    cut = Geometry(size=(24, 40), flip=flip, crop=Crop(top=0, left=5, side=32))
    image, window = image_tensor(pixels, cut), image_tensor(pixels, whole)[:, :, 5:37]
    assert image.shape == (3, 32, 32)
    assert image[:, :24].equal(window.flip(-1) if flip else window)
    assert (image[:, 24:] == 0).all()
    found = mask_tensor(labels[None], cut, padding=255)[0]
    expected = mask_tensor(labels[None], whole)[0, :, 5:37]
    assert found[:24].equal(expected.flip(-1) if flip else expected)
    assert (found[24:] == 255).all()


def test_both_edges_are_scaled_by_the_same_number() -> None:
    rng = np.random.default_rng(0)
    drawn = [training_geometry((60, 90), CROPPED, rng) for _ in range(400)]
    heights = [geometry.size[0] for geometry in drawn]
    assert min(heights) in (20, 21)
    assert max(heights) in (79, 80)
    assert np.mean(heights) == pytest.approx(50, abs=3)
    for geometry in drawn:
        assert geometry.size[1] == pytest.approx(1.5 * geometry.size[0], abs=1)
        assert geometry.final_size == (32, 32)
        assert geometry.crop is not None
        for start, length in zip(
            (geometry.crop.top, geometry.crop.left), geometry.size, strict=True
        ):
            assert 0 <= start <= max(length - 32, 0)
    assert len({g.crop.left for g in drawn if g.crop}) > 30


def test_crops_that_one_class_fills_are_drawn_again() -> None:
    labels = np.zeros((100, 200), dtype=np.uint8)
    labels[:, 170:] = 1
    labels[:50] = 255  # does not count
    config = replace(CROPPED, short_edge=(100, 100), long_edge=200, scale_range=(1.0, 1.0))

    def shares(share: float) -> list[float]:
        rng = np.random.default_rng(0)
        found = []
        for _ in range(200):
            drawn = replace(config, crop_max_share=share)
            crop = training_geometry((100, 200), drawn, rng, labels).crop
            assert crop is not None
            part = labels[crop.top : crop.top + 32, crop.left : crop.left + 32]
            counts = np.bincount(part[part < 255], minlength=2)
            found.append(counts.max() / max(counts.sum(), 1) if counts.sum() else 1.0)
        return found

    free, bound = shares(1.0), shares(0.75)
    # Six crops in a hundred are varied; eleven draws find one in half of all cases.
    assert np.mean(np.array(free) < 0.75) == pytest.approx(0.06, abs=0.05)
    assert np.mean(np.array(bound) < 0.75) == pytest.approx(1 - 0.94**11, abs=0.1)
