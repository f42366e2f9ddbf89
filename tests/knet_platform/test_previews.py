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
    small = Image.open(io.BytesIO(preview(picture(400, 200, "PNG"), 20_000)))
    assert (small.format, small.size) == ("WEBP", (200, 100))


def test_a_small_preview_is_passed_on_to_the_byte() -> None:
    webp = picture(100, 50, "WEBP")
    assert preview(webp, 5000) == webp


def test_half_a_picture_is_an_error_and_not_grey() -> None:
    with pytest.raises(OSError, match="truncated"):
        preview(picture(400, 200, "PNG")[:2000], 20_000)
    with pytest.raises(OSError, match="cannot identify"):
        preview(b"none")
