"""The data set doctor: finds everything that is wrong with a data set before training does.

One pass over the annotation files, one over all images in two processes, one comparison of the
splits, and last the loaders themselves: what they would refuse is never passed.
"""

import itertools
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import get_args

from knet_core.config import DataConfig, DataFormat, Task
from knet_core.data.check_coco import list_coco, list_panoptic
from knet_core.data.check_files import Entry, Listing, list_semantic_folder
from knet_core.data.check_masks import Inspection, inspect
from knet_core.data.check_picture import draw_sheet
from knet_core.data.check_report import (
    CHECK_ERRORS,
    CheckReport,
    CheckStats,
    Finding,
    Notes,
    SplitStats,
)
from knet_core.data.check_source import check_source
from knet_core.data.check_splits import Picture, compare_categories, compare_pictures
from knet_core.data.check_stats import crowded_images, split_stats, suggested_kernels
from knet_core.data.dataset import TASKS, build_dataset, refuse_task
from knet_core.data.paths import Split, SplitFiles, find_split
from knet_core.errors import DataError

Progress = Callable[[int, int], None]
"""Takes (done, total)."""

_LISTERS: dict[DataFormat, Callable[[SplitFiles, DataConfig, Notes], Listing | None]] = {
    "coco": list_coco,
    "coco_panoptic": list_panoptic,
    "ade20k": list_semantic_folder,
}
"""Formats that are listed leniently; of the others, loaders are asked image by image."""
_PROCESSES = 2
_FEW = 64
"""So many images are looked at faster than processes start."""
_PICTURES = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class _Split:
    """One split that could be listed, and what its checked images showed."""

    name: Split
    files: SplitFiles
    listing: Listing
    chosen: tuple[Entry, ...]
    inspections: tuple[Inspection, ...]


def check_data(
    config: DataConfig,
    *,
    task: Task | None = None,
    num_kernels: int = 100,
    sample: int | None = None,
    seed: int = 0,
    picture: bool = False,
    progress: Progress | None = None,
) -> CheckReport:
    """Return all faults of a data set, never stopping at one, and its figures.

    Args:
        config: The data set.
        task: What it is for; unset: the first that its format serves.
        num_kernels: Of the recipe, to be compared with the objects of an image.
        sample: Decode so many random images of each split only; files are looked up for all.
        seed: Of the sample and of the choice for the picture.
        picture: Draw the masks of up to nine images without faults.
        progress: Called after every image.

    Raises:
        ConfigError: The format does not serve the task.
    """
    began = time.perf_counter()
    task = task or TASKS[config.format][0]
    refuse_task(config.format, task)
    findings: list[Finding] = []
    splits: list[_Split] = []
    stats: dict[str, SplitStats] = {}
    checked = 0
    sheet = None
    if config.format in _LISTERS:
        splits = _look(config, findings, sample, seed, progress or _silent)
        findings += compare_pictures(_pictures(splits))
        if len(splits) == 2 and all(split.listing.annotated for split in splits):
            one, other = splits
            findings += compare_categories(
                other.files.annotations, one.listing.categories, other.listing.categories
            )
        stats = {split.name: _figures(split, num_kernels) for split in splits}
        checked = sum(len(split.chosen) for split in splits)
        if not any(finding.code in CHECK_ERRORS for finding in findings):
            findings += _refusals(config, task)
        if picture:
            sheet = _picture(splits, config, task, seed)
    elif config.format != "shapes":
        pictures: list[Picture] = []
        for name in get_args(Split):
            found = check_source(
                config, name, task, num_kernels, sample, seed, progress or _silent
            )
            findings += found.findings
            pictures += [(name, *row, config.root) for row in found.pictures]
            if found.stats is not None:
                stats[name] = found.stats
                checked += found.stats.checked_images
            sheet = sheet or (found.picture if picture else None)
        findings += compare_pictures(pictures)
    if task != "semantic":
        findings += crowded_images(config.root, stats, num_kernels)
    seconds = time.perf_counter() - began
    return CheckReport(
        errors=tuple(finding for finding in findings if finding.code in CHECK_ERRORS),
        warnings=tuple(finding for finding in findings if finding.code not in CHECK_ERRORS),
        stats=CheckStats(
            format=config.format,
            task=task,
            root=config.root,
            sample=sample,
            num_kernels=num_kernels,
            suggested_kernels=None if task == "semantic" else suggested_kernels(stats),
            seconds=round(seconds, 2),
            images_per_second=round(checked / seconds, 1),
            splits=stats,
        ),
        picture=sheet,
    )


def _silent(done: int, total: int) -> None:
    """Show nothing."""


def _look(
    config: DataConfig,
    findings: list[Finding],
    sample: int | None,
    seed: int,
    progress: Progress,
) -> list[_Split]:
    """List both splits, then decode their images."""
    listed: list[tuple[Split, SplitFiles, Listing, tuple[Entry, ...]]] = []
    for name in get_args(Split):
        try:
            files = find_split(config, name)
        except DataError as error:
            for line in str(error).splitlines():
                file, _, message = line.partition(": ")
                finding = Finding(code="missing-files", file=file, id=None, message=message)
                if finding not in findings:  # a missing root is said once
                    findings.append(finding)
            continue
        notes = Notes(files.annotations)
        listing = _LISTERS[config.format](files, config, notes)
        if listing is not None and not listing.entries:
            notes.add("no-images", None, f"the {name} split has no images", file=files.images)
        findings += notes.found
        if listing is not None:
            listed.append((name, files, listing, _choose(listing.entries, sample, seed)))
    rows = [(entry, len(listing.categories)) for *_, listing, chosen in listed for entry in chosen]
    found = _each(partial(inspect, layout=config.format), rows)
    done = 0
    splits = []
    for name, files, listing, chosen in listed:
        inspections = []
        for inspection in itertools.islice(found, len(chosen)):
            inspections.append(inspection)
            findings += inspection.findings
            done += 1
            progress(done, len(rows))
        splits.append(
            _Split(
                name=name,
                files=files,
                listing=listing,
                chosen=chosen,
                inspections=tuple(inspections),
            )
        )
    return splits


def _choose(entries: tuple[Entry, ...], sample: int | None, seed: int) -> tuple[Entry, ...]:
    if sample is None or sample >= len(entries):
        return entries
    places = sorted(random.Random(seed).sample(range(len(entries)), sample))
    return tuple(entries[place] for place in places)


def _each(
    look: Callable[[Entry, int], Inspection], rows: Sequence[tuple[Entry, int]]
) -> Iterator[Inspection]:
    """Look at all images, in order; many of them in processes of their own."""
    if len(rows) <= _FEW:
        yield from itertools.starmap(look, rows)
        return
    # Spawned: this process has threads of torch, which a fork would not survive.
    pool = ProcessPoolExecutor(
        _PROCESSES,
        mp_context=get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        yield from pool.map(look, *zip(*rows, strict=True), chunksize=16)
    finally:
        pool.shutdown(cancel_futures=True)


def _pictures(splits: Iterable[_Split]) -> Iterator[Picture]:
    for split in splits:
        for entry, inspection in zip(split.chosen, split.inspections, strict=True):
            yield split.name, inspection.digest, entry.id, str(entry.path)


def _figures(split: _Split, num_kernels: int) -> SplitStats:
    categories = split.listing.categories
    classes: Counter[int] = Counter()
    objects: list[int] = []
    crowds = 0
    for entry in split.listing.entries:
        things = [m for m in entry.marks if m.label >= 0 and categories[m.label].isthing]
        objects.append(sum(not mark.iscrowd for mark in things))
        crowds += sum(mark.iscrowd for mark in things)
        classes.update(m.label for m in entry.marks if m.label >= 0 and not m.iscrowd)
    for inspection in split.inspections:
        classes.update(inspection.class_pixels)
    return split_stats(
        objects,
        crowds,
        {category.name: classes[label] for label, category in enumerate(categories)},
        checked=len(split.chosen),
        num_kernels=num_kernels,
    )


def _refusals(config: DataConfig, task: Task) -> Iterator[Finding]:
    """Ask the loaders."""
    for name in get_args(Split):
        try:
            build_dataset(config, name, seed=0, task=task)
        except DataError as error:
            for line in str(error).splitlines():
                file, _, message = line.partition(": ")
                yield Finding(code="refused-by-loader", file=file, id=None, message=message)


def _picture(splits: Sequence[_Split], config: DataConfig, task: Task, seed: int) -> bytes | None:
    for split in splits:
        sound = [
            entry
            for entry, inspection in zip(split.chosen, split.inspections, strict=True)
            if split.listing.annotated
            and entry.path is not None
            and (entry.size if config.format == "coco" else entry.map) is not None
            and not inspection.findings
        ]
        if sound:
            chosen = _choose(tuple(sound), _PICTURES, seed)
            return draw_sheet(chosen, split.listing.categories, config.format, task)
    return None
