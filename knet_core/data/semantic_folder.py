"""ADE20K's layout: a folder of images and one of label maps with the same names.

A map's pixels hold category ids from 1 on; 0 is unlabelled, and so is 255, as in the published
loader.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knet_core.config import DataConfig
from knet_core.data.coco_json import Problems
from knet_core.data.found_images import FoundImages
from knet_core.data.images import check_size, open_image
from knet_core.data.paths import CLASSES_FILE, SplitFiles
from knet_core.data.source import IGNORED, MOST_LABELS, Category, PanopticTruth
from knet_core.data.storage import Folders
from knet_core.errors import DataError

_IMAGE_ENDINGS = {".jpg", ".jpeg", ".png"}


class SemanticFolderSource(FoundImages):
    """One split of a set in ADE20K's layout; images sorted by name are numbered from 1.

    Args:
        files: The split's two folders.
        config: Its `classes`.

    Raises:
        DataError: The classes have no names, an image has no label map or a map no image, or there
            are none; one line for each problem.
    """

    def __init__(self, files: SplitFiles, config: DataConfig) -> None:
        self._files = files
        names = config.classes or _read_names(files.root / CLASSES_FILE)
        self.categories = tuple(
            Category(number, name, isthing=False) for number, name in enumerate(names, start=1)
        )
        self._file_names = _pairs(files)

    def objects(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Return nothing: the layout knows no objects."""
        record = self.record(index)
        masks = np.zeros((0, record.height, record.width), dtype=np.uint8)
        return np.zeros(0, dtype=np.int64), masks

    def semantic(self, index: int) -> NDArray[np.uint8]:
        """Decode the label of every pixel (H0, W0), 255 where there is none.

        Raises:
            DataError: The map is damaged, of another size, or holds an id without a category.
        """
        path = (self._files.annotations / self._file_names[index]).with_suffix(".png")
        with open_image(path) as picture:
            if picture.mode not in ("L", "P"):
                raise DataError(
                    f"{path}: pixels of mode {picture.mode}; expected one byte a pixel, the "
                    f"category id: convert it"
                )
            ids = np.array(picture)
        check_size(path, ids, self.record(index), "its photograph")
        count = len(self.categories)
        unknown = ids[(ids > count) & (ids != IGNORED)]
        if len(unknown):
            raise DataError(
                f"{path}: holds category id {unknown[0]}; expected 0 (unlabelled) to {count}: "
                f"name every class in data.classes or correct the map"
            )
        ids[ids == IGNORED] = 0
        return ids - np.uint8(1)  # 0 becomes 255

    def panoptic(self, index: int) -> PanopticTruth:
        """Refuse: the layout knows no segments.

        Raises:
            DataError: Always.
        """
        raise DataError(
            f"{self._files.annotations}: holds classes of pixels, no panoptic segments; expected "
            f"data.format=coco_panoptic with a panoptic JSON file"
        )

    def ground_truth(self) -> dict[str, Any]:
        """Refuse: the layout knows no objects.

        Raises:
            DataError: Always.
        """
        raise DataError(
            f"{self._files.annotations}: holds classes of pixels, no instances; expected "
            f"data.format=coco with an instance JSON file"
        )


def _read_names(path: Path) -> tuple[str, ...]:
    if not path.is_file():
        raise DataError(
            f"data.classes: no names, and no file {path}; expected the names of categories "
            f"1, 2, ...: list them in data.classes or, one a line, in that file"
        )
    names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    if not names or not all(names) or len(names) > MOST_LABELS:
        raise DataError(
            f"{path}: {len(names)} lines, {names.count('')} of them empty; expected 1 to "
            f"{MOST_LABELS} names, one a line: correct it or set data.classes"
        )
    return names


def _pairs(files: SplitFiles) -> tuple[str, ...]:
    """Return the images' names, sorted; every one has a map."""
    problems = Problems(files.images)
    folders = Folders([files.root, files.images, files.annotations])
    images, maps = folders.list(files.images), folders.list(files.annotations)
    for folder, listing in ((files.images, images), (files.annotations, maps)):
        for name in sorted(listing.outside):
            problems.add(
                f"image {Path(name).stem}",
                f"{folder / name} is a link that points outside the data set {files.root}; copy "
                f"the file",
            )
    found = sorted(
        name
        for name in images.names | images.outside
        if Path(name).suffix.lower() in _IMAGE_ENDINGS
    )
    there = {name for name in maps.names | maps.outside if name.endswith(".png")}
    expected = {str(Path(name).with_suffix(".png")) for name in found}
    for name in sorted(expected - there):
        problems.add(
            f"image {Path(name).stem}",
            f"no label map {files.annotations / name}; add it or remove the image",
        )
    for name in sorted(there - expected):
        problems.add(
            f"label map {files.annotations / name}", "no image of that name; add or remove one"
        )
    if len(expected) < len(found):
        problems.add("images", "two of one name and different endings; keep one of them")
    if not found:
        problems.add(
            "images", f"none; expected files ending in {', '.join(sorted(_IMAGE_ENDINGS))}"
        )
    problems.raise_all()
    return tuple(found)
