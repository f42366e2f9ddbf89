"""COCO panoptic: one JSON file and a PNG of segment ids an image; decoded only when asked for."""

import numpy as np

from knet_core.config import Task
from knet_core.data.images import SMALLEST_SIDE, check_size, no_image_left, open_image
from knet_core.data.listed_images import ListedImages
from knet_core.data.panoptic_index import PanopticIndex, map_folder, read_panoptic_index
from knet_core.data.paths import SplitFiles
from knet_core.data.segments import Segments, SegmentSource
from knet_core.data.source import places
from knet_core.errors import DataError


class CocoPanopticSource(ListedImages, SegmentSource):
    """One split of a COCO panoptic data set.

    Outside training the file may lack annotations (COCO's test-dev): its images then are void and
    can be predicted, not scored.

    Args:
        files: Where the split lies; the PNGs lie in the folder named like the JSON file.
        training: Drop images that cannot be learned from, and tiny ones.
        task: Instance shows things only. Training drops images without a thing that is not crowd;
            where the task is semantic, without any segment that is not crowd.

    Raises:
        DataError: The annotations cannot be used, or no image is left.
    """

    _index: PanopticIndex

    def __init__(self, files: SplitFiles, *, training: bool, task: Task) -> None:
        self._files = files
        self._index = index = read_panoptic_index(files, training=training)
        self.annotated = index.annotated
        super().__init__(index.categories, task)
        if not self.categories:
            raise DataError(
                f"{files.annotations}: none of its {len(index.categories)} categories is a thing; "
                f"expected some for model.task=instance: check isthing"
            )
        self._kept = np.arange(len(index.image_ids))
        if training:
            wanted = len(index.categories) if task == "semantic" else self._num_things
            counts = np.zeros(len(index.image_ids), dtype=np.int64)
            owners = np.repeat(self._kept, np.diff(index.first))
            np.add.at(counts, owners, (index.labels < wanted) & ~index.crowd)
            large = (index.sizes >= SMALLEST_SIDE).all(axis=1)
            self._kept = self._kept[(counts > 0) & large]
        if not len(self._kept):
            raise no_image_left(files, len(index.image_ids), training=training)

    def _read_segments(self, index: int) -> Segments:
        image, record = int(self._kept[index]), self.record(index)
        rows = self._index.segments(image)
        numbers = self._index.ids[rows]
        if not self.annotated:
            void = np.zeros((record.height, record.width), dtype=np.int32)
            return Segments(
                ids=void,
                place=void.astype(np.uint16),
                numbers=numbers,
                labels=self._index.labels[rows],
                crowd=self._index.crowd[rows],
            )
        path = map_folder(self._files) / self._index.map_names[image]
        with open_image(path) as picture:
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
        return Segments(
            ids=ids,
            place=place,
            numbers=numbers,
            labels=self._index.labels[rows],
            crowd=self._index.crowd[rows],
        )
