"""Reads what a COCO file lists, tolerating everything: faults become findings, the rest is kept.

The loaders' own readers stop with an error instead; `check_data` asks them last, so that nothing
they refuse can pass here.
"""

import contextlib
import dataclasses
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knet_core.config import DataConfig
from knet_core.data.check_files import Entry, Listing, Mark, locate
from knet_core.data.check_report import Id, Notes
from knet_core.data.coco_json import get, is_id, repeated, short
from knet_core.data.json_stream import read_lists
from knet_core.data.paths import SplitFiles
from knet_core.data.source import MOST_PIXELS, Category
from knet_core.data.storage import Folders
from knet_core.errors import DataError

_MOST_SEGMENT = 256**3 - 1
"""The largest id that fits into a panoptic PNG; 0 is void."""


def list_coco(files: SplitFiles, config: DataConfig, notes: Notes) -> Listing | None:
    """List COCO instances; None where the file cannot be read at all."""
    rows: list[tuple[Id, Any, Any, Mark]] = []

    def take(position: int, entry: Any) -> None:
        number = get(entry, "id")
        name = number if is_id(number) else f"annotations[{position}]"
        if not isinstance(entry, dict):
            notes.add("bad-entry", name, f"{short(entry)} is no annotation")
            return
        mark = Mark(
            id=name,
            label=-1,
            iscrowd=bool(entry.get("iscrowd", 0)),
            area=_area(entry),
            segmentation=_compact(entry.get("segmentation")),
        )
        rows.append((name, entry.get("image_id"), entry.get("category_id"), mark))

    found = _read(files, "instances", take, notes)
    if found is None:
        return None
    categories = _categories(found.categories, notes, kinds=False)
    images = list(_images(found.images, files, notes))
    for number in repeated(name for name, *_ in rows if isinstance(name, int)):
        notes.add("duplicate-id", number, f"annotation id {number} is listed twice")
    known = {image.id for image in images}
    label = {category.id: position for position, category in enumerate(categories)}
    marks: defaultdict[Id, list[Mark]] = defaultdict(list)
    for name, image, category, mark in rows:
        if not is_id(image) or image not in known:
            notes.add(
                "unknown-image", name, f"annotation {name} is of image {short(image)}, not listed"
            )
            continue
        if not is_id(category) or category not in label:
            notes.add(
                "unknown-category",
                name,
                f"annotation {name} of image {image} has category id {short(category)}, which is "
                f"not listed",
            )
        position = label.get(category, -1) if is_id(category) else -1
        marks[image].append(dataclasses.replace(mark, label=position))
    return Listing(
        categories=categories,
        entries=tuple(
            Entry(
                id=image.id,
                path=image.path,
                size=image.size,
                listed_in=files.annotations,
                marks=tuple(marks.pop(image.id, ())),
            )
            for image in images
        ),
        annotated=found.annotated,
    )


def list_panoptic(files: SplitFiles, config: DataConfig, notes: Notes) -> Listing | None:
    """List COCO panoptic; None where the file cannot be read at all."""
    folder = files.annotations.with_suffix("")
    rows: list[tuple[Any, str, list[Any]]] = []

    def take(position: int, entry: Any) -> None:
        name, segments = get(entry, "file_name"), get(entry, "segments_info")
        if not (isinstance(name, str) and isinstance(segments, list)):
            notes.add(
                "bad-entry",
                f"annotations[{position}]",
                "no file_name or no segments_info; check that this is the panoptic file",
            )
            return
        rows.append((get(entry, "image_id"), name, segments))

    found = _read(files, "panoptic", take, notes)
    if found is None:
        return None
    categories = _categories(found.categories, notes, kinds=found.annotated)
    images = {image.id: image for image in _images(found.images, files, notes)}
    if not found.annotated:
        listed = tuple(
            Entry(id=image.id, path=image.path, size=image.size, listed_in=files.annotations)
            for image in images.values()
        )
        return Listing(categories=categories, entries=listed, annotated=False)
    if not folder.is_dir():
        notes.add("missing-files", None, f"no folder {folder} of the segments' PNGs")
    label = {category.id: position for position, category in enumerate(categories)}
    folders = Folders([files.root, folder])
    entries: dict[Id, Entry] = {}
    for number, name, segments in rows:
        if not is_id(number) or number not in images:
            notes.add(
                "unknown-image", short(number), f"{name} is of image {short(number)}, not listed"
            )
            continue
        if number in entries:
            notes.add("duplicate-id", number, f"image {number} is annotated twice")
            continue
        image = images[number]
        entries[number] = Entry(
            id=number,
            path=image.path,
            size=image.size,
            listed_in=files.annotations,
            marks=tuple(_segments(segments, number, label, notes)),
            map=locate(name, folder, files, folders, notes, number, "missing-map"),
        )
    return Listing(categories=categories, entries=tuple(entries.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Image:
    id: int
    path: Path | None
    size: tuple[int, int] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    images: list[Any]
    categories: list[Any]
    annotated: bool
    """Whether the file has a list of annotations."""


def _read(
    files: SplitFiles, kind: str, take: Callable[[int, Any], None], notes: Notes
) -> _File | None:
    """Return a COCO file's images and categories; its annotations are handed over."""
    images: list[Any] = []
    categories: list[Any] = []
    consumers = {
        "images": lambda _, entry: images.append(entry),
        "categories": lambda _, entry: categories.append(entry),
        "annotations": take,
    }
    try:
        missing = consumers.keys() - read_lists(files.annotations, kind, consumers)
    except DataError as error:
        text = str(error).removeprefix(f"{files.annotations}: ")
        notes.add("unreadable-annotations", None, text)
        return None
    annotated = "annotations" not in missing
    if not annotated and images:  # of a training split the loader refuses it
        missing -= {"annotations"}
        notes.add(
            "no-annotations",
            None,
            f"lists {len(images)} images and no annotations: knet eval --save-predictions "
            f"predicts them, nothing can be scored",
        )
    for name in sorted(missing):
        notes.add("unreadable-annotations", None, f"no list named {name!r}; expected COCO {kind}")
    return _File(images=images, categories=categories, annotated=annotated)


def _categories(entries: list[Any], notes: Notes, *, kinds: bool) -> tuple[Category, ...]:
    found: dict[int, Category] = {}
    for position, entry in enumerate(entries):
        number, name = get(entry, "id"), get(entry, "name")
        if not (is_id(number) and isinstance(name, str)):
            notes.add(
                "bad-entry",
                f"categories[{position}]",
                f"category {short(entry)} has no id or name",
            )
        elif number in found:
            notes.add("duplicate-id", number, f"category id {number} is listed twice")
        else:
            isthing = get(entry, "isthing") if kinds else 1
            if isthing not in (0, 1):
                notes.add(
                    "bad-entry",
                    number,
                    f"category {number}: isthing is {short(isthing)}; expected 1 or 0 (stuff)",
                )
            found[number] = Category(number, name, isthing != 0)
    return tuple(sorted(found.values(), key=lambda found: (not found.isthing, found.id)))


def _images(entries: list[Any], files: SplitFiles, notes: Notes) -> Iterator[_Image]:
    folders = Folders([files.root, files.images])
    seen: set[int] = set()
    for position, entry in enumerate(entries):
        number, name = get(entry, "id"), get(entry, "file_name")
        if not is_id(number):
            notes.add(
                "bad-entry", f"images[{position}]", f"image {short(entry)} has no integer id"
            )
            continue
        if number in seen:
            notes.add("duplicate-id", number, f"image id {number} is listed twice")
        seen.add(number)
        height, width = get(entry, "height"), get(entry, "width")
        stated = is_id(height) and is_id(width) and height > 0 and width > 0
        stated = stated and height * width <= MOST_PIXELS
        if not stated:
            notes.add(
                "bad-entry",
                number,
                f"image {number}: height {short(height)}, width {short(width)}; expected both > 0 "
                f"and at most {MOST_PIXELS} pixels",
            )
        path = None
        if isinstance(name, str):
            path = locate(name, files.images, files, folders, notes, number, "missing-image")
        else:
            notes.add("bad-entry", number, f"image {number} has no file_name")
        yield _Image(id=number, path=path, size=(height, width) if stated else None)


def _segments(
    segments: list[Any], image: int, label: dict[int, int], notes: Notes
) -> Iterator[Mark]:
    seen: set[int] = set()
    for segment in segments:
        number, category = get(segment, "id"), get(segment, "category_id")
        if not is_id(number) or not 0 < number <= _MOST_SEGMENT:
            notes.add(
                "bad-entry",
                number if is_id(number) else short(number),
                f"segment id {short(number)} of image {image}; expected 1 to {_MOST_SEGMENT}",
            )
            continue
        if number in seen:
            notes.add("duplicate-id", number, f"image {image} lists segment id {number} twice")
            continue
        seen.add(number)
        position = label.get(category, -1) if is_id(category) else -1
        if position < 0:
            notes.add(
                "unknown-category",
                number,
                f"segment {number} of image {image} has category id {short(category)}, which is "
                f"not listed",
            )
        iscrowd = bool(segment.get("iscrowd", 0))
        yield Mark(id=number, label=position, iscrowd=iscrowd, area=_area(segment))


def _area(entry: dict[str, Any]) -> float | None:
    area = entry.get("area")
    if isinstance(area, float):
        return area
    return float(area) if isinstance(area, int) and is_id(area) else None


def _compact(segmentation: Any) -> Any:
    """Return polygons as arrays, a tenth of the memory; anything else unchanged."""
    if isinstance(segmentation, list):
        with contextlib.suppress(TypeError, OverflowError):
            return tuple(array("d", polygon) for polygon in segmentation)
    return segmentation
