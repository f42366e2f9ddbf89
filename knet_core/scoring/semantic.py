"""Mean IoU of label PNGs in two folders."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knet_core.data.coco_json import Problems
from knet_core.errors import ConfigError, DataError
from knet_core.metrics.mean_iou import PixelCounts
from knet_core.scoring.files import (
    Progress,
    Size,
    folder_root,
    in_processes,
    name_fault,
    open_png,
)

_VALUES = 2**16
"""Of a 16-bit pixel."""
_MOST_CLASSES = 1024
_MOST_PROBLEMS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class _Labels:
    """How pixels become labels; C stands for no class, C + 1 for a value that must not occur."""

    num_classes: int
    truth: NDArray[np.uint16]
    """(65536,) by pixel value."""
    prediction: NDArray[np.uint16]
    """(65536,) by pixel value."""


def score_semantic(
    gt_dir: Path,
    pred_dir: Path,
    *,
    num_classes: int,
    ignore_index: int = 255,
    reduce_zero_label: bool = False,
    pred_from_one: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return mIoU, aAcc, mAcc and IoU per class, from 0 to 1, of PNGs of the same names.

    A predicted pixel of `ignore_index` has no class: wrong, but of no other class.

    Args:
        gt_dir: Ground truth; every PNG in it needs a prediction.
        pred_dir: Predictions.
        num_classes: C; labels are 0 to C - 1.
        ignore_index: True label that is not counted.
        reduce_zero_label: True pixels hold label + 1, and 0 is not counted (ADE20K).
        pred_from_one: Predicted pixels hold label + 1, and 0 is no class, as ADE20K's server wants
            it and `ResultWriter` writes it.
        workers: Processes; None chooses.
        progress: Told of images done.

    Returns:
        `per_class` holds None for classes that occur nowhere; they do not count in the means.

    Raises:
        ConfigError: An impossible number of classes or label.
        DataError: A file cannot be used; one line for each problem.
    """
    if not 1 <= num_classes <= _MOST_CLASSES:
        raise ConfigError(f"num_classes: {num_classes}; expected 1 to {_MOST_CLASSES}")
    if not 0 <= ignore_index < _VALUES:
        raise ConfigError(f"ignore_index: {ignore_index}; expected 0 to {_VALUES - 1}")
    labels = _Labels(
        num_classes=num_classes,
        truth=_table(num_classes, ignore_index, from_one=reduce_zero_label, truth=True),
        prediction=_table(num_classes, ignore_index, from_one=pred_from_one, truth=False),
    )
    pairs = _pairs(gt_dir, pred_dir)
    pixels = PixelCounts(num_classes)
    faults: list[str] = []
    for counts, lines in in_processes(partial(_compare, labels=labels), pairs, workers, progress):
        pixels.counts += counts
        faults += lines
    if faults:
        rest = len(faults) - _MOST_PROBLEMS
        more = [f"{pred_dir}: and {rest} more problems"] if rest > 0 else []
        raise DataError("\n".join([*faults[:_MOST_PROBLEMS], *more]))
    scores = pixels.scores()
    if scores is None:
        raise DataError(f"{gt_dir}: no labelled pixel; check ignore_index={ignore_index}")
    return {
        "mIoU": scores.miou,
        "aAcc": scores.aacc,
        "mAcc": scores.macc,
        "per_class": list(scores.per_class),
    }


def _table(
    num_classes: int, ignore_index: int, *, from_one: bool, truth: bool
) -> NDArray[np.uint16]:
    """Return label by pixel value, as mmsegmentation reads them."""
    table = np.full(_VALUES, num_classes + 1, dtype=np.uint16)
    first = int(from_one)
    if from_one:
        table[0] = num_classes
        table[255] = num_classes
    ignored = ignore_index + first
    if ignored < _VALUES:
        table[ignored] = num_classes
    table[first : first + num_classes] = np.arange(num_classes)
    if truth and ignored < _VALUES:
        table[ignored] = num_classes  # a class as well, but only of predictions
    return table


def _pairs(gt_dir: Path, pred_dir: Path) -> list[tuple[Path, Path]]:
    """Return the PNGs of the same names.

    Raises:
        DataError: A name is missing on one side, or leads out of its folder.
    """
    roots = folder_root(gt_dir), folder_root(pred_dir)
    known, found = map(_names, roots)
    problems = Problems(gt_dir)
    for name in known:
        if fault := name_fault(roots[0], name):
            problems.add(f"image {Path(name).with_suffix('')}", fault)
    if not known:
        problems.add("labels", "no PNG; expected one an image: correct the path")
    problems.raise_all()
    problems = Problems(pred_dir)
    for name in sorted(set(known) | set(found)):
        where = f"image {Path(name).with_suffix('')}"
        if name not in found:
            problems.add(where, f"no prediction {name}; expected one for every image of {gt_dir}")
        elif name not in known:
            problems.add(where, f"{name} is not in {gt_dir}; expected predictions for its images")
        elif fault := name_fault(roots[1], name):
            problems.add(where, fault)
    problems.raise_all()
    return [(roots[0] / name, roots[1] / name) for name in known]


def _names(root: Path) -> dict[str, None]:
    """Return the PNGs below a folder, sorted; links to folders are not followed."""
    found = [
        str((Path(folder) / file).relative_to(root))
        for folder, _, files in os.walk(root)
        for file in files
        if file.lower().endswith(".png")
    ]
    return dict.fromkeys(sorted(found))


def _compare(
    pairs: Sequence[tuple[Path, Path]], *, labels: _Labels
) -> tuple[NDArray[np.int64], list[str]]:
    """Return the counts of some images, and what is wrong with their PNGs."""
    pixels = PixelCounts(labels.num_classes)
    faults = []
    for true_path, path in pairs:
        try:
            truth = _read(true_path, None, labels.truth, labels.num_classes)
            size = truth.shape[0], truth.shape[1]
            found = _read(path, size, labels.prediction, labels.num_classes)
            pixels.add(truth, found)
        except DataError as error:
            faults.append(str(error))
    return pixels.counts, faults


def _read(
    path: Path, size: Size | None, table: NDArray[np.uint16], num_classes: int
) -> NDArray[np.uint16]:
    """Return the labels (H0, W0) of one PNG.

    Raises:
        DataError: It cannot be decoded or holds a value that stands for nothing.
    """
    with open_png(path, ("L", "P", "I;16", "I"), size) as picture:
        values = np.asarray(picture)
    labels: NDArray[np.uint16] = table[values]  # a PNG has no more than 16 bits
    if labels.max(initial=0) > num_classes:
        first = int(table[0] == num_classes)
        strange = values[labels > num_classes][0]
        raise DataError(
            f"{path}: holds value {strange}; expected {first} to {first + num_classes - 1} for "
            f"{num_classes} classes: check --num-classes, --reduce-zero-label and --pred-from-one"
        )
    return labels
