"""Compares the masks of one image of a COCO instance file with it and with each other."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_api

from knet_core.data.check_files import Entry, Mark
from knet_core.data.check_report import Notes
from knet_core.data.coco_annotations import run_lengths
from knet_core.data.coco_json import get, is_id, short

_ROUNDING = 1.0
"""Pixels by which a polygon may lie outside; annotation tools round."""
_AREA_SHARE, _AREA_PIXELS = 0.25, 5.0
"""By so much an object's stated area may differ: COCO's own, taken from polygons, do."""
_SAME_OBJECT = 0.8
"""IoU from which two objects are suspected to be one."""

Rle = dict[str, Any]
"""Compressed run lengths in pycocotools' form."""


class _FaultError(Exception):
    """A mask that cannot be used: code and message."""


def check_objects(entry: Entry, size: tuple[int, int], notes: Notes) -> None:
    """Check every annotation by itself, then against the others of the image."""
    found: list[tuple[Mark, Rle]] = []
    for mark in entry.marks:
        where = f"annotation {mark.id} of image {entry.id}"
        try:
            rle = _run_lengths(mark.segmentation, size)
        except _FaultError as fault:
            code, message = fault.args
            notes.add(code, mark.id, f"{where}: {message}")
            continue
        area = float(mask_api.area(rle))
        if isinstance(mark.segmentation, tuple):
            _check_border(mark, size, where, notes)
            if area < 1:
                notes.add("tiny-mask", mark.id, f"{where}: its polygons cover less than a pixel")
        elif area < 1:
            notes.add("empty-mask", mark.id, f"{where}: its run lengths hold no pixel")
        if not mark.iscrowd:
            _check_area(mark, area, where, notes)
        found.append((mark, rle))
    _check_overlaps(entry, found, notes)


def _run_lengths(segmentation: Any, size: tuple[int, int]) -> Rle:
    if segmentation is None or segmentation in ((), []):
        raise _FaultError("empty-mask", "segmentation is empty; draw it or remove it")
    if isinstance(segmentation, tuple):
        for polygon in segmentation:
            _check_polygon(np.asarray(polygon), size)
        parts = mask_api.frPyObjects([list(p) for p in segmentation], *size)
        merged: Rle = mask_api.merge(parts)
        return merged
    counts, stated = get(segmentation, "counts"), get(segmentation, "size")
    if not isinstance(counts, str | list):
        raise _FaultError(
            "bad-entry", "no usable segmentation; expected polygons or {size, counts}"
        )
    if stated != list(size):
        raise _FaultError(
            "size-mismatch", f"run lengths of size {short(stated)}, its image is {list(size)}"
        )
    if isinstance(counts, str):
        lengths = run_lengths(counts.encode("ascii", errors="replace")).tolist()
    else:
        lengths = counts
    if not all(is_id(length) and length >= 0 for length in lengths):
        raise _FaultError(
            "bad-rle", "run lengths hold something other than whole numbers from 0 on"
        )
    if sum(lengths) != size[0] * size[1]:
        raise _FaultError(
            "bad-rle",
            f"run lengths cover {sum(lengths)} pixels, its image has {size[0] * size[1]}",
        )
    if isinstance(counts, str):
        return {"size": list(size), "counts": counts.encode("ascii")}
    packed: Rle = mask_api.frPyObjects({"size": list(size), "counts": counts}, *size)
    return packed


def _check_polygon(values: NDArray[np.float64], size: tuple[int, int]) -> None:
    if len(values) < 6 or len(values) % 2:
        raise _FaultError(
            "bad-polygon",
            f"polygon of {len(values)} numbers; expected x, y pairs of at least 3 points",
        )
    if not np.isfinite(values).all():
        raise _FaultError("bad-polygon", "polygon with a coordinate that is not finite")
    points = values.reshape(-1, 2)
    low, high, extent = points.min(axis=0), points.max(axis=0), np.array(size[::-1])
    outside = (high < -_ROUNDING) | (low > extent + _ROUNDING)
    far = (low < -extent) | (high > 2 * extent)
    if (outside | far).any():
        raise _FaultError(
            "out-of-image", f"polygon {_range(low, high)} of an image of {_extent(size)}"
        )


def _check_border(mark: Mark, size: tuple[int, int], where: str, notes: Notes) -> None:
    points = np.concatenate([np.asarray(polygon) for polygon in mark.segmentation]).reshape(-1, 2)
    low, high = points.min(axis=0), points.max(axis=0)
    if (low < -_ROUNDING).any() or (high > np.array(size[::-1]) + _ROUNDING).any():
        notes.add(
            "clipped-mask",
            mark.id,
            f"{where}: polygon {_range(low, high)} crosses the border of {_extent(size)}",
        )


def _check_area(mark: Mark, area: float, where: str, notes: Notes) -> None:
    if mark.area is None:
        return
    allowed = max(_AREA_SHARE * max(mark.area, area), _AREA_PIXELS)
    if not abs(mark.area - area) <= allowed:  # also true for nan
        notes.add(
            "area-mismatch",
            mark.id,
            f"{where}: area {mark.area:g} is stated, its mask has {area:g} pixels",
        )


def _check_overlaps(entry: Entry, found: Sequence[tuple[Mark, Rle]], notes: Notes) -> None:
    """Compare all pairs of objects; crowds lie over objects by their nature."""
    objects = [(mark, rle) for mark, rle in found if not mark.iscrowd]
    rles = [rle for _, rle in objects]
    if len(rles) < 2:
        return
    overlaps = np.triu(mask_api.iou(rles, rles, [0] * len(rles)), k=1)
    for one, other in np.argwhere(overlaps >= _SAME_OBJECT).tolist():
        (first, first_rle), (second, second_rle) = objects[one], objects[other]
        pair = f"annotations {first.id} and {second.id} of image {entry.id}"
        if first.label == second.label and first_rle["counts"] == second_rle["counts"]:
            notes.add("duplicate-mask", second.id, f"{pair}: the same mask and category")
        else:
            notes.add("overlapping-masks", second.id, f"{pair}: IoU {overlaps[one, other]:.2f}")


def run_lengths_of(mark: Mark, size: tuple[int, int]) -> Rle:
    """Return the mask of one annotation.

    Raises:
        ValueError: It has no usable one.
    """
    try:
        return _run_lengths(mark.segmentation, size)
    except _FaultError as fault:
        raise ValueError(*fault.args) from None


def _range(low: NDArray[np.float64], high: NDArray[np.float64]) -> str:
    return f"from x {low[0]:g}, y {low[1]:g} to x {high[0]:g}, y {high[1]:g}"


def _extent(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]} pixels"
