import colorsys
import dataclasses

import numpy as np
import pytest
import torch

from knet_core.data.photometric import Distortion, distort, draw_distortion

RNG = np.random.default_rng(0)
PIXELS = np.concatenate(
    [
        RNG.integers(0, 256, (12, 20, 3), dtype=np.uint8),
        np.repeat(np.arange(0, 240, 12, dtype=np.uint8)[None, :, None], 3, axis=2),  # greys
    ]
)


def by_definition(pixel: list[int], distortion: Distortion) -> list[float]:
    """Change one pixel, step by step, through Python's own HSV."""

    def clip(values: list[float]) -> list[float]:
        return [min(max(value, 0.0), 255.0) for value in values]

    colour = clip([value + distortion.brightness for value in pixel])
    if distortion.contrast_first:
        colour = clip([value * distortion.contrast for value in colour])
    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in colour))
    hue = (hue + distortion.hue / 180) % 1
    saturation = min(saturation * distortion.saturation, 1.0)
    colour = [255 * channel for channel in colorsys.hsv_to_rgb(hue, saturation, value)]
    if not distortion.contrast_first:
        colour = clip([value * distortion.contrast for value in colour])
    return colour


@pytest.mark.parametrize(
    "distortion",
    [
        Distortion(),
        Distortion(brightness=-31.5),
        Distortion(contrast=1.45),
        Distortion(saturation=0.5),
        Distortion(saturation=1.5),
        Distortion(hue=-18),
        Distortion(hue=17),
        Distortion(brightness=20, contrast=0.6, saturation=1.3, hue=9),
        Distortion(brightness=20, contrast=1.4, contrast_first=False, saturation=0.7, hue=-5),
    ],
)
def test_colours_change_as_defined(distortion: Distortion) -> None:
    found = distort(PIXELS, distortion)
    assert found.dtype == np.uint8
    for before, after in zip(PIXELS.reshape(-1, 3), found.reshape(-1, 3), strict=True):
        expected = by_definition(before.tolist(), distortion)
        # Rounded to whole numbers once.
        assert after.tolist() == pytest.approx(expected, abs=0.51)


def test_no_change_is_the_image_itself() -> None:
    assert np.array_equal(distort(PIXELS, Distortion()), PIXELS)


def test_every_change_is_drawn_half_of_the_time_within_its_range() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        drawn = [draw_distortion() for _ in range(4000)]
    neutral = Distortion()
    for field in dataclasses.fields(Distortion):
        changed = [getattr(d, field.name) != getattr(neutral, field.name) for d in drawn]
        # A hue that is drawn is 0 once in 36 times.
        assert np.mean(changed) == pytest.approx(0.5, abs=0.04)
    assert all(abs(d.brightness) <= 32 for d in drawn)
    assert all(0.5 <= factor <= 1.5 for d in drawn for factor in (d.contrast, d.saturation))
    assert {d.hue for d in drawn} == set(range(-18, 18))
