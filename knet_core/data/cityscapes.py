"""Cityscapes as it is unpacked: photographs and maps of labels or instances, in a folder a city.

```
leftImg8bit/{train,val}/<city>/<name>_leftImg8bit.png
gtFine/{train,val}/<city>/<name>_gtFine_labelIds.png       semantic
gtFine/{train,val}/<city>/<name>_gtFine_instanceIds.png    instance and panoptic
```

Ids, their names and the 19 that count are those of cityscapesScripts (`helpers/labels.py`). An
instance map holds `1000 * id + number` for an object and the bare id elsewhere; the bare id of a
thing is a group that nobody separated, a crowd (as in its `createPanopticImgs.py`).
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from knet_core.config import Task
from knet_core.data.coco_json import Problems
from knet_core.data.found_images import FoundImages
from knet_core.data.images import check_size, no_image_left, open_image
from knet_core.data.paths import SplitFiles
from knet_core.data.segments import Segments, SegmentSource
from knet_core.data.source import IGNORED, Category, places
from knet_core.data.storage import Folders
from knet_core.errors import DataError

STUFF = {
    7: "road",
    8: "sidewalk",
    11: "building",
    12: "wall",
    13: "fence",
    17: "pole",
    19: "traffic light",
    20: "traffic sign",
    21: "vegetation",
    22: "terrain",
    23: "sky",
}
THINGS = {
    24: "person",
    25: "rider",
    26: "car",
    27: "truck",
    28: "bus",
    31: "train",
    32: "motorcycle",
    33: "bicycle",
}
_MOST_ID = 33
_PHOTOGRAPH = "_leftImg8bit.png"


class CityscapesSource(FoundImages, SegmentSource):
    """One split of Cityscapes; images sorted by city and name are numbered from 1.

    Of the semantic task, labels are the published train ids. No image is dropped in training: all
    are of one size, and whether one has objects is known only once its map is decoded.

    Args:
        files: Folders of the split's photographs and maps.
        training: For the message only.
        task: Instance shows the 8 kinds of things; panoptic 11 of stuff after them.

    Raises:
        DataError: A photograph has no map, or there are none; one line for each problem.
    """

    def __init__(self, files: SplitFiles, *, training: bool, task: Task) -> None:
        things = tuple(Category(*row, isthing=task != "semantic") for row in THINGS.items())
        stuff = tuple(Category(*row, isthing=False) for row in STUFF.items())
        # Things have the highest ids, so the order of ids is that of train ids.
        super().__init__(stuff + things if task == "semantic" else things + stuff, task)
        self._files = files
        self._ending = f"_gtFine_{'label' if task == 'semantic' else 'instance'}Ids.png"
        self._names = _pairs(files, self._ending)
        self._file_names = tuple(f"{name}{_PHOTOGRAPH}" for name in self._names)
        if not self._names:
            raise no_image_left(files, 0, training=training)
        self._label = np.full(256, -1, dtype=np.int64)
        for label, category in enumerate(self._all):
            self._label[category.id] = label

    def semantic(self, index: int) -> NDArray[np.uint8] | None:
        """Decode the label of every pixel (H0, W0), 255 for void and crowds.

        Raises:
            DataError: The map is damaged, of another size, or holds an unknown id.
        """
        if self._task != "semantic":
            return super().semantic(index)
        ids = self._map(index, largest=_MOST_ID)
        return np.where(self._label < 0, IGNORED, self._label).astype(np.uint8)[ids]

    def _read_segments(self, index: int) -> Segments:
        found = self._map(index, largest=1000 * _MOST_ID + 999)
        values = np.unique(found)
        single = values >= 1000
        labels = self._label[np.where(single, values // 1000, values)]
        counted = labels >= 0
        numbers, labels = values[counted], labels[counted]
        place = places(found, numbers)
        return Segments(
            ids=np.where(place > 0, found, 0).astype(np.int32),
            place=place,
            numbers=numbers,
            labels=labels,
            crowd=~single[counted] & (labels < self._num_things),
        )

    def _map(self, index: int, *, largest: int) -> NDArray[np.int32]:
        """Decode a map of ids (H0, W0), the class of each from 0 to 33; 255 becomes 0, void."""
        path = self._files.annotations / f"{self._names[index]}{self._ending}"
        with open_image(path) as picture:
            if picture.mode not in ("L", "P", "I", "I;16"):
                raise DataError(
                    f"{path}: pixels of mode {picture.mode}; expected whole numbers, as "
                    f"cityscapesScripts writes them: fetch or write it again"
                )
            ids = np.array(picture).astype(np.int32)
        check_size(path, ids, self.record(index), "its photograph")
        ids[ids == IGNORED] = 0
        classes = np.where(ids >= 1000, ids // 1000, ids)
        unknown = ids[(ids < 0) | (ids > largest) | (classes > _MOST_ID)]
        if len(unknown):
            raise DataError(
                f"{path}: holds id {unknown[0]}; expected classes 0 to {_MOST_ID}: fetch or write "
                f"it again"
            )
        return ids


def _pairs(files: SplitFiles, ending: str) -> tuple[str, ...]:
    """Return the photographs below the split's folder, `<city>/<name>`; every one has a map."""
    problems = Problems(files.images)
    folders = Folders([files.root, files.images, files.annotations])
    found = []
    for city in sorted(folders.list(files.images).names):
        photographs = folders.list(files.images / city)
        maps = folders.list(files.annotations / city)
        for name in sorted(photographs.names | photographs.outside):
            if not name.endswith(_PHOTOGRAPH):
                continue
            stem = name.removesuffix(_PHOTOGRAPH)
            wanted = files.annotations / city / f"{stem}{ending}"
            for link, listing in ((files.images / city / name, photographs), (wanted, maps)):
                if link.name in listing.outside:
                    problems.add(
                        f"image {stem}",
                        f"{link} is a link that points outside the data set {files.root}; copy "
                        f"the file",
                    )
            if wanted.name not in maps.names | maps.outside:
                problems.add(f"image {stem}", f"no map {wanted}; add it or remove the image")
            found.append(str(Path(city, stem)))
    problems.raise_all()
    return tuple(found)
