"""One image as a batch of one, without a data set around it."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from knet_core.config import DataConfig
from knet_core.data.dataset import Sample, collate
from knet_core.data.images import read_image
from knet_core.data.transforms import as_image, evaluation_transforms
from knet_core.errors import DataError
from knet_core.structures import Batch, ImageInfo, Targets


def load_image(path: Path, config: DataConfig) -> tuple[NDArray[np.uint8], Batch]:
    """Return the stored pixels (H0, W0, 3) RGB, and the image as evaluation would see it.

    Raises:
        DataError: The file is missing or cannot be decoded.
    """
    pixels = read_image(path)
    return pixels, image_batch(pixels, config, file_name=path.name)


def image_batch(pixels: NDArray[np.uint8], config: DataConfig, *, file_name: str = "") -> Batch:
    """Return an image as evaluation would see it.

    Args:
        pixels: (H0, W0, 3) RGB.
        config: How images enter the network.
        file_name: Names the image in results and errors.

    Raises:
        DataError: The array has another form.
    """
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise DataError(
            f"image: an array of {pixels.dtype} of the shape {pixels.shape}; expected uint8 "
            f"(height, width, 3), RGB"
        )
    image = evaluation_transforms(config)(as_image(pixels))
    height, width = image.shape[1:]
    sample = Sample(
        image=image,
        targets=Targets(
            labels=torch.zeros(0, dtype=torch.int64),
            masks=torch.zeros(0, height, width, dtype=torch.uint8),
        ),
        info=ImageInfo(
            image_id=0,
            file_name=file_name,
            input_size=(height, width),
            original_size=pixels.shape[:2],
        ),
    )
    return collate([sample])
