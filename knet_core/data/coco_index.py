"""A COCO instance file as a few flat arrays, checked completely while it is read.

A parsed COCO file is millions of small Python objects, several gigabytes that every loader process
would copy. Here polygons become one array of numbers as they leave the JSON parser, and run
lengths another. Of a large file the arrays are kept and mapped into memory (`index_cache`), so
that loader processes share them and the next start parses nothing.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_api

from knet_core.data import index_cache
from knet_core.data.coco_annotations import Annotations, pixels
from knet_core.data.coco_json import Problems, check_files, parse, read_categories
from knet_core.data.paths import SplitFiles
from knet_core.data.source import Category


@dataclass(frozen=True, slots=True, kw_only=True)
class CocoIndex:
    """Images (I), annotations (A), polygons (R) and their bytes (P) of one file, in file order."""

    categories: tuple[Category, ...]
    annotated: bool
    """False for a file of images without a list of annotations, as COCO's test-dev."""
    image_ids: NDArray[np.int64]
    file_names: tuple[str, ...]
    sizes: NDArray[np.int32]
    """(I, 2) height and width."""
    order: NDArray[np.int64]
    """(A,) annotations grouped by image."""
    first: NDArray[np.int64]
    """(I + 1,) image i owns `order[first[i]:first[i + 1]]`."""
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    areas: NDArray[np.float64]
    """As the file states them; nan where it does not."""
    polygon_first: NDArray[np.int64]
    """(A + 1,) annotation a owns polygons `polygon_first[a]` up to the next; none means RLE."""
    point_first: NDArray[np.int64]
    """(R + 1,) places in `points`."""
    point_kinds: NDArray[np.uint8]
    """(R,) what kind of number each polygon consists of; see `pixels`."""
    points: NDArray[np.uint8]
    """(P,) bytes of x, y, x, y, ..."""
    run_first: NDArray[np.int64]
    """(A + 1,) places in `runs`."""
    runs: NDArray[np.uint8]
    """COCO's compressed run lengths."""

    def annotations(self, image: int) -> NDArray[np.int64]:
        """Return the annotations of one image, in file order."""
        return self.order[self.first[image] : self.first[image + 1]]

    def polygons(self, annotation: int) -> list[list[float]]:
        """Return the polygons of one annotation; empty where it has run lengths."""
        start, stop = self.polygon_first[annotation : annotation + 2]
        bounds = itertools.pairwise(self.point_first[start : stop + 1].tolist())
        kinds = self.point_kinds[start:stop].tolist()
        return [
            pixels(self.points[a:b], kind).tolist()
            for (a, b), kind in zip(bounds, kinds, strict=True)
        ]

    def rle(self, annotation: int, height: int, width: int) -> dict[str, Any]:
        """Return one annotation as compressed run lengths in pycocotools' form."""
        start, stop = self.run_first[annotation : annotation + 2]
        if start < stop:
            return {"size": [height, width], "counts": self.runs[start:stop].tobytes()}
        parts = mask_api.frPyObjects(self.polygons(annotation), height, width)
        merged: dict[str, Any] = mask_api.merge(parts)
        return merged


def read_index(files: SplitFiles, *, training: bool = True) -> CocoIndex:
    """Read and check one split.

    Args:
        files: Where it lies.
        training: Refuse a file without a list of annotations.

    Raises:
        DataError: The file is not COCO instance JSON, or some of its entries cannot be used; one
            line for each problem.
    """
    problems = Problems(files.annotations)
    index = _kept(files)
    if index is not None and (index.annotated or not training):
        check_files(index.image_ids.tolist(), index.file_names, files, problems)
        problems.raise_all()
        return index
    reader = Annotations(problems)
    images, classes, annotated = parse(files.annotations, "instances", reader.add, needed=training)
    categories = read_categories(classes, problems, kinds=False)
    images.report(problems)
    check_files(images.ids, images.names, files, problems)
    columns = reader.columns(categories, images.ids, images.sizes)
    problems.raise_all()
    owners = columns.pop("owners")
    order = np.argsort(owners, kind="stable").astype(np.int64)
    index = CocoIndex(
        categories=categories,
        annotated=annotated,
        image_ids=np.array(images.ids, dtype=np.int64),
        file_names=tuple(images.names),
        sizes=images.sizes,
        order=order,
        first=np.searchsorted(owners[order], np.arange(len(images.ids) + 1)),
        **columns,
    )
    _keep(files, index)
    return _kept(files) or index  # mapped: shared between processes


_TEXT = ("categories", "annotated", "file_names")


def _keep(files: SplitFiles, index: CocoIndex) -> None:
    arrays = {
        name: getattr(index, name) for name in CocoIndex.__dataclass_fields__ if name not in _TEXT
    }
    rows = [(category.id, category.name) for category in index.categories]
    arrays["text"] = index_cache.pack([rows, index.annotated, index.file_names])
    index_cache.save(files.annotations, "instances", arrays)


def _kept(files: SplitFiles) -> CocoIndex | None:
    """Return the index that an earlier run kept, unless it is missing or damaged."""
    arrays = index_cache.load(files.annotations, "instances")
    try:
        if arrays is None:
            return None
        categories, annotated, file_names = index_cache.unpack(arrays.pop("text"))
        index = CocoIndex(
            categories=tuple(Category(number, name) for number, name in categories),
            annotated=annotated,
            file_names=tuple(file_names),
            **arrays,
        )
        images, rows, polygons = len(file_names), len(index.order), len(index.point_first) - 1
        whole = (
            index.sizes.shape == (images, 2)
            and index.image_ids.shape == (images,)
            and all(len(c) == rows for c in (index.labels, index.crowd, index.areas))
            and index_cache.is_partition(index.first, images, rows)
            and index_cache.is_partition(index.polygon_first, rows, polygons)
            and index.point_kinds.shape == (polygons,)
            and index_cache.is_partition(index.point_first, polygons, len(index.points))
            and index_cache.is_partition(index.run_first, rows, len(index.runs))
        )
    except (KeyError, TypeError, ValueError):
        return None
    return index if whole else None
