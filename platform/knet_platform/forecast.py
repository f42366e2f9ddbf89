"""What a sweep has cost, and what the rest of it will cost: time, GPU-hours, money, memory.

Looks trials up in the store; writes nothing and needs no cluster.
"""

import heapq
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from knet_core import Recipe
from knet_platform.errors import BudgetError
from knet_platform.pace import (
    MEMORY_MODEL_BAND,
    PROCESS_GB,
    Done,
    Estimate,
    Pace,
    Source,
    num_iterations,
    peak_memory_gb,
)
from knet_platform.prices import Price
from knet_platform.screening import screened_out
from knet_platform.storage import Status, Store, TrialStore
from knet_platform.sweep import Sweep, Trial
from knet_platform.sweep_file import Budget


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTrial:
    """One trial of a sweep as the store knows it."""

    trial: Trial
    state: Status | Literal["pruned"]
    done: Done | None
    """Training already paid for."""
    iterations: int | None
    """Optimizer steps in all; None where the training images cannot be counted."""
    reason: str | None
    """Why it failed, or where the screen stopped its arm."""
    estimate: Estimate | None
    """What it still needs; None where the sweep runs it no more."""


@dataclass(frozen=True, slots=True)
class Band:
    """An estimate between the figures that it should not pass."""

    low: float
    mid: float
    high: float

    def times(self, factor: float) -> "Band":
        """Return the band in another unit."""
        return Band(self.low * factor, self.mid * factor, self.high * factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a few real steps of an arm needed on this machine."""

    seconds_per_step: float
    peak_memory_gb: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What the unfinished trials of a sweep still need, and what all have cost so far."""

    seconds: Band
    """Of training, one trial after another."""
    gpu_hours: Band
    usd: Band
    wall_hours: Band
    concurrent: int
    """Trials at once that `wall_hours` counts with."""
    source: str
    """Where the time comes from: history, probe, model, or several of them."""
    uncounted: int
    """Trials of unknown length, which none of these figures holds."""
    peak_memory_gb: Band
    """Of the worker that needs most."""
    memory_source: Source
    spent_gpu_hours: float
    spent_usd: float
    price: Price


def look_up(
    sweep: Sweep,
    store: Store,
    *,
    gpu: str = "",
    probes: Mapping[str, Probe] | None = None,
) -> list[PlannedTrial]:
    """Return every trial of the sweep with its state and what it still needs.

    Args:
        sweep: The sweep.
        store: Where its trials are.
        gpu: Name of the GPU that they will run on.
        probes: Measurements by arm.
    """
    on_gpu = sweep.resources.gpus_per_worker > 0
    found = {
        trial.hash: _state(store.trial(trial.hash), on_gpu=on_gpu)
        for trial in sweep.distinct_trials
    }
    history = {trial_hash: done for trial_hash, (_, done, _) in found.items() if done is not None}
    pace = _pace(sweep, history, gpu, probes)
    rows = []
    for trial in sweep.trials:
        state, done, reason = found[trial.hash]
        pruned = None if state == "finished" else screened_out(sweep, store, trial)
        over = state == "finished" or pruned is not None
        rows.append(
            PlannedTrial(
                trial=trial,
                state="pruned" if pruned else state,
                done=done,
                iterations=num_iterations(trial.recipe),
                reason=f"pruned at step {pruned.step}" if pruned else reason,
                estimate=None if over else pace.estimate(trial),
            )
        )
    return rows


def make_forecast(
    sweep: Sweep,
    rows: Sequence[PlannedTrial],
    price: Price,
    *,
    instances: int | None = None,
    probes: Mapping[str, Probe] | None = None,
) -> Forecast:
    """Sum up what the trials still need.

    Args:
        sweep: The sweep.
        rows: Its trials, of `look_up`.
        price: What an hour of one trial costs.
        instances: Size of the cluster; unset: trials run one after another, or as many at once
            as `resources.max_concurrent` says.
        probes: Measurements by arm.
    """
    distinct = {row.trial.hash: row for row in rows}.values()
    needed = [row.estimate for row in distinct if row.estimate is not None]
    needed += _to_come(sweep, rows, price.gpu, probes)
    estimates = [item for item in needed if item.source != "unknown"]
    seconds = _total(estimates, sum)
    spent = sum(row.done.seconds for row in distinct if row.done is not None)
    gpus = sweep.resources.least_workers * sweep.resources.gpus_per_worker
    concurrent = _concurrent(sweep, price, instances)
    memory, memory_source = _peak_memory(sweep, rows, probes or {})
    spread = MEMORY_MODEL_BAND if memory_source == "model" else 1.1
    return Forecast(
        seconds=seconds,
        gpu_hours=seconds.times(gpus / 3600),
        usd=seconds.times(price.usd_per_hour / 3600),
        wall_hours=_total(estimates, lambda times: _makespan(times, concurrent)).times(1 / 3600),
        concurrent=concurrent,
        source=" + ".join(sorted({item.source for item in needed})) or "history",
        uncounted=len(needed) - len(estimates),
        peak_memory_gb=Band(memory / spread, memory, memory * spread),
        memory_source=memory_source,
        spent_gpu_hours=spent * gpus / 3600,
        spent_usd=spent * price.usd_per_hour / 3600,
        price=price,
    )


def _peak_memory(
    sweep: Sweep, rows: Sequence[PlannedTrial], probes: Mapping[str, Probe]
) -> tuple[float, Source]:
    """Return what the hungriest arm needs, of finished trials, of its probe or of the model."""
    known = {
        row.trial.arm: row.done.peak_memory_gb
        for row in rows
        if row.done is not None and row.done.peak_memory_gb is not None
    }
    needs: list[tuple[float, Source]] = []
    for arm, recipe in [
        *((row.trial.arm, row.trial.recipe) for row in rows),
        *_ends_to_come(sweep).items(),
    ]:
        if arm in known:
            needs.append((known[arm], "history"))
        elif arm in probes:
            needs.append((probes[arm].peak_memory_gb, "probe"))
        else:
            needs.append((peak_memory_gb(recipe, sweep.resources), "model"))
    return max(needs)


def _ends_to_come(sweep: Sweep) -> Mapping[str, Recipe]:
    search = sweep.search
    return search.ends if search and search.to_come else {}


def _to_come(
    sweep: Sweep, rows: Sequence[PlannedTrial], gpu: str, probes: Mapping[str, Probe] | None
) -> list[Estimate]:
    """Return what the suggestions of a search that are not known yet will need.

    Each counts as the mean of the ends of the space, in a band that holds them all.
    """
    if sweep.search is None or not sweep.search.to_come:
        return []
    pace = _pace(sweep, {row.trial.hash: row.done for row in rows if row.done}, gpu, probes)
    ends = [
        pace.estimate(
            Trial(
                sweep=sweep.name,
                arm=name,
                seed=sweep.seeds[0],
                overrides={},
                recipe=recipe,
                hash="",  # it is no trial
            )
        )
        for name, recipe in sweep.search.ends.items()
    ]
    mean = statistics.fmean(item.seconds for item in ends)
    worst = max(ends, key=lambda item: item.band)
    spread = max(max(item.seconds / mean, mean / item.seconds) for item in ends) if mean else 1.0
    each = Estimate(seconds=mean, band=worst.band * spread, source=worst.source)
    return [each] * (sweep.search.to_come * len(sweep.seeds))


def _pace(
    sweep: Sweep, history: Mapping[str, Done], gpu: str, probes: Mapping[str, Probe] | None
) -> Pace:
    seconds = {arm: probe.seconds_per_step for arm, probe in (probes or {}).items()}
    return Pace(sweep.trials, sweep.resources, history, probes=seconds, gpu=gpu)


def require_budget(sweep: Sweep, forecast: Forecast) -> None:
    """Refuse a sweep whose forecast passes its budget.

    Raises:
        BudgetError: What was spent and what is forecast are more than it may cost.
    """
    if not forecast.seconds.high:  # nothing to run, so nothing to refuse
        return
    for name, cap, spent, band in _caps(sweep.budget, forecast):
        if spent + band.mid > cap:
            so_far = f" besides {spent:.2f} spent" if spent else ""
            raise BudgetError(
                f"{sweep.path}: budget: forecast {band.mid:.2f} {name} ({band.low:.2f} to "
                f"{band.high:.2f}, from {forecast.source}; {forecast.price.basis}){so_far}, "
                f"expected at most {cap:g}; raise --max-usd or budget:, or run fewer arms or seeds"
            )


def _caps(budget: Budget, forecast: Forecast) -> list[tuple[str, float, float, Band]]:
    caps = []
    if budget.usd is not None:
        caps.append(("USD", budget.usd, forecast.spent_usd, forecast.usd))
    if budget.gpu_hours is not None:
        spent = forecast.spent_gpu_hours
        caps.append(("GPU hours", budget.gpu_hours, spent, forecast.gpu_hours))
    return caps


def _state(store: TrialStore, *, on_gpu: bool) -> tuple[Status, Done | None, str | None]:
    state = store.status()
    if state == "new":
        return state, None, None
    if state == "finished" and (result := store.result()):
        memory = _measured_memory(result.metrics, on_gpu=on_gpu)
        done = Done(step=result.step, seconds=result.seconds, peak_memory_gb=memory)
        return state, done, None
    failure = store.failure()
    saved = store.state()
    partly = Done(step=saved.step, seconds=saved.seconds) if saved else None
    return state, partly, f"{failure.kind}: {failure.message}" if failure else None


def _measured_memory(metrics: Mapping[str, float], *, on_gpu: bool) -> float | None:
    if not on_gpu:
        return metrics.get("sys/host_memory_gb")
    tensors = metrics.get("sys/gpu_memory_gb")
    return None if tensors is None else PROCESS_GB + tensors


def _total(estimates: Sequence[Estimate], add: Callable[[list[float]], float]) -> Band:
    return Band(
        add([item.seconds / item.band for item in estimates]),
        add([item.seconds for item in estimates]),
        add([item.seconds * item.band for item in estimates]),
    )


def _makespan(seconds: Sequence[float], concurrent: int) -> float:
    """Return when the last trial ends if each starts as soon as one of the slots is free."""
    slots = [0.0] * concurrent
    for each in seconds:
        heapq.heapreplace(slots, slots[0] + each)
    return max(slots)


def _concurrent(sweep: Sweep, price: Price, instances: int | None) -> int:
    most = sweep.resources.max_concurrent
    if instances is None:
        return most or 1
    fit = max(1, int(instances * price.trials_per_instance + 1e-9))
    return min(fit, most or fit)
