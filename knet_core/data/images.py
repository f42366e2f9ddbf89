"""Decoding image files, and what makes an image unfit."""

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from knet_core.data.paths import SplitFiles
from knet_core.data.source import MOST_PIXELS, ImageRecord
from knet_core.data.storage import open_file
from knet_core.errors import DataError

SMALLEST_SIDE = 32
"""Training drops images with a shorter side (as the authors' recipe does)."""


def read_image(path: Path) -> NDArray[np.uint8]:
    """Decode an image file to (H, W, 3) RGB.

    Raises:
        DataError: The file is missing, cut short, not an image, too large, or has more than 8 bits
            a channel.
    """
    with open_image(path) as image:
        if image.mode.startswith(("I", "F")):
            raise DataError(
                f"{path}: pixels of mode {image.mode}; expected 8 bits a channel: convert it"
            )
        return np.array(image.convert("RGB"))


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image file; what Pillow raises for a damaged one becomes one line.

    Raises:
        DataError: The file is missing, cut short, not an image, or too large.
    """
    try:
        with open_file(path) as file:
            with warnings.catch_warnings():
                # Our limit is below the one at which Pillow refuses, beyond that where it warns.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = Image.open(file)
            with image:
                if image.width * image.height > MOST_PIXELS:
                    raise DataError(
                        f"{path}: {image.width} x {image.height} pixels; expected at most "
                        f"{MOST_PIXELS}: cut it into tiles"
                    )
                yield image
    except UnidentifiedImageError:
        raise _undecodable(path, "not an image") from None
    except OSError as error:
        raise _undecodable(path, error.strerror or error) from None
    except (SyntaxError, ValueError, EOFError, struct.error) as error:
        raise _undecodable(path, error) from None
    except Image.DecompressionBombError as error:
        raise _undecodable(path, error) from None


def _undecodable(path: Path, reason: object) -> DataError:
    return DataError(
        f"{path}: cannot be decoded ({reason}); expected a whole image: fetch or write it again"
    )


def check_size(path: Path, pixels: NDArray[Any], record: ImageRecord, stated_in: str) -> None:
    """Compare decoded pixels (H0, W0, ...) with the stated size.

    Raises:
        DataError: They differ.
    """
    height, width = pixels.shape[:2]
    if (height, width) != (record.height, record.width):
        raise DataError(
            f"{path}: image {record.id} is {width} x {height} pixels, expected "
            f"{record.width} x {record.height} from {stated_in}; "
            f"correct its width and height there or restore the image (EXIF rotation is "
            f"not applied)"
        )


def no_image_left(files: SplitFiles, count: int, *, training: bool) -> DataError:
    """Return the error for a split of `count` images of which none can be used."""
    return DataError(
        f"{files.annotations}: none of its {count} images can be used; expected at least one"
        + (
            f" of {SMALLEST_SIDE} pixels a side with an object that is not crowd: "
            f"check the image_id of the annotations"
            if training
            else ": list the images"
        )
    )
