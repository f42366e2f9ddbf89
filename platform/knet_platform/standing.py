"""How a sweep stands, from the store alone: whoever can read it can watch, from anywhere."""

import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

from knet_platform import attempts
from knet_platform.forecast import PlannedTrial, look_up, make_forecast
from knet_platform.prices import Price
from knet_platform.storage import EvaluationLike, Store, TrialResult
from knet_platform.sweep import Sweep, Trial

QUIET_SECONDS = 300.0
"""After so long without a word a trial no longer counts as running: an evaluation takes time."""
_READERS = 16
_RATE_POINTS = 10
"""Latest points that a trial's speed is taken from."""

State = Literal["finished", "running", "quiet", "waiting", "failed", "pruned"]
"""running: said something lately, or has begun; quiet: began and says nothing any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialStanding:
    """One seed of an arm at one moment; values as measured, None where nothing is known."""

    trial: Trial
    state: State
    attempt: int
    """Counted from 1; 0 before the first."""
    step: int
    total: int | None
    """Optimizer steps in all; None where the training images cannot be counted."""
    metric: float | None
    """The sweep's metric as last measured."""
    difference: float | None
    """To the baseline's same seed at the same step."""
    loss: float | None
    images_per_s: float | None
    data_wait: float | None
    """Share of the time, 0 to 1."""
    memory_gb: float | None
    """Of the GPU; of the host's where there is none."""
    silent: float | None
    """Seconds since the last word of an unfinished trial."""
    seconds_left: float | None
    """Of training; None where it is not known or over."""
    reason: str | None
    """Why it failed, or where it was pruned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A sweep at one moment."""

    trials: tuple[TrialStanding, ...]
    """In the sweep's order; of trials that are the same run, each."""
    seconds_left: float | None
    """Until the last trial ends, if as many run at once as now; None if that cannot be told."""
    gpus: float
    """That running trials hold."""
    gpu_hours: float
    """Of all trials, up to their newest checkpoints."""
    usd: float

    def count(self, state: State) -> int:
        """Return how many trials are in a state."""
        return sum(trial.state == state for trial in self.trials)

    @property
    def is_over(self) -> bool:
        """Whether no trial can come further."""
        return all(trial.state in ("finished", "failed", "pruned") for trial in self.trials)


@dataclass(frozen=True, slots=True)
class _Curve:
    points: Sequence[EvaluationLike] = ()
    result: TrialResult | None = None
    attempt: int = 0

    def latest(self, name: str) -> tuple[int, float] | None:
        """Return step and value of a metric's last point."""
        if self.result and name in self.result.metrics:
            return self.result.step, self.result.metrics[name]
        found = ((p.step, p.metrics[name]) for p in reversed(self.points) if name in p.metrics)
        return next(found, None)

    def at(self, step: int, name: str) -> float | None:
        """Return a metric's value at a step."""
        if self.result and step == self.result.step and name in self.result.metrics:
            return self.result.metrics[name]
        evaluations = self.result.evaluations if self.result else ()
        found = (p for p in (*evaluations, *self.points) if p.step == step)
        return next((p.metrics[name] for p in found if name in p.metrics), None)

    def seconds_a_step(self) -> float | None:
        """Return the pace of the latest points; None before there are two."""
        first, last = self.points[-_RATE_POINTS:][:1], self.points[-1:]
        if not first or last[0].step <= first[0].step:
            return None
        return (last[0].time - first[0].time) / (last[0].step - first[0].step)


@dataclass(slots=True)
class Watch:
    """Looks at a sweep again and again; what is finished is read once."""

    sweep: Sweep
    store: Store
    price: Price
    _finished: dict[str, _Curve] = field(default_factory=dict)

    def look(self, now: float) -> Standing:
        """Return how the sweep stands at `now`, in Unix seconds.

        Raises:
            StorageError: The store cannot be read.
        """
        rows = look_up(self.sweep, self.store, gpu=self.price.gpu)
        states = {row.trial.hash: row.state for row in rows}
        with ThreadPoolExecutor(_READERS) as pool:
            read = pool.map(lambda item: self._read(*item), states.items())
            curves = dict(zip(states, read, strict=True))
        trials = tuple(self._trial(row, curves, now) for row in rows)
        forecast = make_forecast(self.sweep, rows, self.price)
        running = sum(trial.state == "running" for trial in trials)
        resources = self.sweep.resources
        return Standing(
            trials=trials,
            seconds_left=_left(trials, running),
            gpus=running * resources.least_workers * resources.gpus_per_worker,
            gpu_hours=forecast.spent_gpu_hours,
            usd=forecast.spent_usd,
        )

    def _read(self, trial_hash: str, state: str) -> _Curve:
        folder = self.store.trial(trial_hash)
        if state == "finished":
            if trial_hash not in self._finished:
                self._finished[trial_hash] = _Curve(
                    folder.points(), folder.result(), attempts.count(folder)
                )
            return self._finished[trial_hash]
        return _Curve(folder.points(), None, attempts.count(folder))

    def _trial(self, row: PlannedTrial, curves: Mapping[str, _Curve], now: float) -> TrialStanding:
        curve, name = curves[row.trial.hash], self.sweep.metric.name
        over = row.state in ("finished", "failed", "pruned")
        silent = None if over or not curve.points else max(0.0, now - curve.points[-1].time)
        state: State = "waiting"
        if row.state in ("finished", "failed", "pruned"):
            state = row.state
        elif curve.attempt:
            state = "quiet" if silent is not None and silent > QUIET_SECONDS else "running"
        step = curve.result.step if curve.result else curve.points[-1].step if curve.points else 0
        metric = curve.latest(name)
        known = {metric_name: curve.latest(metric_name) for metric_name in _RATES}
        values = {key: found[1] if found else None for key, found in known.items()}
        memory = values["sys/gpu_memory_gb"]
        return TrialStanding(
            trial=row.trial,
            state=state,
            attempt=curve.attempt,
            step=step,
            total=row.iterations,
            metric=metric[1] if metric else None,
            difference=self._difference(row.trial, metric, curves),
            loss=values["train/loss"],
            images_per_s=values["sys/images_per_s"],
            data_wait=values["sys/data_wait"],
            memory_gb=values["sys/host_memory_gb"] if memory is None else memory,
            silent=silent,
            seconds_left=None if over else _seconds_left(row, curve, step),
            reason=row.reason,
        )

    def _difference(
        self, trial: Trial, metric: tuple[int, float] | None, curves: Mapping[str, _Curve]
    ) -> float | None:
        if metric is None or trial.arm == self.sweep.baseline:
            return None
        same = (
            t for t in self.sweep.trials if (t.arm, t.seed) == (self.sweep.baseline, trial.seed)
        )
        baseline = next((curves[t.hash].at(metric[0], self.sweep.metric.name) for t in same), None)
        return None if baseline is None else metric[1] - baseline


_RATES = (
    *("train/loss", "sys/images_per_s", "sys/data_wait"),
    *("sys/gpu_memory_gb", "sys/host_memory_gb"),
)


def _seconds_left(row: PlannedTrial, curve: _Curve, step: int) -> float | None:
    pace = curve.seconds_a_step()
    if pace is not None and row.iterations is not None:
        return pace * (row.iterations - step)
    if row.estimate is None or row.estimate.source == "unknown":
        return None
    return row.estimate.seconds


def _left(trials: Sequence[TrialStanding], running: int) -> float | None:
    """Return when the last trial ends if `running` trials go on at once."""
    distinct = {trial.trial.hash: trial for trial in trials}.values()
    left = [trial.seconds_left for trial in distinct if trial.state in ("running", "waiting")]
    known = [seconds for seconds in left if seconds is not None]
    if not running or len(known) < len(left):
        return None
    return max(max(known), sum(known) / running)


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of what is known; None where nothing is."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
