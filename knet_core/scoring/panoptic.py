"""Panoptic quality of COCO panoptic files: a JSON file and a folder of PNGs on either side."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knet_core.data.coco_json import Problems, get, is_id, repeated
from knet_core.data.source import places
from knet_core.errors import DataError
from knet_core.metrics.panoptic_quality import PanopticSums, Quality, overlaps
from knet_core.scoring.files import (
    Progress,
    Size,
    folder_root,
    in_processes,
    name_fault,
    open_png,
    read_json,
)

_KIND = "COCO panoptic JSON"
_MOST_ID = 256**3 - 1
_MOST_SEGMENTS = 2**16 - 2
_MOST_PROBLEMS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class _Class:
    id: int
    name: str
    isthing: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Map:
    """The segments (S) that a JSON file lists for one image, and their PNG."""

    path: Path
    numbers: NDArray[np.int64]
    """(S,) ids."""
    labels: NDArray[np.int64]
    """(S,)."""
    crowd: NDArray[np.bool_]
    """(S,)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pair:
    image_id: int
    truth: _Map
    prediction: _Map
    size: Size | None
    """As the ground truth's list of images states it."""


def score_panoptic(
    gt_json: Path,
    gt_dir: Path,
    pred_json: Path,
    pred_dir: Path,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return panoptic quality by panopticapi's rules, from 0 to 100.

    Every annotated image needs a prediction. Areas are counted in the PNGs (panopticapi takes a
    true segment's from the JSON file, where it is the same in a sound one).

    Args:
        gt_json: Ground truth: categories and annotations.
        gt_dir: Its PNGs.
        pred_json: Predictions: annotations.
        pred_dir: Their PNGs.
        workers: Processes; None chooses.
        progress: Told of images done.

    Returns:
        `All`, `Things` and `Stuff`, each with PQ, SQ and RQ (means over the N classes that occur;
        0 where N is 0), and `per_class`: by category id as text `name`, `pq`, `sq`, `rq` (0 where
        the class does not occur, as panopticapi) and the counts `tp`, `fp`, `fn`.

    Raises:
        DataError: A file cannot be used; one line for each problem.
    """
    roots = folder_root(gt_dir), folder_root(pred_dir)
    truth, predicted = read_json(gt_json, _KIND), read_json(pred_json, _KIND)
    problems = Problems(gt_json)
    classes = _read_classes(truth, problems)
    label = {one.id: position for position, one in enumerate(classes)}
    sizes = _read_sizes(truth, problems)
    known = _read_maps(truth, roots[0], label, problems, least_id=1)
    if not known:
        problems.add("annotations", "none; expected at least one image")
    problems.raise_all()
    problems = Problems(pred_json)
    found = _read_maps(predicted, roots[1], label, problems, least_id=0)
    for image_id in found.keys() - known.keys() - sizes.keys():
        problems.add(f"image {image_id}", f"not in {gt_json}; expected predictions for its images")
    if not found:
        problems.add("annotations", f"none; expected one for each of {len(known)} images")
    for image_id in known.keys() - found.keys() if found else ():
        problems.add(f"image {image_id}", "no prediction; expected one for every annotated image")
    problems.raise_all()
    pairs = [
        _Pair(image_id=key, truth=one, prediction=found[key], size=sizes.get(key))
        for key, one in known.items()
    ]
    sums = PanopticSums(len(classes))
    faults: list[str] = []
    work = partial(_compare, num_classes=len(classes))
    for counts, lines in in_processes(work, pairs, workers, progress):
        sums.counts += counts
        faults += lines
    if faults:
        rest = len(faults) - _MOST_PROBLEMS
        more = [f"{pred_dir}: and {rest} more problems"] if rest > 0 else []
        raise DataError("\n".join([*faults[:_MOST_PROBLEMS], *more]))
    return _table(sums, classes)


def _read_classes(document: Any, problems: Problems) -> list[_Class]:
    found = []
    for position, entry in enumerate(_list(document, "categories", problems)):
        number, isthing = get(entry, "id"), get(entry, "isthing")
        if not is_id(number) or isthing not in (0, 1):
            problems.add(f"categories[{position}]", "expected an integer id, and isthing 0 or 1")
        else:
            name = str(get(entry, "name", ""))
            found.append(_Class(id=number, name=name, isthing=bool(isthing)))
    for number in repeated(one.id for one in found):
        problems.add(f"category id {number}", "listed twice; give every class its own id")
    return found


def _read_sizes(document: Any, problems: Problems) -> dict[int, Size | None]:
    """Return the stated sizes by image id; panopticapi needs no list of images."""
    sizes: dict[int, Size | None] = {}
    entries = get(document, "images", [])
    for position, entry in enumerate(entries if isinstance(entries, list) else []):
        number, height, width = (get(entry, key) for key in ("id", "height", "width"))
        if not is_id(number):
            problems.add(f"images[{position}]", "expected an integer id")
            continue
        if number in sizes:
            problems.add(f"image id {number}", "listed twice; give every image its own id")
        sizes[number] = (height, width) if is_id(height) and is_id(width) else None
    return sizes


def _read_maps(
    document: Any, root: Path, label: dict[int, int], problems: Problems, *, least_id: int
) -> dict[int, _Map]:
    """Return the annotations by image id."""
    found: dict[int, _Map] = {}
    for position, entry in enumerate(_list(document, "annotations", problems)):
        image_id, segments = get(entry, "image_id"), get(entry, "segments_info")
        if not is_id(image_id) or not isinstance(segments, list):
            problems.add(
                f"annotations[{position}]", "expected an integer image_id and segments_info"
            )
            continue
        where = f"image {image_id}"
        if image_id in found:
            problems.add(where, "annotated twice; expected one annotation an image")
        path = root
        if fault := name_fault(root, get(entry, "file_name")):
            problems.add(where, fault)
        else:
            path = root / entry["file_name"]
        found[image_id] = _Map(
            path=path,
            **_columns(segments, where, label, problems, least_id),
        )
    return found


def _columns(
    segments: list[Any], where: str, label: dict[int, int], problems: Problems, least_id: int
) -> dict[str, Any]:
    """Return the columns of `_Map` that hold one row per segment."""
    numbers, labels, crowd = [], [], []
    for segment in segments:
        number, category = get(segment, "id"), get(segment, "category_id")
        iscrowd = get(segment, "iscrowd", 0)
        if not (is_id(number) and least_id <= number <= _MOST_ID):
            problems.add(where, f"segment id {number!r:.40}; expected {least_id} to {_MOST_ID}")
        elif not is_id(category) or category not in label:
            problems.add(
                where,
                f"segment {number} of unknown category id {category!r:.40}; expected one of the "
                f"{len(label)} of the ground truth",
            )
        elif iscrowd not in (0, 1):
            problems.add(where, f"segment {number}: iscrowd {iscrowd!r:.40}; expected 0 or 1")
        else:
            numbers.append(number)
            labels.append(label[category])
            crowd.append(bool(iscrowd))
    for number in repeated(numbers):
        problems.add(where, f"segment id {number} listed twice; give every segment its own")
    if len(segments) > _MOST_SEGMENTS:
        problems.add(where, f"{len(segments)} segments; expected at most {_MOST_SEGMENTS}")
    return {
        "numbers": np.array(numbers, dtype=np.int64),
        "labels": np.array(labels, dtype=np.int64),
        "crowd": np.array(crowd, dtype=np.bool_),
    }


def _list(document: Any, key: str, problems: Problems) -> list[Any]:
    entries = get(document, key)
    if isinstance(entries, list):
        return entries
    problems.add(key, f"no list of that name; expected {_KIND}: check that this is the file")
    return []


def _compare(pairs: Sequence[_Pair], *, num_classes: int) -> tuple[NDArray[np.int64], list[str]]:
    """Return the counts of some images, and what is wrong with their PNGs."""
    sums = PanopticSums(num_classes)
    faults = []
    for pair in pairs:
        try:
            _add(sums, pair)
        except DataError as error:
            faults.append(f"{error} (image {pair.image_id})")
    return sums.counts, faults


def _add(sums: PanopticSums, pair: _Pair) -> None:
    """Read both PNGs of one image and count.

    Raises:
        DataError: A PNG cannot be decoded, or does not hold the segments that are listed.
    """
    truth, prediction = pair.truth, pair.prediction
    true_ids = _read_ids(truth.path, pair.size)
    ids = _read_ids(prediction.path, (true_ids.shape[0], true_ids.shape[1]))
    table = overlaps(true_ids, truth.numbers, ids, prediction.numbers)
    _check(truth, true_ids, table.sum(axis=1))
    _check(prediction, ids, table.sum(axis=0))
    sums.add(table, truth.labels, truth.crowd, prediction.labels)


def _read_ids(path: Path, size: Size | None) -> NDArray[np.uint32]:
    """Return the ids R + 256 G + 65536 B of a PNG (H0, W0)."""
    with open_png(path, ("RGB", "RGBA"), size) as picture:
        width, height = picture.size
        # Four bytes a pixel, the fourth of no meaning: one copy out of Pillow's own memory.
        raw = picture.tobytes("raw", "RGBX" if picture.mode == "RGB" else "RGBA")
    words = np.frombuffer(raw, dtype="<u4").reshape(height, width)
    ids: NDArray[np.uint32] = words & np.uint32(_MOST_ID)
    return ids


def _check(listed: _Map, ids: NDArray[np.uint32], pixels: NDArray[np.int64]) -> None:
    """Compare the segments that are listed with those in the PNG.

    Args:
        listed: S of them.
        ids: The PNG.
        pixels: (S + 1,) pixels of no listed segment, then of each.

    Raises:
        DataError: They differ.
    """
    absent = listed.numbers[pixels[1:] == 0]
    if len(absent):
        raise DataError(
            f"{listed.path}: has no pixel of segment id {absent[0]}, which the JSON file lists; "
            f"expected every listed segment: write both again"
        )
    void = 0 if 0 in listed.numbers else ids.size - np.count_nonzero(ids)
    if pixels[0] != void:
        strange = ids[(places(ids, listed.numbers) == 0) & (ids != 0)]
        raise DataError(
            f"{listed.path}: holds segment id {strange[0]}, which the JSON file does not list; "
            f"expected one of {len(listed.numbers)} ids: write both again"
        )


def _table(sums: PanopticSums, classes: Sequence[_Class]) -> dict[str, Any]:
    isthing = np.array([one.isthing for one in classes], dtype=np.bool_)
    quality = (100 * sums.per_class()).T.tolist()
    matches = sums.matches().T.tolist()
    return {
        "All": _percent(sums.mean(np.ones_like(isthing))),
        "Things": _percent(sums.mean(isthing)),
        "Stuff": _percent(sums.mean(~isthing)),
        "per_class": {
            str(one.id): {
                "name": one.name,
                **dict(zip(("pq", "sq", "rq"), values, strict=True)),
                **dict(zip(("tp", "fp", "fn"), counts, strict=True)),
            }
            for one, values, counts in zip(classes, quality, matches, strict=True)
        },
    }


def _percent(quality: Quality) -> dict[str, float]:
    return {
        "PQ": 100 * quality.pq,
        "SQ": 100 * quality.sq,
        "RQ": 100 * quality.rq,
        "N": quality.num_classes,
    }
