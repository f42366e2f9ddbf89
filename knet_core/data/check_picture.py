"""Nine images of a data set with their masks as one picture."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from knet_core.config import DataFormat, Task
from knet_core.data.check_files import Entry
from knet_core.data.check_masks import class_ids, segment_ids
from knet_core.data.check_objects import run_lengths_of
from knet_core.data.coco import decode_mask
from knet_core.data.images import read_image
from knet_core.data.source import IGNORED, Category
from knet_core.structures import Instances, PanopticMap, Prediction, Segment, SemanticMap
from knet_core.visualize import contact_sheet, draw

_COLUMNS = 3
_LONGEST = 640
"""Larger images are thinned out to at most this side, so that captions stay readable."""


def draw_sheet(
    entries: Sequence[Entry], categories: Sequence[Category], layout: DataFormat, task: Task
) -> bytes:
    """Draw images without faults, three in a row, as PNG."""
    return sheet(
        [
            (read_image(entry.path), _truth(entry, categories, layout, task))
            for entry in entries
            if entry.path is not None
        ],
        categories,
    )


def sheet(
    samples: Sequence[tuple[NDArray[np.uint8], Prediction]], categories: Sequence[Category]
) -> bytes:
    """Draw pixels (H0, W0, 3) and truth of some images, three in a row, as PNG."""
    drawn = []
    for pixels, truth in samples:
        step = math.ceil(max(pixels.shape[:2]) / _LONGEST)
        thin = np.ascontiguousarray(pixels[::step, ::step])
        drawn.append(draw(thin, _thinned(truth, step), categories))
    return contact_sheet(drawn, columns=_COLUMNS)


def _truth(
    entry: Entry, categories: Sequence[Category], layout: DataFormat, task: Task
) -> Prediction:
    if layout == "coco":
        assert entry.size is not None
        marks = [mark for mark in entry.marks if mark.label >= 0 and not mark.iscrowd]
        rles = [run_lengths_of(mark, entry.size) for mark in marks]
        masks = [decode_mask(rle["counts"], *entry.size) for rle in rles]
        return _instances([mark.label for mark in marks], masks, entry.size)
    assert entry.map is not None
    if layout == "ade20k":
        ids = class_ids(entry.map)
        ids[ids == IGNORED] = 0
        return SemanticMap(labels=torch.from_numpy(ids - np.uint8(1)))
    segments = segment_ids(entry.map)
    marks = [mark for mark in entry.marks if mark.label >= 0]
    if task == "instance":
        things = [m for m in marks if categories[m.label].isthing and not m.iscrowd]
        masks = [segments == int(mark.id) for mark in things]
        return _instances([mark.label for mark in things], masks, segments.shape)
    if task == "semantic":
        labels = np.full(segments.shape, IGNORED, dtype=np.uint8)
        for mark in marks:
            if not mark.iscrowd:
                labels[segments == int(mark.id)] = mark.label
        return SemanticMap(labels=torch.from_numpy(labels))
    return PanopticMap(
        ids=torch.from_numpy(segments),
        segments=tuple(Segment(id=int(mark.id), label=mark.label, score=1.0) for mark in marks),
    )


def _instances(
    labels: list[int], masks: Sequence[NDArray[np.generic]], size: tuple[int, ...]
) -> Instances:
    stack = np.stack(masks).astype(np.bool_) if masks else np.zeros((0, *size), dtype=np.bool_)
    return Instances(
        scores=torch.ones(len(labels)),
        labels=torch.tensor(labels, dtype=torch.int64),
        masks=torch.from_numpy(stack),
    )


def _thinned(truth: Prediction, step: int) -> Prediction:
    """Keep every `step`-th row and column."""
    if isinstance(truth, Instances):
        return Instances(
            scores=truth.scores, labels=truth.labels, masks=truth.masks[:, ::step, ::step]
        )
    if isinstance(truth, PanopticMap):
        return PanopticMap(ids=truth.ids[::step, ::step], segments=truth.segments)
    return SemanticMap(labels=truth.labels[::step, ::step])
