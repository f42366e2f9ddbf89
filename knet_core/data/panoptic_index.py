"""A COCO panoptic file as a few flat arrays, checked completely while it is read.

The masks lie in one PNG an image, in the folder named like the JSON file without its ending; here
it is only made sure that they exist.
"""

from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knet_core.data import index_cache
from knet_core.data.coco_json import (
    Problems,
    check_files,
    get,
    is_id,
    parse,
    read_categories,
    repeated,
    report_unknown,
    short,
)
from knet_core.data.paths import SplitFiles
from knet_core.data.source import Category
from knet_core.errors import DataError

_MOST_ID = 256**3 - 1
"""The largest id that fits into a PNG: R + 256 G + 65536 B; 0 is void."""
_MOST_SEGMENTS = 65534
"""Of one image; positions among them are 16-bit numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PanopticIndex:
    """Annotated images (I) and their segments (S), both in the order of the annotations.

    Of a file without annotations: all images.
    """

    categories: tuple[Category, ...]
    annotated: bool
    """False for a file of images without a list of annotations, as COCO's test-dev."""
    image_ids: NDArray[np.int64]
    file_names: tuple[str, ...]
    map_names: tuple[str, ...]
    """File names of the PNGs; none without annotations."""
    sizes: NDArray[np.int32]
    """(I, 2) height and width."""
    first: NDArray[np.int64]
    """(I + 1,) image i owns the segments `first[i]:first[i + 1]`."""
    ids: NDArray[np.int32]
    """(S,) what the segment's pixels hold."""
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]

    def segments(self, image: int) -> slice:
        """Return the places of one image's segments."""
        return slice(int(self.first[image]), int(self.first[image + 1]))


def read_panoptic_index(files: SplitFiles, *, training: bool = True) -> PanopticIndex:
    """Read and check one split; images that no annotation names are left out.

    Args:
        files: Where it lies.
        training: Refuse a file without a list of annotations.

    Raises:
        DataError: The file is not COCO panoptic JSON, or some of its entries cannot be used; one
            line for each problem.
    """
    problems = Problems(files.annotations)
    index = _kept(files)
    if index is not None and (index.annotated or not training):
        _check_all_files(index, files, problems)
        problems.raise_all()
        return index
    reader = _Annotations(problems)
    images, classes, annotated = parse(files.annotations, "panoptic", reader.add, needed=training)
    # COCO's test-dev file does not tell things from stuff.
    categories = read_categories(classes, problems, kinds=annotated)
    images.report(problems)
    columns = reader.columns(categories)
    place = {number: position for position, number in enumerate(images.ids)}
    unknown = Counter(str(number) for number in reader.image_ids if number not in place)
    report_unknown("image", unknown, categories, problems)
    for number in repeated(reader.image_ids):
        problems.add(f"image {number}", "annotated twice; expected one annotation an image")
    check_files(images.ids, images.names, files, problems)
    if annotated:
        _check_maps(reader.image_ids, reader.map_names, files, problems)
    problems.raise_all()
    numbers = reader.image_ids if annotated else images.ids
    owners = np.array([place[number] for number in numbers], dtype=np.int64)
    if not annotated:
        columns["first"] = np.zeros(len(images.ids) + 1, dtype=np.int64)
    index = PanopticIndex(
        categories=categories,
        annotated=annotated,
        image_ids=np.array(images.ids, dtype=np.int64)[owners],
        file_names=tuple(images.names[owner] for owner in owners),
        map_names=tuple(reader.map_names),
        sizes=images.sizes[owners],
        **columns,
    )
    _keep(files, index)
    return _kept(files) or index  # mapped: shared between processes


def map_folder(files: SplitFiles) -> Path:
    """Return where the PNGs lie: named like the JSON file."""
    return files.annotations.with_suffix("")


def _check_all_files(index: PanopticIndex, files: SplitFiles, problems: Problems) -> None:
    numbers = index.image_ids.tolist()
    check_files(numbers, index.file_names, files, problems)
    if index.annotated:
        _check_maps(numbers, index.map_names, files, problems)


def _check_maps(
    numbers: Iterable[int], names: Iterable[str], files: SplitFiles, problems: Problems
) -> None:
    folder = map_folder(files)
    if not folder.is_dir():
        raise DataError(
            f"{files.annotations}: no folder {folder}; expected the segments' PNGs there: unpack "
            f"them beside the JSON file"
        )
    check_files(numbers, names, files, problems, folder=folder)


_TEXT = ("categories", "annotated", "file_names", "map_names")


def _keep(files: SplitFiles, index: PanopticIndex) -> None:
    arrays = {
        name: getattr(index, name)
        for name in PanopticIndex.__dataclass_fields__
        if name not in _TEXT
    }
    rows = [(c.id, c.name, c.isthing) for c in index.categories]
    texts = [rows, index.annotated, index.file_names, index.map_names]
    index_cache.save(files.annotations, "panoptic", {**arrays, "text": index_cache.pack(texts)})


def _kept(files: SplitFiles) -> PanopticIndex | None:
    """Return the index that an earlier run kept, unless it is missing or damaged."""
    arrays = index_cache.load(files.annotations, "panoptic")
    try:
        if arrays is None:
            return None
        categories, annotated, file_names, map_names = index_cache.unpack(arrays.pop("text"))
        index = PanopticIndex(
            categories=tuple(Category(*row) for row in categories),
            annotated=annotated,
            file_names=tuple(file_names),
            map_names=tuple(map_names),
            **arrays,
        )
        images, segments = len(file_names), len(index.ids)
        whole = (
            index.sizes.shape == (images, 2)
            and index.image_ids.shape == (images,)
            and len(map_names) == (images if annotated else 0)
            and all(len(column) == segments for column in (index.labels, index.crowd))
            and index_cache.is_partition(index.first, images, segments)
        )
    except (KeyError, TypeError, ValueError):
        return None
    return index if whole else None


class _Annotations:
    """Takes a file's annotations one by one, collecting problems on the way."""

    def __init__(self, problems: Problems) -> None:
        self.image_ids = array("q")
        self.map_names: list[str] = []
        self._problems = problems
        self._first, self._ids, self._categories = array("q", [0]), array("q"), array("q")
        self._crowd = array("b")
        self._unknown: Counter[str] = Counter()

    def add(self, position: int, entry: Any) -> None:
        """Take the annotation of one image."""
        image, name = get(entry, "image_id"), get(entry, "file_name")
        segments = get(entry, "segments_info")
        if not (isinstance(segments, list) and isinstance(name, str) and is_id(image)):
            self._problems.add(
                f"annotations[{position}]",
                "expected an image_id, a file_name and segments_info; check that this is the "
                "panoptic file",
            )
            return
        self.image_ids.append(image)
        self.map_names.append(name)
        where = f"image {image}"
        numbers = []
        for segment in segments:
            number, category = get(segment, "id"), get(segment, "category_id")
            if not (is_id(number) and 0 < number <= _MOST_ID):
                self._problems.add(
                    where, f"segment id {short(number)}; expected 1 to {_MOST_ID} (0 is void)"
                )
            elif not is_id(category):
                self._unknown[short(category)] += 1
            else:
                numbers.append(number)
                self._categories.append(category)
                self._crowd.append(bool(segment.get("iscrowd", 0)))
        for number in repeated(numbers):
            self._problems.add(
                where, f"segment id {number} listed twice; give every segment its own"
            )
        if len(numbers) > _MOST_SEGMENTS:
            self._problems.add(
                where, f"{len(numbers)} segments; expected at most {_MOST_SEGMENTS}"
            )
        self._ids.extend(array("q", numbers))
        self._first.append(len(self._ids))

    def columns(self, categories: tuple[Category, ...]) -> dict[str, Any]:
        """Return the columns of the index that hold one row per segment, and `first`."""
        label = {category.id: position for position, category in enumerate(categories)}
        self._unknown.update(str(number) for number in self._categories if number not in label)
        report_unknown("category", self._unknown, categories, self._problems)
        labels = [label.get(number, 0) for number in self._categories]
        return {
            "first": np.array(self._first, dtype=np.int64),
            "ids": np.array(self._ids, dtype=np.int32),
            "labels": np.array(labels, dtype=np.int64),
            "crowd": np.array(self._crowd, dtype=np.bool_),
        }
