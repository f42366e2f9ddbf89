"""What the store knows of every trial of a sweep, read while the sweep may be writing."""

import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from knet_core import KNetError
from knet_platform.metrics import find_metric
from knet_platform.screening import screened_out, screens
from knet_platform.storage import (
    FAILURES,
    EvaluationLike,
    Failure,
    Pruned,
    Store,
    TrialResult,
    TrialStore,
)
from knet_platform.sweep import Sweep, Trial

READERS = 16
"""Trials or pictures read at once: an object store takes tens of milliseconds for each."""

_UNREADABLE = (KNetError, KeyError, TypeError)
"""What damaged files, and files of another version, raise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """The sweep's metric at one evaluation, or the loss, in display units."""

    step: int
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The part of a trial's provenance that a report is about."""

    data_fingerprint: str
    evaluation_digest: str
    """Of the code that decides a score."""
    git_sha: str | None
    patch: str | None
    """Address of the uncommitted changes; None where there were none."""
    command: str
    """As it was typed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialLine:
    """What became of one seed of an arm."""

    arm: str
    seed: int
    trial_hash: str
    status: str
    """finished, pruned, partial, failed, new or unreadable."""
    detail: str
    """The status in words, with the reason of a failure."""
    metrics: Mapping[str, float]
    """Final metrics as measured (AP in 0..1), without NaN; empty unless finished."""
    pruned: Pruned | None
    """Where the sweep's screen stopped the arm."""
    curve: tuple[CurvePoint, ...]
    """The sweep's metric, at every evaluation."""
    loss: tuple[CurvePoint, ...]
    """Of training, as often as it was logged."""
    checkpoint: str | None
    seconds: float | None
    """Seconds of training, over all attempts."""
    hardware: str | None
    """Workers and device of a finished trial."""
    micro_batch: int | None
    """Images of a worker at a time, where memory allowed fewer than the recipe asked for."""
    workers: int | None
    """Of a finished trial, in the end."""
    earlier_workers: tuple[int, ...]
    """Their numbers before, in order, where an elastic trial changed them."""
    failures: tuple[Failure, ...]
    """Of every attempt that ended badly, oldest first, also where the trial finished later."""
    folder: str
    """Address of the trial's part of the store."""
    dumps: tuple[str, ...]
    """Addresses of what explains the failures: batches, stacks."""
    origin: Origin | None
    """None before the trial starts, and for results of versions that recorded none."""


def read_trials(sweep: Sweep, store: Store) -> tuple[TrialLine, ...]:
    """Return every trial of the sweep in its order; one that cannot be read is marked as such."""

    def read(trial: Trial) -> TrialLine:
        return _read(sweep, trial, store)

    with ThreadPoolExecutor(READERS) as pool:
        return tuple(pool.map(read, sweep.trials))


def _read(sweep: Sweep, trial: Trial, store: Store) -> TrialLine:
    try:
        return _line(sweep, trial, store)
    except _UNREADABLE:
        pass  # a running sweep may have replaced what was just listed
    try:
        return _line(sweep, trial, store)
    except _UNREADABLE as error:
        return TrialLine(
            arm=trial.arm,
            seed=trial.seed,
            trial_hash=trial.hash,
            status="unreadable",
            detail=f"unreadable: {one_line(str(error))}",
            metrics={},
            pruned=None,
            curve=(),
            loss=(),
            checkpoint=None,
            seconds=None,
            hardware=None,
            micro_batch=None,
            workers=None,
            earlier_workers=(),
            failures=(),
            folder=store.trial(trial.hash).uri,
            dumps=(),
            origin=None,
        )


def _line(sweep: Sweep, trial: Trial, everything: Store) -> TrialLine:
    metric, store = sweep.metric.name, everything.trial(trial.hash)
    pruned = screened_out(sweep, everything, trial)
    result, state, failure = store.result(), None, None
    if result is None:
        # The result is looked for again after what it replaces: the trial may finish meanwhile.
        state, failure, result = store.state(), store.failure(), store.result()
    if result:
        status, detail = "finished", f"finished at step {result.step}"
        if not math.isfinite(result.metrics.get(metric, math.nan)):
            detail += f" without a finite {metric}"
    elif pruned:
        status = "pruned"
        detail = (
            str(pruned) if screens(sweep, trial) else f"not run: seed {sweep.seeds[0]} {pruned}"
        )
    elif failure:
        status = "failed"
        reason = one_line(failure.message)
        detail = f"failed: {failure.kind}: {reason} (attempt {failure.attempt})"
    elif state:
        status, detail = "partial", f"partial, newest checkpoint at step {state.step}"
    else:
        status, detail = "new", "not started, or no checkpoint yet"
    known, points = result or state, store.points()
    info = find_metric(metric)
    assert info is not None, f"{metric}: the sweep file was checked"
    return TrialLine(
        arm=trial.arm,
        seed=trial.seed,
        trial_hash=trial.hash,
        status=status,
        detail=detail,
        metrics=_finite(result.metrics) if result else {},
        pruned=None if result else pruned,
        curve=_curve([*points, *(known.evaluations if known else ())], metric, info.scale),
        loss=_curve(points, "train/loss", 1.0),
        checkpoint=result.checkpoint if result else store.latest_checkpoint(),
        seconds=known.seconds if known else None,
        hardware=_hardware(result) if result else None,
        micro_batch=result.micro_batch if result else None,
        workers=result.workers if result else None,
        earlier_workers=result.earlier_workers if result else (),
        failures=store.failures(),
        folder=store.uri,
        dumps=tuple(
            f"{store.uri}/{FAILURES}/{name}"
            for name in store.list(FAILURES)
            if not name.endswith(".json")
        ),
        origin=_origin(store),
    )


def _hardware(result: TrialResult) -> str:
    counts = (*result.earlier_workers, result.workers)
    workers = f"{', then '.join(map(str, counts))} worker{'s' * (counts != (1,))}"
    return f"{workers} on {result.device}"


def _curve(points: Iterable[EvaluationLike], metric: str, scale: float) -> tuple[CurvePoint, ...]:
    found = {point.step: point.metrics.get(metric, math.nan) * scale for point in points}
    return tuple(
        CurvePoint(step=step, value=found[step])
        for step in sorted(found)
        if math.isfinite(found[step])
    )


def _origin(store: TrialStore) -> Origin | None:
    found = store.provenance()
    if found is None:
        return None
    return Origin(
        data_fingerprint=found.data_fingerprint,
        evaluation_digest=found.evaluation_digest,
        git_sha=found.git_sha,
        patch=f"{store.uri}/patch.diff" if found.patch else None,
        command=found.command,
    )


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def one_line(text: str) -> str:
    """Return `text` with line breaks and runs of blanks as single blanks."""
    return " ".join(text.split())
