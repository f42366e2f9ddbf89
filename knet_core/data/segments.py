"""What all formats with a map of segments share: masks, labels and truth made from it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_api

from knet_core.config import Task
from knet_core.data.source import (
    IGNORED,
    Category,
    ImageRecord,
    PanopticTruth,
    TrueSegment,
    image_entry,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """One image's segments (S)."""

    ids: NDArray[np.int32]
    """(H0, W0); 0 is void."""
    place: NDArray[np.uint16]
    """(H0, W0) position of each pixel's segment, from 1; 0 is void."""
    numbers: NDArray[np.int32]
    """(S,) the segments' ids."""
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]


class SegmentSource(ABC):
    """Objects, labels and ground truth of a split whose images have a map of segments.

    Args:
        categories: All of the data set, things first.
        task: Instance shows things only.
    """

    def __init__(self, categories: tuple[Category, ...], task: Task) -> None:
        self._all = categories
        self._task = task
        self._num_things = sum(category.isthing for category in categories)
        shown = self._num_things if task == "instance" else len(categories)
        self.categories = categories[:shown]
        self._last: tuple[int, Segments] | None = None  # a sample asks for objects and labels

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abstractmethod
    def record(self, index: int) -> ImageRecord:
        """Return id, file name and size of one image."""

    @abstractmethod
    def _read_segments(self, index: int) -> Segments:
        """Decode the map of one image; labels are positions among all categories."""

    def _segments(self, index: int) -> Segments:
        if self._last is None or self._last[0] != index:
            self._last = index, self._read_segments(index)
        return self._last[1]

    def objects(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Decode the labels (G,) and masks (G, H0, W0) of the things of one image; no crowds.

        Raises:
            DataError: The map is damaged or does not agree with the annotations.
        """
        found = self._segments(index)
        chosen = np.flatnonzero((found.labels < self._num_things) & ~found.crowd)
        masks = found.place == (chosen + 1).astype(np.uint16)[:, None, None]
        return found.labels[chosen], masks.view(np.uint8)

    def semantic(self, index: int) -> NDArray[np.uint8] | None:
        """Decode the label of every pixel (H0, W0), 255 for void and crowds.

        The instance task knows no stuff: its map holds crowds and the number of things.

        Raises:
            DataError: The map is damaged or does not agree with the annotations.
        """
        found = self._segments(index)
        if self._task == "instance":
            crowd = found.crowd & (found.labels < self._num_things)
            if not crowd.any():
                return None
            table = np.where(np.append(False, crowd), IGNORED, self._num_things)
        else:
            table = np.append(IGNORED, np.where(found.crowd, IGNORED, found.labels))
        return table.astype(np.uint8)[found.place]

    def panoptic(self, index: int) -> PanopticTruth:
        """Decode the segments of one image.

        Raises:
            DataError: The map is damaged or does not agree with the annotations.
        """
        found = self._segments(index)
        columns = zip(
            found.numbers.tolist(), found.labels.tolist(), found.crowd.tolist(), strict=True
        )
        return PanopticTruth(
            ids=found.ids,
            segments=tuple(
                TrueSegment(id=number, label=label, iscrowd=crowd)
                for number, label, crowd in columns
            ),
        )

    def ground_truth(self) -> dict[str, Any]:
        """Decode every image and return its things in COCO's form.

        Raises:
            DataError: A map is damaged or does not agree with the annotations.
        """
        annotations: list[dict[str, Any]] = []
        records = [self.record(index) for index in range(len(self))]
        for index, record in enumerate(records):
            found = self._segments(index)
            for place, label in enumerate(found.labels.tolist()):
                if not self._all[label].isthing:
                    continue
                mask = np.asfortranarray(found.place == place + 1, dtype=np.uint8)
                rle = mask_api.encode(mask)
                annotations.append(
                    {
                        "id": len(annotations) + 1,  # pycocotools takes 0 for "not matched"
                        "image_id": record.id,
                        "category_id": self._all[label].id,
                        "iscrowd": int(found.crowd[place]),
                        "area": float(mask.sum()),
                        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                    }
                )
        return {
            "images": [image_entry(record) for record in records],
            "annotations": annotations,
            "categories": [{"id": c.id, "name": c.name} for c in self.categories if c.isthing],
        }
