"""COCO panoptic: one JSON file and a PNG of segment ids an image; decoded only when asked for."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as mask_api

from knet_core.config import Task
from knet_core.data.images import SMALLEST_SIDE, check_size, decoding, no_image_left, read_image
from knet_core.data.panoptic_index import read_panoptic_index
from knet_core.data.paths import SplitFiles
from knet_core.data.source import (
    IGNORED,
    ImageRecord,
    PanopticTruth,
    TrueSegment,
    image_entry,
    places,
)
from knet_core.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decoded:
    """One image's segments (S)."""

    ids: NDArray[np.int32]
    """(H0, W0)."""
    place: NDArray[np.uint16]
    """(H0, W0) position of each pixel's segment, from 1; 0 is void."""
    numbers: NDArray[np.int32]
    """(S,) the segments' ids."""
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]


class CocoPanopticSource:
    """One split of a COCO panoptic data set.

    Args:
        files: Where the split lies; the PNGs lie in the folder named like the JSON file.
        training: Drop images that cannot be learned from, and tiny ones.
        task: Instance shows things only. Training drops images without a thing that is not crowd;
            where the task is semantic, without any segment that is not crowd.

    Raises:
        DataError: The annotations cannot be used, or no image is left.
    """

    def __init__(self, files: SplitFiles, *, training: bool, task: Task) -> None:
        self._files = files
        self._index = index = read_panoptic_index(files)
        things = sum(category.isthing for category in index.categories)
        self._shown = things if task == "instance" else len(index.categories)
        self._task = task
        self._last: tuple[int, _Decoded] | None = None  # a sample asks for objects and labels
        self.categories = index.categories[: self._shown]
        if not self.categories:
            raise DataError(
                f"{files.annotations}: none of its {len(index.categories)} categories is a thing; "
                f"expected some for model.task=instance: check isthing"
            )
        self._kept = np.arange(len(index.image_ids))
        if training:
            wanted = len(index.categories) if task == "semantic" else things
            counts = np.zeros(len(index.image_ids), dtype=np.int64)
            owners = np.repeat(self._kept, np.diff(index.first))
            np.add.at(counts, owners, (index.labels < wanted) & ~index.crowd)
            large = (index.sizes >= SMALLEST_SIDE).all(axis=1)
            self._kept = self._kept[(counts > 0) & large]
        if not len(self._kept):
            raise no_image_left(files, len(index.image_ids), training=training)

    def __len__(self) -> int:
        return len(self._kept)

    def record(self, index: int) -> ImageRecord:
        """Return id, file name and stated size of one image."""
        image = int(self._kept[index])
        height, width = self._index.sizes[image].tolist()
        return ImageRecord(
            id=int(self._index.image_ids[image]),
            file_name=self._index.file_names[image],
            height=height,
            width=width,
        )

    def image(self, index: int) -> NDArray[np.uint8]:
        """Decode one image, (H0, W0, 3) RGB.

        Raises:
            DataError: The file is damaged or its size is not the stated one.
        """
        record = self.record(index)
        path = self._files.images / record.file_name
        pixels = read_image(path)
        check_size(path, pixels, record, self._files.annotations.name)
        return pixels

    def objects(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Decode the labels (G,) and masks (G, H0, W0) of the things of one image; no crowds.

        Raises:
            DataError: The PNG is damaged or does not agree with the JSON file.
        """
        found = self._decode(index)
        things = [self._index.categories[label].isthing for label in found.labels]
        chosen = np.flatnonzero(np.array(things, dtype=np.bool_) & ~found.crowd)
        masks = found.place == (chosen + 1).astype(np.uint16)[:, None, None]
        return found.labels[chosen], masks.view(np.uint8)

    def semantic(self, index: int) -> NDArray[np.uint8] | None:
        """Decode the label of every pixel (H0, W0), 255 for void and crowds.

        The instance task knows no stuff: its map holds crowds and the number of things.

        Raises:
            DataError: The PNG is damaged or does not agree with the JSON file.
        """
        found = self._decode(index)
        if self._task == "instance":
            crowd = found.crowd & (found.labels < self._shown)
            if not crowd.any():
                return None
            table = np.where(np.append(False, crowd), IGNORED, self._shown)
        else:
            table = np.append(IGNORED, np.where(found.crowd, IGNORED, found.labels))
        return table.astype(np.uint8)[found.place]

    def panoptic(self, index: int) -> PanopticTruth:
        """Decode the segments of one image.

        Raises:
            DataError: The PNG is damaged or does not agree with the JSON file.
        """
        found = self._decode(index)
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
            DataError: A PNG is damaged or does not agree with the JSON file.
        """
        annotations: list[dict[str, Any]] = []
        for index in range(len(self)):
            found, record = self._decode(index), self.record(index)
            for place, label in enumerate(found.labels.tolist()):
                if not self._index.categories[label].isthing:
                    continue
                mask = np.asfortranarray(found.place == place + 1, dtype=np.uint8)
                rle = mask_api.encode(mask)
                annotations.append(
                    {
                        "id": len(annotations) + 1,  # pycocotools takes 0 for "not matched"
                        "image_id": record.id,
                        "category_id": self._index.categories[label].id,
                        "iscrowd": int(found.crowd[place]),
                        "area": float(mask.sum()),
                        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                    }
                )
        return {
            "images": [image_entry(self.record(index)) for index in range(len(self))],
            "annotations": annotations,
            "categories": [{"id": c.id, "name": c.name} for c in self.categories if c.isthing],
        }

    def _decode(self, index: int) -> _Decoded:
        if self._last is not None and self._last[0] == index:
            return self._last[1]
        image, record = int(self._kept[index]), self.record(index)
        rows = self._index.segments(image)
        numbers = self._index.ids[rows]
        path = self._index.folder / self._index.map_names[image]
        with decoding(path), Image.open(path) as picture:
            if picture.mode != "RGB":
                raise DataError(
                    f"{path}: pixels of mode {picture.mode}; expected RGB, whose id is "
                    f"R + 256 G + 65536 B: fetch or write it again"
                )
            red, green, blue = (np.asarray(band, dtype=np.int32) for band in picture.split())
        ids = red + 256 * green + 65536 * blue
        check_size(path, ids, record, self._files.annotations.name)
        place = places(ids, numbers)
        strange = ids[(place == 0) & (ids != 0)]
        if len(strange):
            raise DataError(
                f"{path}: holds segment id {strange[0]}, which the segments_info of image "
                f"{record.id} in {self._files.annotations.name} lacks; expected one of "
                f"{len(numbers)} ids: fetch the PNG and the JSON file of one release"
            )
        absent = np.bincount(place.ravel(), minlength=len(numbers) + 1)[1:] == 0
        if absent.any():
            raise DataError(
                f"{path}: has no pixel of segment id {numbers[absent][0]}, which image "
                f"{record.id} in {self._files.annotations.name} lists; expected every listed "
                f"segment: fetch the PNG and the JSON file of one release"
            )
        decoded = _Decoded(
            ids=ids,
            place=place,
            numbers=numbers,
            labels=self._index.labels[rows],
            crowd=self._index.crowd[rows],
        )
        self._last = index, decoded
        return decoded
