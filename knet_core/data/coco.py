"""COCO instances: images in a folder, objects in one JSON file; decoded only when asked for."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_api

from knet_core.data.coco_annotations import run_lengths
from knet_core.data.coco_index import CocoIndex, read_index
from knet_core.data.images import SMALLEST_SIDE, no_image_left
from knet_core.data.listed_images import ListedImages
from knet_core.data.paths import SplitFiles
from knet_core.data.source import (
    IGNORED,
    MOST_LABELS,
    PanopticTruth,
    image_entry,
)
from knet_core.errors import DataError


class CocoSource(ListedImages):
    """One split of a COCO data set.

    Outside training the file may lack annotations (COCO's test-dev): its images then have no
    objects and can be predicted, not scored.

    Args:
        files: Where the split lies.
        training: Drop images without any object that is not crowd, and tiny ones.

    Raises:
        DataError: The annotations cannot be used, or no image is left.
    """

    _index: CocoIndex

    def __init__(self, files: SplitFiles, *, training: bool) -> None:
        self._files = files
        self._index = index = read_index(files, training=training)
        self.categories = index.categories
        self.annotated = index.annotated
        self._kept = np.arange(len(index.image_ids))
        if training:
            objects = np.zeros(len(index.image_ids), dtype=np.int64)
            owners = np.repeat(self._kept, np.diff(index.first))
            np.add.at(objects, owners, ~index.crowd[index.order])
            large = (index.sizes >= SMALLEST_SIDE).all(axis=1)
            self._kept = self._kept[(objects > 0) & large]
        if not len(self._kept):
            raise no_image_left(files, len(index.image_ids), training=training)

    def objects(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Decode the labels (G,) and masks (G, H0, W0) of one image; crowds have none."""
        table = self._index
        image = int(self._kept[index])
        height, width = table.sizes[image].tolist()
        single = [a for a in table.annotations(image).tolist() if not table.crowd[a]]
        if not single:
            return np.zeros(0, dtype=np.int64), np.zeros((0, height, width), dtype=np.uint8)
        masks = [decode_mask(table.rle(a, height, width)["counts"], height, width) for a in single]
        return table.labels[single], np.stack(masks)

    def semantic(self, index: int) -> NDArray[np.uint8] | None:
        """Return 255 on crowds and the number of classes elsewhere (H0, W0); None without crowds.

        None also where that number does not fit into a byte.
        """
        table = self._index
        image = int(self._kept[index])
        height, width = table.sizes[image].tolist()
        crowds = [a for a in table.annotations(image).tolist() if table.crowd[a]]
        if not crowds or len(self.categories) > MOST_LABELS:
            return None
        labels = np.full((height, width), len(self.categories), dtype=np.uint8)
        for annotation in crowds:
            counts = table.rle(annotation, height, width)["counts"]
            labels[decode_mask(counts, height, width).view(np.bool_)] = IGNORED
        return labels

    def panoptic(self, index: int) -> PanopticTruth:
        """Refuse: instance files hold no panoptic map.

        Raises:
            DataError: Always.
        """
        raise DataError(
            f"{self._files.annotations}: holds instances, no panoptic segments; expected "
            f"data.format=coco_panoptic with a panoptic JSON file"
        )

    def ground_truth(self) -> dict[str, Any]:
        """Return COCO's form with masks as run lengths.

        Annotations are numbered from 1: pycocotools takes id 0 for "not matched". Areas are the
        file's, by which COCO sorts small from large; where it states none, the mask's.
        """
        table = self._index
        annotations: list[dict[str, Any]] = []
        for image in self._kept.tolist():
            height, width = table.sizes[image].tolist()
            for annotation in table.annotations(image).tolist():
                rle = table.rle(annotation, height, width)
                text = {"size": [height, width], "counts": rle["counts"].decode()}
                area = float(table.areas[annotation])
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": int(table.image_ids[image]),
                        "category_id": self.categories[table.labels[annotation]].id,
                        "iscrowd": int(table.crowd[annotation]),
                        "area": float(mask_api.area(rle)) if np.isnan(area) else area,
                        "segmentation": text,
                    }
                )
        return {
            "images": [image_entry(self.record(index)) for index in range(len(self))],
            "annotations": annotations,
            "categories": [{"id": c.id, "name": c.name} for c in self.categories],
        }


def decode_mask(counts: bytes, height: int, width: int) -> NDArray[np.uint8]:
    """Return the mask (H0, W0) of run lengths, which count down the columns from a run of 0."""
    lengths = run_lengths(counts)
    values = (np.arange(len(lengths)) % 2).astype(np.uint8)
    return values.repeat(lengths).reshape(width, height).T
