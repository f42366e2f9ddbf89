"""One image file as a batch of one, without a data set around it."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from knet_core.config import DataConfig
from knet_core.data.dataset import Sample, collate
from knet_core.data.images import read_image
from knet_core.data.transforms import evaluation_geometry, image_tensor
from knet_core.structures import Batch, ImageInfo, Targets


def load_image(path: Path, config: DataConfig) -> tuple[NDArray[np.uint8], Batch]:
    """Return the stored pixels (H0, W0, 3) RGB, and the image as evaluation would see it.

    Raises:
        DataError: The file is missing or cannot be decoded.
    """
    pixels = read_image(path)
    geometry = evaluation_geometry(pixels.shape[:2], config)
    sample = Sample(
        image=image_tensor(pixels, geometry),
        targets=Targets(
            labels=torch.zeros(0, dtype=torch.int64),
            masks=torch.zeros(0, *geometry.size, dtype=torch.uint8),
        ),
        info=ImageInfo(
            image_id=0,
            file_name=path.name,
            input_size=geometry.size,
            original_size=pixels.shape[:2],
        ),
    )
    return pixels, collate([sample])
