"""Takes the annotations of a COCO instance file one by one, checks and packs them.

The rule for polygons: what crosses the border is clipped, as COCO's own tools do. A polygon is an
error if it lies outside its image by more than a pixel, or reaches further out than the image is
large: then it belongs to another image or another size.
"""

from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_api

from knet_core.data.coco_json import Problems, get, is_id, report_unknown, short
from knet_core.data.source import Category

_ROUNDING = 1.0
"""Pixels by which a polygon may lie outside; annotation tools round."""
_BLOCK = 2**17
"""Coordinates or polygons that are handled at once."""
_MOST_RUN = 2**32 - 1
"""pycocotools' run lengths have 32 bits."""


class Annotations:
    """Takes a file's annotations one by one, collecting problems on the way.

    The lists of images and categories may stand behind them in the file, so what is compared with
    those waits for `columns`.
    """

    def __init__(self, problems: Problems) -> None:
        self._problems = problems
        self._names: dict[int, str] = {}
        """Of the rows whose id is no number."""
        self._unknown: dict[str, Counter[str]] = {"category": Counter(), "image": Counter()}
        self._ids, self._images, self._categories = array("q"), array("q"), array("q")
        self._crowd, self._areas = array("b"), array("d")
        self._polygon_first, self._point_first = array("q", [0]), array("q", [0])
        self._points = _Coordinates()
        self._run_first, self._runs = array("q", [0]), bytearray()
        self._heights, self._widths = array("q"), array("q")
        """As run lengths state them; 0 for polygons."""

    def add(self, position: int, entry: Any) -> None:
        """Take one annotation."""
        image, category = get(entry, "image_id"), get(entry, "category_id")
        if not (is_id(image) and is_id(category)):
            for kind, value in (("image", image), ("category", category)):
                if not is_id(value):
                    self._unknown[kind][short(value)] += 1
            return
        number = entry.get("id")
        if not is_id(number):
            self._names[len(self._ids)] = short(number) if "id" in entry else f"at {position}"
            number = 0
        segmentation = entry.get("segmentation")
        height = width = 0
        if isinstance(segmentation, list):
            wrong = self._add_polygons(segmentation)
        else:
            counts, height, width, wrong = _compress(segmentation)
            self._runs += counts
        area = entry.get("area")
        self._ids.append(number)
        self._images.append(image)
        self._categories.append(category)
        self._crowd.append(bool(entry.get("iscrowd", 0)))
        self._areas.append(area if isinstance(area, float) or is_id(area) else float("nan"))
        self._polygon_first.append(len(self._point_first) - 1)
        self._run_first.append(len(self._runs))
        self._heights.append(height)
        self._widths.append(width)
        if wrong:
            self._problems.add(self._name(len(self._ids) - 1), wrong)

    def _add_polygons(self, polygons: list[Any]) -> str | None:
        if not polygons:
            return "segmentation is empty; expected polygons or run lengths: draw it or remove it"
        for polygon in polygons:
            try:
                self._points.add(polygon)
            except (TypeError, OverflowError):
                return "no usable segmentation; expected a list of polygons or {size, counts}"
            # pycocotools silently takes four numbers for a box, so triangles are the least.
            if len(polygon) < 6 or len(polygon) % 2:
                self._points.cut(self._point_first[-1])
                return (
                    f"polygon of {len(polygon)} numbers; expected x, y pairs of at least 3 points"
                )
            self._point_first.append(self._point_first[-1] + len(polygon))
        return None

    def columns(
        self,
        categories: tuple[Category, ...],
        image_ids: Sequence[int],
        sizes: NDArray[np.int32],
    ) -> dict[str, Any]:
        """Return the columns of the index that hold one row per annotation, and `owners`."""
        owners = self._places("image", self._images, image_ids)
        labels = self._places("category", self._categories, [c.id for c in categories])
        for kind, counter in self._unknown.items():
            report_unknown(kind, counter, categories, self._problems)
        columns: dict[str, Any] = {
            "owners": owners,
            "labels": labels,
            "crowd": _numbers(self._crowd, np.int8).astype(np.bool_),
            "areas": _numbers(self._areas, np.float64),
            "polygon_first": _numbers(self._polygon_first, np.int64),
            "point_first": _numbers(self._point_first, np.int64),
            "points": self._points.all(),
            "run_first": _numbers(self._run_first, np.int64),
            "runs": _numbers(self._runs, np.uint8),
        }
        self._check_run_lengths(owners, sizes)
        self._check_polygons(columns, sizes, image_ids)
        return columns

    def _places(self, kind: str, column: "array[int]", ids: Sequence[int]) -> NDArray[np.int64]:
        """Return the position of every id in `ids`; -1, and noted, where it is not there."""
        wanted, known = _numbers(column, np.int64), np.asarray(ids, dtype=np.int64)
        if not len(known):
            found = np.full(len(wanted), -1, dtype=np.int64)
        else:
            order = np.argsort(known, kind="stable")
            place = order[np.searchsorted(known[order], wanted).clip(max=len(known) - 1)]
            found = np.where(known[place] == wanted, place, -1)
        values, times = np.unique(wanted[found < 0], return_counts=True)
        for value, count in zip(values.tolist(), times.tolist(), strict=True):
            self._unknown[kind][repr(value)] += count
        return found

    def _check_run_lengths(self, owners: NDArray[np.int64], sizes: NDArray[np.int32]) -> None:
        heights, widths = _numbers(self._heights, np.int64), _numbers(self._widths, np.int64)
        rows = np.flatnonzero((heights > 0) & (owners >= 0))
        stated = np.stack([heights[rows], widths[rows]], axis=1)
        for row in rows[(stated != sizes[owners[rows]]).any(axis=1)].tolist():
            height, width = sizes[owners[row]].tolist()
            self._problems.add(
                self._name(row),
                f"run lengths of size [{heights[row]}, {widths[row]}], expected the image's "
                f"[{height}, {width}]",
            )

    def _check_polygons(
        self, columns: dict[str, Any], sizes: NDArray[np.int32], image_ids: Sequence[int]
    ) -> None:
        """Compare all polygons with their images, many at once."""
        annotations = np.repeat(np.arange(len(self._ids)), np.diff(columns["polygon_first"]))
        for start in range(0, len(annotations), _BLOCK):
            mine = annotations[start : start + _BLOCK]
            first = columns["point_first"][start : start + len(mine) + 1]
            low, high = _bounds(columns["points"][first[0] : first[-1]], first - first[0])
            owners = columns["owners"][mine]
            extent = sizes[owners][:, ::-1] if len(sizes) else np.zeros_like(low)
            inside = (
                (high >= -_ROUNDING)
                & (low <= extent + _ROUNDING)
                & (low >= -extent)
                & (high <= 2 * extent)
            )  # false for nan as well
            for bad in np.flatnonzero((owners >= 0) & ~inside.all(axis=1)).tolist():
                height, width = sizes[owners[bad]].tolist()
                self._problems.add(
                    self._name(int(mine[bad])),
                    f"polygon outside its image {image_ids[owners[bad]]}: x from {low[bad, 0]:g} "
                    f"to {high[bad, 0]:g}, y from {low[bad, 1]:g} to {high[bad, 1]:g}; expected x "
                    f"in 0..{width}, y in 0..{height}: correct the polygon or the image's size",
                )

    def _name(self, row: int) -> str:
        return f"annotation {self._names.get(row, self._ids[row])}"


class _Coordinates:
    """Numbers as they come; most files state hundredths, which take half the memory of floats."""

    def __init__(self) -> None:
        self._recent = array("d")
        self._whole: array[int] | None = array("i")
        self._floats = array("d")

    def add(self, numbers: list[Any]) -> None:
        """Append numbers, or nothing and raise.

        Raises:
            TypeError: They are none.
            OverflowError: One is too large.
        """
        self._recent.fromlist(numbers)
        if len(self._recent) >= _BLOCK:
            self._settle()

    def cut(self, length: int) -> None:
        """Keep the first `length` numbers."""
        self._settle()
        del (self._floats if self._whole is None else self._whole)[length:]

    def all(self) -> NDArray[np.int32] | NDArray[np.float64]:
        """Return hundredths as whole numbers where all are, else floats."""
        self._settle()
        if self._whole is None:
            return _numbers(self._floats, np.float64)
        return _numbers(self._whole, np.int32)

    def _settle(self) -> None:
        recent = np.array(self._recent, dtype=np.float64)
        self._recent = array("d")
        if self._whole is not None:
            hundredths = np.rint(recent * 100)
            if (hundredths / 100 == recent).all() and (np.abs(hundredths) < 2**31).all():
                self._whole.frombytes(hundredths.astype(np.int32).tobytes())
                return
            self._floats.frombytes(pixels(_numbers(self._whole, np.int32)).tobytes())
            self._whole = None
        self._floats.frombytes(recent.tobytes())


def pixels(points: NDArray[Any]) -> NDArray[np.float64]:
    """Return coordinates in pixels; a hundredth divided is the very float that was read."""
    return points if points.dtype == np.float64 else points / 100


def _bounds(
    points: NDArray[Any], first: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the smallest and largest x, y of every polygon, (R, 2) each, in pixels."""
    pairs, starts = points.reshape(-1, 2), first[:-1] // 2
    return tuple(  # type: ignore[return-value]
        pixels(extreme.reduceat(pairs, starts)) for extreme in (np.minimum, np.maximum)
    )


def run_lengths(counts: bytes) -> NDArray[np.int64]:
    """Decode COCO's compressed run lengths (`rleFrString` of the COCO API).

    pycocotools checks nothing here: a damaged string decodes to memory it does not own. Such a
    string has no run here.
    """
    codes = np.frombuffer(counts, dtype=np.uint8).astype(np.int64) - 48
    last = (codes & 0x20) == 0
    if not len(codes) or not last[-1] or codes.min() < 0 or codes.max() > 63:
        return np.zeros(0, dtype=np.int64)
    ends = np.flatnonzero(last)
    starts = np.concatenate(([0], ends[:-1] + 1))
    shift = 5 * (np.arange(len(codes)) - np.repeat(starts, ends - starts + 1))
    if shift.max() > 30:  # no run of an image is so long
        return np.zeros(0, dtype=np.int64)
    values = np.add.reduceat((codes & 0x1F) << shift, starts)
    negative = (codes[ends] & 0x10) != 0
    values[negative] -= np.int64(1) << (shift[ends[negative]] + 5)
    # From the fourth on, each is the difference from the run before the last.
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def _numbers(column: "array[Any] | bytearray", kind: type[np.generic]) -> NDArray[Any]:
    """Return a view of an array's numbers."""
    return np.frombuffer(column, dtype=kind) if len(column) else np.zeros(0, dtype=kind)


def _compress(segmentation: Any) -> tuple[bytes, int, int, str | None]:
    """Return compressed run lengths, their height and width, and what is wrong with them."""
    counts, size = get(segmentation, "counts"), get(segmentation, "size")
    if not isinstance(counts, str | list):
        return b"", 0, 0, "no usable segmentation; expected a list of polygons or {size, counts}"
    if not (
        isinstance(size, list)
        and len(size) == 2
        and all(is_id(side) and 0 < side <= _MOST_RUN for side in size)
    ):
        return (
            b"",
            0,
            0,
            f"run lengths of size {short(size)}, expected the image's height and width",
        )
    height, width = size
    if isinstance(counts, str):
        compressed = counts.encode("ascii", errors="replace")
        lengths = run_lengths(compressed)
        # As floats: a sum of wrong lengths may not fit into 64 bits.
        total = float(lengths.sum(dtype=np.float64))
        positive = not (lengths < 0).any()
    elif all(is_id(count) for count in counts):
        compressed, total = b"", sum(counts)
        positive = all(count >= 0 for count in counts)
    else:
        return b"", 0, 0, "run lengths hold something other than whole numbers"
    if not positive or total != height * width or total > _MOST_RUN:
        return (
            b"",
            0,
            0,
            (
                f"run lengths cover {total:.0f} pixels, expected {height} x {width} = "
                f"{height * width}: the mask is damaged or of another image"
            ),
        )
    if not compressed:
        compressed = mask_api.frPyObjects(segmentation, height, width)["counts"]
    return compressed, height, width, None
