"""Average precision of COCO result files against COCO instance annotations."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as mask_api

from knet_core.data.coco_annotations import run_lengths
from knet_core.data.coco_json import Problems, get, is_id, repeated
from knet_core.data.source import MOST_PIXELS
from knet_core.errors import DataError
from knet_core.metrics.mask_ap import MOST_AT_ONCE, IouType, average_precision
from knet_core.scoring.files import Progress, Size, read_json

_REPORTED = 1000
"""Detections between two calls of `progress`."""


def score_instances(
    gt: Path,
    pred: Path,
    *,
    iou_type: IouType = "segm",
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, float | None]:
    """Return COCO's nine numbers by name, from 0 to 1; None where there is no object to score.

    The area of a detected mask is counted (the COCO API takes a box's where a result file states
    one as well).

    Args:
        gt: COCO instance JSON: images, annotations, categories.
        pred: COCO result JSON: a list of detections.
        iou_type: Compare masks or boxes; boxes that are not stated are the masks'.
        workers: Processes; None for one a core, where there are enough detections.
        progress: Told of detections read.

    Raises:
        DataError: A file cannot be used; one line for each problem.
    """
    truth = _read_truth(gt, iou_type)
    detections = _read_detections(pred, gt, truth, iou_type, progress)
    by_category: dict[int, list[dict[str, Any]]] = {}
    for detection in detections:
        by_category.setdefault(detection["category_id"], []).append(detection)
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if len(detections) > MOST_AT_ONCE else 1
    return average_precision(
        truth, lambda key: by_category.get(key, []), iou_type=iou_type, workers=workers
    )


def _read_truth(path: Path, iou_type: IouType) -> dict[str, Any]:
    """Return the ground truth with masks as run lengths, annotations numbered from 1.

    Raises:
        DataError: The file cannot be used.
    """
    kind = "COCO instances with images, annotations and categories"
    document, problems = read_json(path, kind), Problems(path)
    lists: dict[str, list[Any]] = {}
    for key in ("images", "annotations", "categories"):
        entries = get(document, key)
        if not isinstance(entries, list):
            problems.add(
                key, f"no list of that name; expected {kind}: check that this is the file"
            )
        lists[key] = entries if isinstance(entries, list) else []
    sizes = _read_sizes(lists["images"], problems)
    categories = [get(entry, "id") for entry in lists["categories"]]
    for position, number in enumerate(categories):
        if not is_id(number):
            problems.add(f"categories[{position}]", "expected an integer id")
    numbers = [number for number in categories if is_id(number)]
    for number in repeated(numbers):
        problems.add(f"category id {number}", "listed twice; give every class its own id")
    for number in repeated(
        number for entry in lists["annotations"] if is_id(number := get(entry, "id"))
    ):
        problems.add(f"annotation id {number}", "listed twice; give every annotation its own id")
    annotations: list[dict[str, Any]] = []
    known = set(numbers)
    for position, entry in enumerate(lists["annotations"]):
        found, fault = _region(entry, sizes, known, iou_type)
        area, iscrowd = get(entry, "area"), get(entry, "iscrowd", 0)
        if fault is None and iscrowd not in (0, 1):
            fault = f"iscrowd {iscrowd!r:.40}; expected 0 or 1"
        if fault is None and area is not None and not (_is_number(area) and area >= 0):
            fault = f"area {area!r:.40}; expected pixels"
        if fault is not None:
            problems.add(f"annotation {get(entry, 'id', f'at position {position}')!r:.40}", fault)
            continue
        if area is not None:
            found["area"] = float(area)
        annotations.append({**found, "id": len(annotations) + 1, "iscrowd": int(iscrowd)})
    problems.raise_all()
    return {
        "images": [
            {"id": number, "height": height, "width": width}
            for number, (height, width) in sizes.items()
        ],
        "annotations": annotations,
        "categories": [{"id": number, "name": str(number)} for number in numbers],
    }


def _read_sizes(entries: list[Any], problems: Problems) -> dict[int, Size]:
    sizes: dict[int, Size] = {}
    for position, entry in enumerate(entries):
        number, height, width = (get(entry, key) for key in ("id", "height", "width"))
        if not is_id(number):
            problems.add(f"images[{position}]", "expected an integer id")
        elif number in sizes:
            problems.add(f"image id {number}", "listed twice; give every image its own id")
        elif not (is_id(height) and is_id(width) and height > 0 and width > 0):
            problems.add(f"image {number}", "expected height and width in pixels, both > 0")
        elif height * width > MOST_PIXELS:
            problems.add(
                f"image {number}", f"{width} x {height} pixels; expected at most {MOST_PIXELS}"
            )
        else:
            sizes[number] = (height, width)
    return sizes


def _read_detections(
    path: Path, gt: Path, truth: dict[str, Any], iou_type: IouType, progress: Progress | None
) -> list[dict[str, Any]]:
    """Return the detections as an engine wants them.

    Raises:
        DataError: The file cannot be used.
    """
    kind = "COCO results, a list of detections"
    entries, problems = read_json(path, kind), Problems(path)
    if not isinstance(entries, list):
        raise DataError(f"{path}: no list; expected {kind}: check that this is the file")
    if not entries:
        raise DataError(f"{path}: holds no detection; expected {kind}: write it again")
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    known = {category["id"] for category in truth["categories"]}
    for number in repeated(number for entry in entries if is_id(number := get(entry, "id"))):
        problems.add(f"detection id {number}", "listed twice; leave ids out or make them differ")
    detections = []
    for position, entry in enumerate(entries):
        found, fault = _region(entry, sizes, known, iou_type, listed_in=f"{gt}")
        score = get(entry, "score")
        if fault is None and not _is_number(score):
            fault = f"score {score!r:.40}; expected a number"
        if fault is not None:
            where = f"detection {position} (image {get(entry, 'image_id')!r:.40})"
            problems.add(where, fault)
            continue
        detections.append({**found, "iscrowd": 0, "score": float(score)})
        if progress and position % _REPORTED == 0:
            progress(position, len(entries))
    problems.raise_all()
    return detections


def _region(
    entry: Any,
    sizes: dict[int, Size],
    categories: set[int],
    iou_type: IouType,
    *,
    listed_in: str = "the list of images",
) -> tuple[dict[str, Any], str | None]:
    """Return image, category, mask, box and area of an entry, or what is wrong with it."""
    image, category = get(entry, "image_id"), get(entry, "category_id")
    if not is_id(image) or image not in sizes:
        return {}, f"image_id {image!r:.40} is not in {listed_in}; expected one of its images"
    if not is_id(category) or category not in categories:
        return {}, f"category_id {category!r:.40}; expected one of {len(categories)} categories"
    found: dict[str, Any] = {"image_id": image, "category_id": category}
    box = get(entry, "bbox")
    if iou_type == "bbox" and box is not None and box != []:
        if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
            return {}, f"bbox {box!r:.60}; expected x, y, width, height"
        found["bbox"] = [float(number) for number in box]
        found["area"] = found["bbox"][2] * found["bbox"][3]
        return found, None
    rle, fault = _mask(get(entry, "segmentation"), *sizes[image])
    if fault is not None:
        return {}, fault
    found["segmentation"] = rle
    found["area"] = float(mask_api.area(rle))
    if iou_type == "bbox":
        found["bbox"] = mask_api.toBbox(rle).tolist()
    return found, None


def _mask(segmentation: Any, height: int, width: int) -> tuple[dict[str, Any], str | None]:
    """Return a mask as compressed run lengths, or what is wrong with it.

    pycocotools checks nothing: what reaches it must be sound.
    """
    if isinstance(segmentation, list):
        return _polygons(segmentation, height, width)
    counts, size = get(segmentation, "counts"), get(segmentation, "size")
    if not isinstance(counts, str | list):
        return {}, "no usable segmentation; expected polygons or {size, counts}"
    if size != [height, width]:
        return {}, f"run lengths of size {size!r:.40}, expected the image's [{height}, {width}]"
    if isinstance(counts, str):
        text = counts.encode("ascii", errors="replace")
        lengths = run_lengths(text)
        sound = len(lengths) > 0 and lengths.min() >= 0 and lengths.max() <= height * width
        total = int(lengths.sum()) if sound else -1
    else:
        sound = all(is_id(count) and 0 <= count <= height * width for count in counts)
        total = sum(counts) if sound else -1
    if total != height * width:
        return {}, (
            f"run lengths do not cover the {height} x {width} pixels of the image; expected a "
            f"whole mask: write it again"
        )
    if isinstance(counts, str):
        return {"size": [height, width], "counts": text}, None
    rle: dict[str, Any] = mask_api.frPyObjects(segmentation, height, width)
    return rle, None


def _polygons(polygons: list[Any], height: int, width: int) -> tuple[dict[str, Any], str | None]:
    if not polygons:
        return {}, "segmentation is empty; expected polygons or {size, counts}"
    for polygon in polygons:
        if not (isinstance(polygon, list) and all(map(_is_number, polygon))):
            return {}, "no usable segmentation; expected polygons or {size, counts}"
        # pycocotools silently takes four numbers for a box, so triangles are the least.
        if len(polygon) < 6 or len(polygon) % 2:
            return {}, f"polygon of {len(polygon)} numbers; expected x, y of at least 3 points"
        points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
        extent = np.array([width, height])
        if (points < -extent).any() or (points > 2 * extent).any():
            return {}, "polygon far outside its image; correct it or the image's size"
    merged: dict[str, Any] = mask_api.merge(mask_api.frPyObjects(polygons, height, width))
    return merged, None


def _is_number(value: Any) -> bool:
    return is_id(value) or (isinstance(value, float) and math.isfinite(value))
