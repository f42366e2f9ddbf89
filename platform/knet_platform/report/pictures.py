"""The contact sheet: every arm's masks in the same validation images, small enough for a page."""

import base64
import io
import re
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image

from knet_platform.report.trials import READERS
from knet_platform.storage import Store
from knet_platform.sweep import Sweep, Trial

MOST_EVALUATIONS = 6
"""Evaluations shown of one arm."""
BYTES = 3_200_000
"""Of all pictures together: a third more as text, beside 5 MB of plotly.js on a page of 10 MB."""

_PICTURE = re.compile(r"(step|stages|kernels)_(\d+)\.webp")


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
    """Ground truth, the static kernels' masks, then those after every update, side by side, at
    the end of training."""
    updates: int
    """How many `stages` shows."""
    kernels: Picture | None
    """The mean activation of every instance kernel, at the end of training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """The trial whose pictures stand for an arm, and the steps at which it has some, by kind."""

    trial: Trial
    steps: dict[str, list[int]]


def contact_sheets(sweep: Sweep, store: Store) -> tuple[Sheet, ...]:
    """Return the pictures of every arm that has any, from its first seed that has.

    All arms show the same evaluations, as many as a page can hold, and each its last.

    Raises:
        StorageError: The store cannot be read.
    """
    with ThreadPoolExecutor(READERS) as pool:
        searched = pool.map(lambda arm: _find(sweep, store, arm), sweep.arms)
        found = [item for item in searched if item]
        steps = _spread(sorted({step for item in found for step in item.steps["step"]}))
        share = BYTES // max(len(found), 1)
        return tuple(pool.map(lambda item: _sheet(item, store, steps, share), found))


def _find(sweep: Sweep, store: Store, arm: str) -> _Found | None:
    for trial in sweep.trials:
        if trial.arm != arm:
            continue
        steps: dict[str, list[int]] = {"step": [], "stages": [], "kernels": []}
        for name in store.trial(trial.hash).list("pictures"):
            if match := _PICTURE.fullmatch(name):
                steps[match[1]].append(int(match[2]))
        if steps["step"]:
            return _Found(trial=trial, steps={kind: sorted(of) for kind, of in steps.items()})
    return None


def _spread(steps: Sequence[int]) -> set[int]:
    """Return at most `MOST_EVALUATIONS`, evenly spread, the first and the last among them."""
    if len(steps) <= MOST_EVALUATIONS:
        return set(steps)
    gaps = MOST_EVALUATIONS - 1
    return {steps[round(place * (len(steps) - 1) / gaps)] for place in range(gaps + 1)}


def _sheet(found: _Found, store: Store, steps: Collection[int], share: int) -> Sheet:
    """Take the last evaluation whatever its size, then others while they fit `share` bytes."""
    *earlier, last = found.steps["step"]
    wanted = [("step", last)]
    wanted += [(kind, step) for kind in ("stages", "kernels") for step in found.steps[kind][-1:]]
    wanted += [("step", step) for step in earlier if step in steps]
    taken: dict[str, list[Picture]] = {"step": [], "stages": [], "kernels": []}
    for kind, step in wanted:
        picture = _read(found, store, kind, step)
        if picture is None:
            continue
        share -= len(picture.webp)
        if share < 0 and (kind, step) != ("step", last):
            break
        taken[kind].append(picture)
    return Sheet(
        arm=found.trial.arm,
        seed=found.trial.seed,
        evaluations=tuple(sorted(taken["step"], key=lambda picture: picture.step)),
        stages=taken["stages"][0] if taken["stages"] else None,
        updates=found.trial.recipe.model.stages,
        kernels=taken["kernels"][0] if taken["kernels"] else None,
    )


def _read(found: _Found, store: Store, kind: str, step: int) -> Picture | None:
    """Return a preview, or None if it is no picture."""
    webp = store.trial(found.trial.hash).read_bytes(f"pictures/{kind}_{step:06d}.webp")
    try:
        width, height = Image.open(io.BytesIO(webp)).size
    except OSError:
        return None
    return Picture(step=step, webp=webp, width=width, height=height)
