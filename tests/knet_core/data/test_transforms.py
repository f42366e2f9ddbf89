import numpy as np
import pytest
import torch

from knet_core.config import DataConfig
from knet_core.data.transforms import (
    MEAN,
    STD,
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
