"""What a data set format must offer; `SegmentationDataset` builds samples from it. No torch."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Category:
    """One class; its label inside the network is its position in the list sorted by id."""

    id: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRecord:
    """What is known of an image before it is decoded; sizes in pixels."""

    id: int
    file_name: str
    height: int
    width: int


class Source(Protocol):
    """Images with their objects, by position; nothing is decoded before it is asked for."""

    categories: tuple[Category, ...]

    def __len__(self) -> int:
        """Return the number of images."""

    def record(self, index: int) -> ImageRecord:
        """Return what is known of one image without decoding it."""

    def image(self, index: int) -> NDArray[np.uint8]:
        """Return the pixels, (H0, W0, 3) RGB.

        Raises:
            DataError: The image cannot be decoded or has not the stated size.
        """

    def objects(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Return labels (G,) and masks (G, H0, W0), 0 or 1, of everything that is not crowd."""

    def ground_truth(self) -> dict[str, Any]:
        """Return images, annotations and categories in COCO's form, for evaluation."""
