"""Takes the annotations of a COCO instance file one by one, checks and packs them.

The rule for polygons: what crosses the border is clipped, as COCO's own tools do. A polygon is an
error if it lies outside its image by more than a pixel, or reaches further out than the image is
large: then it belongs to another image or another size.
"""

import itertools
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_api

from knet_core.data.coco_json import Problems, get, is_id, report_unknown, short
from knet_core.data.source import Category

_ROUNDING = 1.0
"""Pixels by which a polygon may lie outside; annotation tools round."""
_BLOCK = 2**17
"""Coordinates that are handled at once."""
_KINDS = (np.dtype(np.uint16), np.dtype(np.int32), np.dtype(np.float64))
"""Of packed coordinates: whole hundredths of a pixel, or pixels."""
_WIDTHS = np.array([kind.itemsize for kind in _KINDS])
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
        self._polygon_first, self._polygons = array("q", [0]), _Polygons()
        self._run_first, self._runs = array("q", [0]), bytearray()
        self._stated = array("q")
        """Row, height and width of every annotation with run lengths."""

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
        if isinstance(segmentation, list):
            wrong = self._add_polygons(segmentation)
        else:
            counts, height, width, wrong = _compress(segmentation)
            self._runs += counts
            self._stated.extend((len(self._ids), height, width))
        area = entry.get("area")
        self._ids.append(number)
        self._images.append(image)
        self._categories.append(category)
        self._crowd.append(bool(entry.get("iscrowd", 0)))
        self._areas.append(area if isinstance(area, float) or is_id(area) else float("nan"))
        self._polygon_first.append(len(self._polygons))
        self._run_first.append(len(self._runs))
        if wrong:
            self._problems.add(self._name(len(self._ids) - 1), wrong)

    def _add_polygons(self, polygons: list[Any]) -> str | None:
        if not polygons:
            return "segmentation is empty; expected polygons or run lengths: draw it or remove it"
        for polygon in polygons:
            try:
                self._polygons.add(polygon)
            except (TypeError, OverflowError):
                return "no usable segmentation; expected a list of polygons or {size, counts}"
            except ValueError:
                return (
                    f"polygon of {len(polygon)} numbers; expected x, y pairs of at least 3 points"
                )
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
            **self._polygons.columns(),
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
        stated = _numbers(self._stated, np.int64).reshape(-1, 3)
        stated = stated[(stated[:, 1] > 0) & (owners[stated[:, 0]] >= 0)]  # 0: noted already
        wrong = (stated[:, 1:] != sizes[owners[stated[:, 0]]]).any(axis=1)
        for row, *size in stated[wrong].tolist():
            self._problems.add(
                self._name(row),
                f"run lengths of size {size}, expected the image's {sizes[owners[row]].tolist()}",
            )

    def _check_polygons(
        self, columns: dict[str, Any], sizes: NDArray[np.int32], image_ids: Sequence[int]
    ) -> None:
        """Compare all polygons with their images, many at once."""
        annotations = np.repeat(np.arange(len(self._ids)), np.diff(columns["polygon_first"]))
        for start, low, high in self._polygons.bounds():
            mine = annotations[start : start + len(low)]
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


class _Polygons:
    """Packs polygons as they come, a block at a time, each into the smallest kind of number.

    Most files state hundredths of a pixel. Below 655.36 pixels, as in all of COCO's images, those
    take a quarter of the memory of floats; a number that fits no smaller kind widens its block
    alone.
    """

    def __init__(self) -> None:
        self._recent = array("d")
        self._lengths = array("q")
        self._blocks, self._kinds, self._packed = array("q", [0]), bytearray(), bytearray()
        """Polygons before each block, the place of its kind among `_KINDS`, and its numbers."""

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, numbers: list[Any]) -> None:
        """Append a polygon, or nothing and raise.

        Raises:
            TypeError: It does not consist of numbers.
            OverflowError: A number is too large.
            ValueError: They are no x, y pairs of at least 3 points.
        """
        before = len(self._recent)
        self._recent.fromlist(numbers)
        # pycocotools silently takes four numbers for a box, so triangles are the least.
        if len(numbers) < 6 or len(numbers) % 2:
            del self._recent[before:]
            raise ValueError
        self._lengths.append(len(numbers))
        if len(self._recent) >= _BLOCK:
            self._pack()

    def columns(self) -> dict[str, NDArray[Any]]:
        """Return the columns of the index that hold one row per polygon, and `points`."""
        self._pack()
        kinds = np.repeat(_numbers(self._kinds, np.uint8), np.diff(self._blocks))
        first = np.zeros(len(self) + 1, dtype=np.int64)
        np.cumsum(_numbers(self._lengths, np.int64) * _WIDTHS[kinds], out=first[1:])
        return {
            "point_first": first,
            "point_kinds": kinds,
            "points": _numbers(self._packed, np.uint8),
        }

    def bounds(self) -> Iterator[tuple[int, NDArray[np.float64], NDArray[np.float64]]]:
        """Yield the smallest and largest x, y of many polygons, (R, 2) each, in pixels.

        In front of them, how many polygons came before. All must be packed.
        """
        packed, place = _numbers(self._packed, np.uint8), 0
        for (start, stop), kind in zip(itertools.pairwise(self._blocks), self._kinds, strict=True):
            ends = np.cumsum(self._lengths[start:stop])
            size = int(ends[-1] * _WIDTHS[kind])
            pairs = pixels(packed[place : place + size], kind).reshape(-1, 2)
            starts = np.append(0, ends[:-1]) // 2
            yield start, np.minimum.reduceat(pairs, starts), np.maximum.reduceat(pairs, starts)
            place += size

    def _pack(self) -> None:
        if not self._recent:
            return
        recent = np.array(self._recent, dtype=np.float64)
        self._recent = array("d")
        hundredths = np.rint(recent * 100)
        exact = (hundredths / 100 == recent).all()
        low, high = hundredths.min(), hundredths.max()
        if exact and low >= 0 and high < 2**16:
            kind = 0
        elif exact and low >= -(2**31) and high < 2**31:
            kind = 1
        else:
            kind, hundredths = 2, recent
        self._packed += hundredths.astype(_KINDS[kind]).tobytes()
        self._kinds.append(kind)
        self._blocks.append(len(self))


def pixels(packed: NDArray[np.uint8], kind: int) -> NDArray[np.float64]:
    """Return coordinates of a kind in pixels.

    A hundredth divided is the very float that was read.
    """
    numbers = packed.view(_KINDS[kind])
    return numbers if numbers.dtype == np.float64 else numbers / 100


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
