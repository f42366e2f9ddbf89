"""Checks a format through its loader alone: whatever an image raises becomes a finding."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from knet_core.config import DataConfig, Task
from knet_core.data.check_masks import digest
from knet_core.data.check_picture import sheet
from knet_core.data.check_report import Finding, SplitStats
from knet_core.data.check_stats import split_stats
from knet_core.data.dataset import SegmentationDataset, build_dataset
from knet_core.data.paths import Split
from knet_core.errors import DataError
from knet_core.structures import Instances, PanopticMap, Prediction

_PICTURES = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCheck:
    """What one split showed; no figures where it cannot be listed."""

    findings: tuple[Finding, ...]
    pictures: tuple[tuple[bytes, int], ...] = ()
    """Digest of the pixels and place, from 1, of every image."""
    stats: SplitStats | None = None
    picture: bytes | None = None


def check_source(
    config: DataConfig,
    split: Split,
    task: Task,
    num_kernels: int,
    sample: int | None,
    seed: int,
    progress: Callable[[int, int], None],
) -> SourceCheck:
    """Load the images of one split, or so many random ones, with their truth."""
    try:
        dataset = build_dataset(config, split, seed=seed, task=task)
    except DataError as error:
        return SourceCheck(findings=_findings(error))
    order = np.random.default_rng(seed).permutation(len(dataset))[:sample].tolist()
    findings: list[Finding] = []
    objects: list[int] = []
    crowds = 0
    classes: Counter[int] = Counter()
    pictures: list[tuple[bytes, int]] = []
    shown: list[tuple[NDArray[np.uint8], Prediction]] = []
    for done, index in enumerate(order, start=1):
        try:
            pixels, truth = dataset.raw_image(index), dataset.truth(index)
        except DataError as error:
            findings += _findings(error)
        else:
            labels, groups = _labels(truth, dataset, index)
            crowds += groups
            things = sum(
                times for label, times in labels.items() if dataset.categories[label].isthing
            )
            objects.append(0 if task == "semantic" else things)
            classes.update(labels)
            pictures.append((digest(pixels), index + 1))
            if len(shown) < _PICTURES:
                shown.append((pixels, truth))
        progress(done, len(order))
    names = {c.name: classes[label] for label, c in enumerate(dataset.categories)}
    return SourceCheck(
        findings=tuple(findings),
        pictures=tuple(pictures),
        stats=split_stats(objects, crowds, names, checked=len(order), num_kernels=num_kernels),
        picture=sheet(shown, dataset.categories) if shown else None,
    )


def _findings(error: DataError) -> tuple[Finding, ...]:
    rows = (line.partition(": ") for line in str(error).splitlines())
    return tuple(
        Finding(code="refused-by-loader", file=file, id=None, message=message)
        for file, _, message in rows
    )


def _labels(
    truth: Prediction, dataset: SegmentationDataset, index: int
) -> tuple[Counter[int], int]:
    """Count the annotations of each label (of a map of classes: pixels), and crowds of things."""
    if isinstance(truth, Instances):
        return Counter(truth.labels.tolist()), 0
    if isinstance(truth, PanopticMap):
        segments = dataset.panoptic(index).segments
        crowds = sum(s.iscrowd and dataset.categories[s.label].isthing for s in segments)
        return Counter(s.label for s in segments if not s.iscrowd), crowds
    pixels = np.bincount(truth.labels.numpy().ravel(), minlength=len(dataset.categories))
    return Counter(dict(enumerate(pixels[: len(dataset.categories)].tolist()))), 0
