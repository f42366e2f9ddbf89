"""A COCO instance file as a few flat arrays, checked completely while it is read.

A parsed COCO file is millions of small Python objects, several gigabytes that every loader process
would copy. Here polygons become one array of numbers as they leave the JSON parser, and run
lengths one byte string, so that loader processes share them.

The rule for polygons: what crosses the border is clipped, as COCO's own tools do. A polygon is an
error if it lies outside its image by more than a pixel, or reaches further out than the image is
large: then it belongs to another image or another size.
"""

import contextlib
import itertools
from array import array
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_api

from knet_core.data.coco_json import (
    Problems,
    get,
    is_id,
    parse,
    read_categories,
    read_images,
    report_unknown,
)
from knet_core.data.paths import SplitFiles
from knet_core.data.source import Category

_ROUNDING = 1.0
"""Pixels by which a polygon may lie outside; annotation tools round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CocoIndex:
    """Images (I), annotations (A), polygons (R) and coordinates (P) of one file, in file order."""

    categories: tuple[Category, ...]
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
    points: NDArray[np.float64]
    """(P,) x, y, x, y, ..."""
    run_first: NDArray[np.int64]
    """(A + 1,) places in `runs`."""
    runs: bytes
    """COCO's compressed run lengths."""

    def annotations(self, image: int) -> NDArray[np.int64]:
        """Return the annotations of one image, in file order."""
        return self.order[self.first[image] : self.first[image + 1]]

    def polygons(self, annotation: int) -> list[list[float]]:
        """Return the polygons of one annotation; empty where it has run lengths."""
        start, stop = self.polygon_first[annotation : annotation + 2]
        bounds = self.point_first[start : stop + 1].tolist()
        return [self.points[a:b].tolist() for a, b in itertools.pairwise(bounds)]

    def rle(self, annotation: int, height: int, width: int) -> dict[str, Any]:
        """Return one annotation as compressed run lengths in pycocotools' form."""
        start, stop = self.run_first[annotation : annotation + 2]
        if start < stop:
            return {"size": [height, width], "counts": self.runs[start:stop]}
        parts = mask_api.frPyObjects(self.polygons(annotation), height, width)
        merged: dict[str, Any] = mask_api.merge(parts)
        return merged


def read_index(files: SplitFiles) -> CocoIndex:
    """Read and check one split.

    Raises:
        DataError: The file is not COCO instance JSON, or some of its entries cannot be used; one
            line for each problem.
    """
    document = parse(files.annotations, "instances", _compact)
    problems = Problems(files.annotations)
    categories = read_categories(document["categories"], problems, kinds=False)
    image_ids, file_names, sizes = read_images(document["images"], files, problems)
    reader = _Annotations(categories, image_ids, sizes, problems)
    columns = reader.read(document["annotations"])
    problems.raise_all()
    owners = columns.pop("owners")
    order = np.argsort(owners, kind="stable").astype(np.int64)
    return CocoIndex(
        categories=categories,
        image_ids=np.asarray(image_ids, dtype=np.int64),
        file_names=tuple(file_names),
        sizes=np.asarray(sizes, dtype=np.int32).reshape(-1, 2),
        order=order,
        first=np.searchsorted(owners[order], np.arange(len(image_ids) + 1)),
        **columns,
    )


class _Annotations:
    """Walks over a file's annotations once, collecting problems on the way."""

    def __init__(
        self,
        categories: tuple[Category, ...],
        image_ids: list[int],
        sizes: list[tuple[int, int]],
        problems: Problems,
    ) -> None:
        self._categories = categories
        self._image_ids = image_ids
        self._sizes = sizes
        self._problems = problems

    def read(self, entries: list[Any]) -> dict[str, Any]:
        """Return the columns of the index that hold one row per annotation, and `owners`."""
        place = {number: position for position, number in enumerate(self._image_ids)}
        label = {category.id: position for position, category in enumerate(self._categories)}
        owners, labels, crowd, areas = array("q"), array("q"), array("b"), array("d")
        polygon_first, point_first, run_first = array("q", [0]), array("q", [0]), array("q", [0])
        points, runs = array("d"), bytearray()
        names: list[object] = []
        unknown: dict[str, Counter[str]] = {"category": Counter(), "image": Counter()}
        for position, entry in enumerate(entries):
            name = get(entry, "id", f"at position {position}")
            image, category = get(entry, "image_id"), get(entry, "category_id")
            known_image = is_id(image) and image in place
            known_category = is_id(category) and category in label
            if not known_image:
                unknown["image"][repr(image)] += 1
            if not known_category:
                unknown["category"][repr(category)] += 1
            if not (known_image and known_category):
                continue
            segmentation = get(entry, "segmentation")
            height, width = self._sizes[place[image]]
            if isinstance(segmentation, tuple):
                wrong = _polygon_fault(segmentation)
            else:
                counts, wrong = _compress(segmentation, height, width)
            if wrong:
                self._problems.add(f"annotation {name}", wrong)
                continue
            if isinstance(segmentation, tuple):
                for polygon in segmentation:
                    points.extend(polygon)
                    point_first.append(len(points))
            else:
                runs += counts
            area = entry.get("area")
            names.append(name)
            owners.append(place[image])
            labels.append(label[category])
            crowd.append(bool(entry.get("iscrowd", 0)))
            areas.append(area if isinstance(area, int | float) else float("nan"))
            polygon_first.append(len(point_first) - 1)
            run_first.append(len(runs))
        for kind, counter in unknown.items():
            report_unknown(kind, counter, self._categories, self._problems)
        columns: dict[str, Any] = {
            "owners": np.array(owners, dtype=np.int64),
            "labels": np.array(labels, dtype=np.int64),
            "crowd": np.array(crowd, dtype=np.bool_),
            "areas": np.array(areas, dtype=np.float64),
            "polygon_first": np.array(polygon_first, dtype=np.int64),
            "point_first": np.array(point_first, dtype=np.int64),
            "points": np.array(points, dtype=np.float64),
            "run_first": np.array(run_first, dtype=np.int64),
            "runs": bytes(runs),
        }
        self._check_polygons(columns, names)
        return columns

    def _check_polygons(self, columns: dict[str, Any], names: list[object]) -> None:
        """Compare all polygons with their images at once."""
        if not len(columns["points"]):
            return
        starts = columns["point_first"][:-1] // 2
        points = columns["points"].reshape(-1, 2)
        low = np.minimum.reduceat(points, starts)
        high = np.maximum.reduceat(points, starts)
        annotations = np.repeat(np.arange(len(names)), np.diff(columns["polygon_first"]))
        extent = np.asarray(self._sizes, dtype=np.float64)[columns["owners"][annotations]][:, ::-1]
        inside = (
            (high >= -_ROUNDING)
            & (low <= extent + _ROUNDING)
            & (low >= -extent)
            & (high <= 2 * extent)
        )  # false for nan as well
        for bad in np.flatnonzero(~inside.all(axis=1)).tolist():
            annotation = int(annotations[bad])
            owner = int(columns["owners"][annotation])
            height, width = self._sizes[owner]
            self._problems.add(
                f"annotation {names[annotation]}",
                f"polygon outside its image {self._image_ids[owner]}: x from {low[bad, 0]:g} to "
                f"{high[bad, 0]:g}, y from {low[bad, 1]:g} to {high[bad, 1]:g}; expected x in "
                f"0..{width}, y in 0..{height}: correct the polygon or the image's size",
            )


def run_lengths(counts: bytes) -> NDArray[np.int64]:
    """Decode COCO's compressed run lengths (`rleFrString` of the COCO API).

    pycocotools checks nothing here: a damaged string decodes to memory it does not own.
    """
    codes = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    last = (codes & 0x20) == 0
    if not len(codes) or not last[-1]:
        return np.zeros(0, dtype=np.int64)
    ends = np.flatnonzero(last)
    starts = np.concatenate(([0], ends[:-1] + 1))
    shift = 5 * (np.arange(len(codes)) - np.repeat(starts, ends - starts + 1))
    values = np.add.reduceat((codes & 0x1F) << shift, starts)
    negative = (codes[ends] & 0x10) != 0
    values[negative] -= np.int64(1) << (shift[ends[negative]] + 5)
    # From the fourth on, each is the difference from the run before the last.
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def _compact(entry: dict[str, Any]) -> dict[str, Any]:
    """Turn a polygon list into flat arrays while the JSON is still being parsed."""
    polygons = entry.get("segmentation")
    if isinstance(polygons, list):
        # What cannot be converted stays a list, which the reader reports with its annotation.
        with contextlib.suppress(TypeError, OverflowError):
            entry["segmentation"] = tuple(array("d", polygon) for polygon in polygons)
    return entry


def _polygon_fault(polygons: tuple[Any, ...]) -> str | None:
    if not polygons:
        return "segmentation is empty; expected polygons or run lengths: draw it or remove it"
    # pycocotools silently takes four numbers for a box, so triangles are the least.
    for numbers in map(len, polygons):
        if numbers < 6 or numbers % 2:
            return f"polygon of {numbers} numbers; expected x, y pairs of at least 3 points"
    return None


def _compress(segmentation: Any, height: int, width: int) -> tuple[bytes, str | None]:
    """Return compressed run lengths, or what is wrong with them."""
    counts, size = get(segmentation, "counts"), get(segmentation, "size")
    if not isinstance(counts, str | list):
        return b"", "no usable segmentation; expected a list of polygons or {size, counts}"
    if size != [height, width]:
        return b"", f"run lengths of size {size}, expected the image's [{height}, {width}]"
    if isinstance(counts, str):
        compressed = counts.encode("ascii", errors="replace")
        lengths = run_lengths(compressed)
    elif all(is_id(count) for count in counts):
        lengths = np.array(counts, dtype=np.int64)
        compressed = b""
    else:
        return b"", "run lengths hold something other than whole numbers"
    if (lengths < 0).any() or lengths.sum() != height * width:
        return b"", (
            f"run lengths cover {lengths.sum()} pixels, expected {height} x {width} = "
            f"{height * width}: the mask is damaged or of another image"
        )
    if not compressed:
        compressed = mask_api.frPyObjects(segmentation, height, width)["counts"]
    return compressed, None
