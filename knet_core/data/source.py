"""What a data set format must offer; `SegmentationDataset` builds samples from it. No torch."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

IGNORED = 255
"""Label of a pixel that no annotation decides; `structures.IGNORE` without torch."""
MOST_LABELS = 254
"""Labels are bytes: so many classes, one value for none of them, and `IGNORED`."""
MOST_PIXELS = 2**27
"""Of one image; a larger one would need gigabytes, and a few bytes of PNG can claim it."""


@dataclass(frozen=True, slots=True)
class Category:
    """One class; its label inside the network is its position in the data set's list.

    Things come first, then stuff, both sorted by id.
    """

    id: int
    name: str
    isthing: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRecord:
    """What is known of an image before it is decoded; sizes in pixels."""

    id: int
    file_name: str
    height: int
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrueSegment:
    """One annotated region of a panoptic map."""

    id: int
    """Its value in the map."""
    label: int
    iscrowd: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PanopticTruth:
    """Panoptic ground truth of one image."""

    ids: NDArray[np.int32]
    """(H0, W0); 0 is void."""
    segments: tuple[TrueSegment, ...]


class Source(Protocol):
    """Images with their objects, by position; nothing is decoded before it is asked for."""

    categories: tuple[Category, ...]
    annotated: bool
    """False where only images are listed (COCO's test-dev), to be predicted and not scored."""

    def __len__(self) -> int:
        """Return the number of images."""

    def record(self, index: int) -> ImageRecord:
        """Return what is known of one image without decoding it."""

    def sizes(self) -> NDArray[np.int32]:
        """Return the height and width of all images (N, 2)."""

    def image(self, index: int) -> NDArray[np.uint8]:
        """Return the pixels, (H0, W0, 3) RGB.

        Raises:
            DataError: The image cannot be decoded or has not the stated size.
        """

    def objects(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Return labels (G,) and masks (G, H0, W0), 0 or 1, of all things but crowds."""

    def semantic(self, index: int) -> NDArray[np.uint8] | None:
        """Return the label of every pixel (H0, W0), 255 for void and crowds.

        Pixels of no category hold the number of classes. None where the format knows no such map
        and the image has no crowd.
        """

    def panoptic(self, index: int) -> PanopticTruth:
        """Return the panoptic ground truth of one image.

        Raises:
            DataError: The format holds none, or its file is damaged.
        """

    def ground_truth(self) -> dict[str, Any]:
        """Return images, annotations and categories in COCO's form, for evaluation."""


def image_entry(record: ImageRecord) -> dict[str, Any]:
    """Return an image in COCO's form."""
    return {
        "id": record.id,
        "file_name": record.file_name,
        "height": record.height,
        "width": record.width,
    }


def places(ids: NDArray[np.integer[Any]], known: NDArray[np.integer[Any]]) -> NDArray[np.uint16]:
    """Return for every pixel the position of its id in `known`, from 1; 0 where it is not there.

    Args:
        ids: Not negative, of any shape; a table of the largest is made.
        known: Different ids, fewer than 65535.
    """
    largest = max(int(ids.max(initial=0)), int(known.max(initial=0)))
    table = np.zeros(largest + 1, dtype=np.uint16)  # zeroed lazily: untouched pages cost nothing
    table[known] = np.arange(1, len(known) + 1, dtype=np.uint16)
    found: NDArray[np.uint16] = table[ids]
    return found
