"""A COCO panoptic file as a few flat arrays, checked completely while it is read.

The masks lie in one PNG an image, in the folder named like the JSON file without its ending; here
it is only made sure that they exist.
"""

from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knet_core.data.coco_json import (
    Problems,
    get,
    is_id,
    list_files,
    parse,
    read_categories,
    read_images,
    repeated,
    report_unknown,
)
from knet_core.data.paths import SplitFiles
from knet_core.data.source import Category
from knet_core.errors import DataError

_MOST_ID = 256**3 - 1
"""The largest id that fits into a PNG: R + 256 G + 65536 B; 0 is void."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PanopticIndex:
    """Annotated images (I) and their segments (S), both in the order of the annotations."""

    categories: tuple[Category, ...]
    folder: Path
    """Of the PNGs."""
    image_ids: NDArray[np.int64]
    file_names: tuple[str, ...]
    map_names: tuple[str, ...]
    """File names of the PNGs."""
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


def read_panoptic_index(files: SplitFiles) -> PanopticIndex:
    """Read and check one split; images that no annotation names are left out.

    Raises:
        DataError: The file is not COCO panoptic JSON, or some of its entries cannot be used; one
            line for each problem.
    """
    folder = files.annotations.with_suffix("")
    if not folder.is_dir():
        raise DataError(
            f"{files.annotations}: no folder {folder}; expected the segments' PNGs there: unpack "
            f"them beside the JSON file"
        )
    document = parse(files.annotations, "panoptic", _compact)
    problems = Problems(files.annotations)
    categories = read_categories(document["categories"], problems, kinds=True)
    image_ids, file_names, sizes = read_images(document["images"], files, problems)
    place = {number: position for position, number in enumerate(image_ids)}
    annotations = _known_images(document["annotations"], place, categories, problems)
    _check_maps(annotations, folder, problems)
    columns = _segments(annotations, categories, problems)
    problems.raise_all()
    owners = [place[entry["image_id"]] for entry in annotations]
    return PanopticIndex(
        categories=categories,
        folder=folder,
        image_ids=np.asarray(image_ids, dtype=np.int64)[owners],
        file_names=tuple(file_names[owner] for owner in owners),
        map_names=tuple(entry["file_name"] for entry in annotations),
        sizes=np.asarray(sizes, dtype=np.int32).reshape(-1, 2)[owners],
        **columns,
    )


def _compact(entry: dict[str, Any]) -> Any:
    """Turn a segment into a tuple while the JSON is still being parsed."""
    if "category_id" in entry and "segmentation" not in entry:
        return (entry.get("id"), entry["category_id"], bool(entry.get("iscrowd", 0)))
    return entry


def _known_images(
    entries: list[Any],
    place: dict[int, int],
    categories: tuple[Category, ...],
    problems: Problems,
) -> list[dict[str, Any]]:
    """Return the annotations that are whole and whose image is listed, one an image."""
    found: list[dict[str, Any]] = []
    unknown: Counter[str] = Counter()
    for position, entry in enumerate(entries):
        image = get(entry, "image_id")
        if not (
            isinstance(get(entry, "segments_info"), list)
            and isinstance(get(entry, "file_name"), str)
        ):
            problems.add(
                f"annotations[{position}]",
                "expected a file_name and segments_info; check that this is the panoptic file",
            )
        elif not is_id(image) or image not in place:
            unknown[repr(image)] += 1
        else:
            found.append(entry)
    report_unknown("image", unknown, categories, problems)
    for number in repeated(entry["image_id"] for entry in found):
        problems.add(f"image {number}", "annotated twice; expected one annotation an image")
    return found


def _check_maps(annotations: list[dict[str, Any]], folder: Path, problems: Problems) -> None:
    """Look every PNG up, reading the folder once."""
    there = list_files(folder)
    for entry in annotations:
        if entry["file_name"] not in there:
            problems.add(
                f"image {entry['image_id']}",
                f"no segments {folder / entry['file_name']}; add the PNG or remove the annotation",
            )


def _segments(
    annotations: list[dict[str, Any]], categories: tuple[Category, ...], problems: Problems
) -> dict[str, Any]:
    """Return the columns of the index that hold one row per segment, and `first`."""
    label = {category.id: position for position, category in enumerate(categories)}
    first, ids, labels, crowd = array("q", [0]), array("q"), array("q"), array("b")
    unknown: Counter[str] = Counter()
    for entry in annotations:
        where = f"image {entry['image_id']}"
        numbers = []
        for segment in entry["segments_info"]:
            number, category, iscrowd = segment if isinstance(segment, tuple) else (None,) * 3
            if not (is_id(number) and 0 < number <= _MOST_ID):
                problems.add(where, f"segment id {number!r}; expected 1 to {_MOST_ID} (0 is void)")
            elif not is_id(category) or category not in label:
                unknown[repr(category)] += 1
            else:
                numbers.append(number)
                labels.append(label[category])
                crowd.append(iscrowd)
        for number in repeated(numbers):
            problems.add(where, f"segment id {number} listed twice; give every segment its own")
        ids.extend(numbers)
        first.append(len(ids))
    report_unknown("category", unknown, categories, problems)
    return {
        "first": np.array(first, dtype=np.int64),
        "ids": np.array(ids, dtype=np.int32),
        "labels": np.array(labels, dtype=np.int64),
        "crowd": np.array(crowd, dtype=np.bool_),
    }
