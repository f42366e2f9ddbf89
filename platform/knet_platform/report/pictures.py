"""The contact sheet: every arm's masks in the same validation images, small enough for a page."""

import base64
import io
import re
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image

from knet_platform.planning import Sweep, Trial
from knet_platform.previews import preview
from knet_platform.report.trials import READERS
from knet_platform.storage import Store

MOST_PICTURES = 100
"""Pictures of evaluations on a page; with many arms each shows fewer, the last always."""
MOST_EVALUATIONS = 6
"""Evaluations shown of one arm."""
PIXELS = 15_000_000
"""Of all pictures together: about 3 MB as WebP, where plotly.js takes 5 of the page's 10 MB."""

_PICTURE = re.compile(r"(step|stages)_(\d+)\.webp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A sheet of probe images with masks."""

    step: int
    webp: bytes
    width: int
    height: int

    @property
    def url(self) -> str:
        """Return the picture as an address that holds it."""
        return f"data:image/webp;base64,{base64.b64encode(self.webp).decode('ascii')}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """The pictures of one arm, all of one seed."""

    arm: str
    seed: int
    evaluations: tuple[Picture, ...]
    """Ground truth beside prediction, at some evaluations from early to late."""
    stages: Picture | None
    """Ground truth, then the prediction after every update, at the end of training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """The trial whose pictures stand for an arm, and the steps at which it has some."""

    trial: Trial
    evaluations: list[int]
    stages: list[int]

    def shown(self, steps: Collection[int]) -> list[int]:
        """Return those of the evaluations that are among `steps`, and the last."""
        return [step for step in self.evaluations if step in steps or step == self.evaluations[-1]]


def contact_sheets(sweep: Sweep, store: Store) -> tuple[Sheet, ...]:
    """Return the pictures of every arm that has any, from its first seed that has.

    Raises:
        StorageError: The store cannot be read.
    """
    with ThreadPoolExecutor(READERS) as pool:
        searched = pool.map(lambda arm: _find(sweep, store, arm), sweep.arms)
        found = [item for item in searched if item]
        steps = _spread(
            sorted({step for item in found for step in item.evaluations}),
            min(MOST_EVALUATIONS, MOST_PICTURES // max(len(found), 1)),
        )
        count = sum(len(item.shown(steps)) + bool(item.stages) for item in found)
        return tuple(
            pool.map(lambda item: _sheet(item, store, steps, PIXELS // max(count, 1)), found)
        )


def _find(sweep: Sweep, store: Store, arm: str) -> _Found | None:
    for trial in sweep.trials:
        if trial.arm != arm:
            continue
        steps: dict[str, list[int]] = {"step": [], "stages": []}
        for name in store.trial(trial.hash).list("pictures"):
            if match := _PICTURE.fullmatch(name):
                steps[match[1]].append(int(match[2]))
        if steps["step"]:
            return _Found(
                trial=trial, evaluations=sorted(steps["step"]), stages=sorted(steps["stages"])
            )
    return None


def _spread(steps: Sequence[int], count: int) -> set[int]:
    """Return at most `count` of the steps, evenly spread, the first and the last among them."""
    if len(steps) <= count:
        return set(steps)
    if count < 2:
        return set(steps[-1:])
    return {steps[round(place * (len(steps) - 1) / (count - 1))] for place in range(count)}


def _sheet(found: _Found, store: Store, steps: Collection[int], pixels: int) -> Sheet:
    def read(kind: str, step: int) -> Picture | None:
        webp = store.trial(found.trial.hash).read_bytes(f"pictures/{kind}_{step:06d}.webp")
        return _shrunk(webp, step, pixels)

    evaluations = [read("step", step) for step in found.shown(steps)]
    return Sheet(
        arm=found.trial.arm,
        seed=found.trial.seed,
        evaluations=tuple(picture for picture in evaluations if picture),
        stages=read("stages", found.stages[-1]) if found.stages else None,
    )


def _shrunk(webp: bytes, step: int, pixels: int) -> Picture | None:
    """Return the picture with at most this many pixels, or None if it is none."""
    try:
        small = preview(webp, pixels)
        size = Image.open(io.BytesIO(small)).size
    except OSError:
        return None
    return Picture(step=step, webp=small, width=size[0], height=size[1])
