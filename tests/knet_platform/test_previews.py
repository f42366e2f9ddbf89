"""Previews of pictures."""

import io

import pytest
from PIL import Image

from knet_platform.previews import preview


def picture(width: int, height: int, form: str) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((width, height), 80).convert("RGB").save(buffer, form)
    return buffer.getvalue()


def test_a_large_picture_keeps_its_shape_within_the_pixels_allowed() -> None:
    small = Image.open(io.BytesIO(preview(picture(2000, 800, "PNG"))))
    assert (small.format, small.size) == ("WEBP", (1000, 400))


def test_a_small_picture_keeps_its_size() -> None:
    assert Image.open(io.BytesIO(preview(picture(90, 50, "PNG")))).size == (90, 50)


def test_half_a_picture_is_an_error_and_not_grey() -> None:
    with pytest.raises(OSError, match="truncated"):
        preview(picture(400, 200, "PNG")[:2000])
    with pytest.raises(OSError, match="cannot identify"):
        preview(b"none")
