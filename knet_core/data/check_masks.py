"""Looks at the pixels and masks of one image; runs in a pool of processes, loads no torch."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knet_core.config import DataFormat
from knet_core.data.check_files import Entry
from knet_core.data.check_objects import check_objects
from knet_core.data.check_report import Finding, Notes
from knet_core.data.images import SMALLEST_SIDE, open_image, read_image
from knet_core.data.source import IGNORED
from knet_core.errors import DataError

_MOST_SEGMENTS = 20
"""Strange segment ids that are listed for one map; a wrong PNG may hold thousands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What one image showed."""

    findings: tuple[Finding, ...]
    digest: bytes | None
    """Of the decoded pixels; None where there are none."""
    class_pixels: dict[int, int] = field(default_factory=dict)
    """Pixels of each label in a map of classes."""


def inspect(entry: Entry, num_categories: int, *, layout: DataFormat) -> Inspection:
    """Decode and compare everything that belongs to one image."""
    notes = Notes(entry.listed_in)
    pixels = _decoded(entry, notes)
    size = entry.size or (pixels.shape[:2] if pixels is not None else None)
    counts: dict[int, int] = {}
    if size is not None and min(size) < SMALLEST_SIDE:
        notes.add(
            "tiny-image",
            entry.id,
            f"image {entry.id} is {size[1]} x {size[0]} pixels",
            file=entry.path,
        )
    if layout == "coco" and size is not None:
        check_objects(entry, size, notes)
    elif layout == "coco_panoptic" and entry.map is not None:
        _check_segments(entry, entry.map, size, notes)
    elif layout == "ade20k" and entry.map is not None:
        counts = _check_classes(entry, entry.map, size, num_categories, notes)
    return Inspection(
        findings=tuple(notes.found),
        digest=None if pixels is None else digest(pixels),
        class_pixels=counts,
    )


def segment_ids(path: Path) -> NDArray[np.int32]:
    """Decode a panoptic PNG to segment ids (H0, W0); 0 is void.

    Raises:
        DataError: It is damaged or of another mode.
    """
    with open_image(path) as picture:
        if picture.mode != "RGB":
            raise DataError(f"{path}: pixels of mode {picture.mode}; expected RGB")
        red, green, blue = (np.asarray(band, dtype=np.int32) for band in picture.split())
    return red + 256 * green + 65536 * blue


def class_ids(path: Path) -> NDArray[np.uint8]:
    """Decode a map of category ids (H0, W0); 0 is unlabelled.

    Raises:
        DataError: It is damaged or of another mode.
    """
    with open_image(path) as picture:
        if picture.mode not in ("L", "P"):
            raise DataError(f"{path}: pixels of mode {picture.mode}; expected one byte a pixel")
        return np.array(picture)


def _decoded(entry: Entry, notes: Notes) -> NDArray[np.uint8] | None:
    if entry.path is None:
        return None
    try:
        pixels = read_image(entry.path)
    except DataError as error:
        _add_unreadable("unreadable-image", entry, entry.path, error, notes)
        return None
    if entry.size is not None and pixels.shape[:2] != entry.size:
        notes.add(
            "size-mismatch",
            entry.id,
            f"image {entry.id} is {pixels.shape[1]} x {pixels.shape[0]} pixels, but "
            f"{entry.listed_in.name} states {entry.size[1]} x {entry.size[0]}",
            file=entry.path,
        )
    return pixels


def digest(pixels: NDArray[np.uint8]) -> bytes:
    """Return what only the very same pixels (H0, W0, 3) give."""
    return hashlib.blake2b(pixels.tobytes(), key=str(pixels.shape).encode()).digest()


def _check_segments(entry: Entry, path: Path, size: tuple[int, int] | None, notes: Notes) -> None:
    """Compare a panoptic PNG with its list of segments, both ways."""
    try:
        ids = segment_ids(path)
    except DataError as error:
        _add_unreadable("unreadable-map", entry, path, error, notes)
        return
    _check_map_size(entry, path, ids, size, notes)
    numbers, counts = np.unique(ids, return_counts=True)
    drawn = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
    drawn.pop(0, None)
    listed = {mark.id for mark in entry.marks}
    strange = [number for number in drawn if number not in listed]
    for number in strange[:_MOST_SEGMENTS]:
        more = len(strange) - _MOST_SEGMENTS
        notes.add(
            "unlisted-segment",
            number,
            f"segment {number}, {drawn[number]} pixels in the PNG, is not in the segments_info of "
            f"image {entry.id}" + (f"; nor are {more} others" if more > 0 else ""),
            file=path,
        )
    for mark in entry.marks:
        area = drawn.get(int(mark.id))
        where = f"segment {mark.id} of image {entry.id}"
        if area is None:
            notes.add("absent-segment", mark.id, f"{where} has no pixel in the PNG", file=path)
        elif mark.area is not None and mark.area != area:
            notes.add(
                "area-mismatch",
                mark.id,
                f"{where}: area {mark.area:g} is stated, the PNG has {area} pixels",
                file=path,
            )


def _check_classes(
    entry: Entry, path: Path, size: tuple[int, int] | None, num_categories: int, notes: Notes
) -> dict[int, int]:
    """Compare a map of classes with their list; return the pixels of each label."""
    try:
        ids = class_ids(path)
    except DataError as error:
        _add_unreadable("unreadable-map", entry, path, error, notes)
        return {}
    _check_map_size(entry, path, ids, size, notes)
    counts = np.bincount(ids.ravel(), minlength=256)
    for number in np.flatnonzero(counts).tolist():
        if num_categories < number != IGNORED:
            notes.add(
                "unknown-category",
                entry.id,
                f"{counts[number]} pixels of image {entry.id} have category id {number}; expected "
                f"0 (unlabelled) to {num_categories}",
                file=path,
            )
    labels = range(min(num_categories, 254))
    return {label: int(counts[label + 1]) for label in labels if counts[label + 1]}


def _check_map_size(
    entry: Entry, path: Path, ids: NDArray[Any], size: tuple[int, int] | None, notes: Notes
) -> None:
    if size is not None and ids.shape != size:
        notes.add(
            "size-mismatch",
            entry.id,
            f"the map of image {entry.id} is {ids.shape[1]} x {ids.shape[0]} pixels, its image "
            f"{size[1]} x {size[0]}",
            file=path,
        )


def _add_unreadable(code: str, entry: Entry, path: Path, error: DataError, notes: Notes) -> None:
    text = str(error).removeprefix(f"{path}: ")
    notes.add(code, entry.id, f"image {entry.id}: {text}", file=path)
