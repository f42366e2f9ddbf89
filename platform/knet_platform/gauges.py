"""What Prometheus hears of a running sweep, through the metric agent of each Ray node.

Units and names are Prometheus': base units, moments instead of ages, `_total` for counters alone.
Ray puts `ray_` before every name, `_total` behind a counter's, and labels of its own to ours. See
docs/design/metrics.md.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ray.util.metrics import Counter, Gauge

from knet_platform.prices import Price
from knet_platform.storage import Cause
from knet_platform.sweep import Sweep, Trial

State = Literal["finished", "running", "waiting", "failed", "pruned"]
"""As in `standing`; what has begun and is paused waits."""

REPEAT_SECONDS = 5.0
"""Between two times that a value is said; Ray asks each process every 10 s."""

_TRIAL = ("sweep", "arm", "seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One name that Prometheus knows."""

    help: str
    labels: tuple[str, ...]
    is_counter: bool = False


SERIES: dict[str, Series] = {
    # Of the attempt under way: these go when it ends.
    "knet_trial_step": Series(help="Optimizer steps done", labels=_TRIAL),
    "knet_trial_planned_steps": Series(help="Optimizer steps of the whole run", labels=_TRIAL),
    "knet_trial_loss": Series(help="Training loss, mean since the last point", labels=_TRIAL),
    "knet_trial_images_per_second": Series(help="Images trained, all workers", labels=_TRIAL),
    "knet_trial_data_wait_ratio": Series(
        help="Share of the time that the first worker waits for images", labels=_TRIAL
    ),
    "knet_trial_host_memory_bytes": Series(
        help="Memory of the first worker's process, without its data loaders", labels=_TRIAL
    ),
    "knet_trial_gpu_memory_bytes": Series(
        help="Most that tensors took of the first worker's GPU", labels=_TRIAL
    ),
    "knet_trial_gpu_utilization_ratio": Series(
        help="Share of the time that the first worker's GPU is busy", labels=_TRIAL
    ),
    "knet_trial_attempt": Series(help="Which attempt this is, from 1", labels=_TRIAL),
    "knet_trial_report_timestamp_seconds": Series(
        help="When the trial last reported", labels=_TRIAL
    ),
    "knet_trial_checkpoint_timestamp_seconds": Series(
        help="When the newest checkpoint was in the store, or the attempt first reported since",
        labels=_TRIAL,
    ),
    # Of the sweep: these go when its process ends.
    "knet_trial_evaluation": Series(
        help="The sweep's metric as last measured", labels=(*_TRIAL, "metric")
    ),
    "knet_sweep_trials": Series(help="Trials by state", labels=("sweep", "state")),
    "knet_sweep_gpu_seconds": Series(help="GPU time of all attempts so far", labels=("sweep",)),
    "knet_sweep_cost_usd": Series(help="Cost of all attempts so far", labels=("sweep",)),
    "knet_sweep_budget_gpu_seconds": Series(
        help="GPU time that the sweep may take", labels=("sweep",)
    ),
    "knet_sweep_budget_usd": Series(help="What the sweep may cost", labels=("sweep",)),
    "knet_sweep_unsent_records": Series(
        help="Updates that the tracking journal keeps for a server", labels=("sweep",)
    ),
    "knet_sweep_retries": Series(
        help="Attempts that ended and were followed by another",
        labels=("sweep", "cause"),
        is_counter=True,
    ),
}

Record = Callable[[str, float | None, dict[str, str]], None]
"""Takes a name of `SERIES`, a value (of a counter: what is added; None: not told any more) and the
labels."""


_Key = tuple[str, tuple[tuple[str, str], ...]]
"""Name and labels of one series."""


class ToRay:
    """Records for the agent of this node, from a process that is connected to Ray.

    Ray hands a gauge's value on once and forgets it, and the agent what it has not heard for 20 s.
    So values are repeated until `close`, and go with the process if that ends before.

    What Ray never forgets are labels: each set of them that a gauge has had takes kilobytes of its
    process to the end. So the first value waits for the next repetition, and an attempt that has
    ended before, of which Prometheus could see no more than a point, leaves nothing.
    """

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}
        self._latest: dict[_Key, float] = {}
        self._told: set[_Key] = set()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def __call__(self, name: str, value: float | None, labels: dict[str, str]) -> None:
        """Set a gauge or let it go, or add to a counter."""
        key = name, tuple(labels.items())
        with self._lock:
            if value is None:
                self._latest.pop(key, None)
                self._told.discard(key)
                return
            if SERIES[name].is_counter:
                self._of(name).inc(value, tags=labels)
                return
            self._latest[key] = value
            if key in self._told:
                self._of(name).set(value, tags=labels)
        if self._thread is None:
            self._thread = threading.Thread(target=self._repeat, name="gauges", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Tell what was not told yet, and let everything go."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _repeat(self) -> None:
        closed = False
        while not closed:
            closed = self._closed.wait(REPEAT_SECONDS)
            with self._lock:
                for (name, labels), value in self._latest.items():
                    self._of(name).set(value, tags=dict(labels))
                self._told.update(self._latest)

    def _of(self, name: str) -> Any:
        if name not in self._made:  # not before: Ray forgets what was recorded unconnected
            series = SERIES[name]
            kind = Counter if series.is_counter else Gauge
            self._made[name] = kind(name, description=series.help, tag_keys=series.labels)
        return self._made[name]


_OF_A_POINT = {
    "train/loss": ("knet_trial_loss", 1.0),
    "sys/images_per_s": ("knet_trial_images_per_second", 1.0),
    "sys/data_wait": ("knet_trial_data_wait_ratio", 1.0),
    "sys/host_memory_gb": ("knet_trial_host_memory_bytes", 1e9),
    "sys/gpu_memory_gb": ("knet_trial_gpu_memory_bytes", 1e9),
    "sys/gpu_utilization": ("knet_trial_gpu_utilization_ratio", 1.0),
}
"""Name and factor of what a training point measures."""


class TrialGauges:
    """Tells how one attempt goes."""

    def __init__(self, trial: Trial, attempt: int, record: Record) -> None:
        self._labels = labels_of(trial)
        self._attempt = attempt
        self._record = record
        self._saved: float | None = None
        self._told: set[str] = set()

    def reported(self, report: Mapping[str, Any], *, saved: bool) -> None:
        """Take the first worker's report, and whether a checkpoint came with it."""
        now = time.time()
        if saved or self._saved is None:
            self._saved = now
        values: dict[str, float] = {
            "knet_trial_step": report["step"],
            "knet_trial_planned_steps": report["total"],
            "knet_trial_attempt": self._attempt,
            "knet_trial_report_timestamp_seconds": now,
            "knet_trial_checkpoint_timestamp_seconds": self._saved,
        }
        for point in report["points"]:
            for metric, value in point["metrics"].items():
                if metric in _OF_A_POINT:
                    name, factor = _OF_A_POINT[metric]
                    values[name] = value * factor
        for name, value in values.items():
            self._record(name, value, self._labels)
        self._told |= values.keys()

    def close(self) -> None:
        """Let everything go."""
        for name in self._told:
            self._record(name, None, self._labels)


class SweepGauges:
    """Tells how a sweep stands and how its trials go, from its own process, which hears of all."""

    def __init__(self, sweep: Sweep, price: Price | None, record: Record) -> None:
        """Take the sweep, and what an hour of one trial costs."""
        self._sweep = sweep
        # A price that nobody named is only worth showing beside a budget that counts with it.
        named = price is not None and (not price.assumed or sweep.budget.usd is not None)
        self._usd_per_hour = price.usd_per_hour if price and named else None
        self._record = record
        self._under_way: dict[str, TrialGauges] = {}
        """By trial hash."""

    def begin(self, trial: Trial, attempt: int) -> None:
        """Take that an attempt begins; nothing is told of it before it reports."""
        self.end(trial)
        self._under_way[trial.hash] = TrialGauges(trial, attempt, self._record)

    def reported(self, trial: Trial, report: Mapping[str, Any], *, saved: bool) -> None:
        """Take a report of the attempt under way, see `TrialGauges`."""
        self._under_way[trial.hash].reported(report, saved=saved)

    def end(self, trial: Trial) -> None:
        """Let what is told of the attempt under way go, if there is one."""
        if trial.hash in self._under_way:
            self._under_way.pop(trial.hash).close()

    def evaluated(self, trial: Trial, value: float) -> None:
        """Take the sweep's metric as just measured."""
        labels = {**labels_of(trial), "metric": self._sweep.metric.name}
        self._record("knet_trial_evaluation", value, labels)

    def retried(self, cause: Cause) -> None:
        """Count an attempt that is followed by another."""
        self._record("knet_sweep_retries", 1.0, {"sweep": self._sweep.name, "cause": cause})

    def look(self, states: Mapping[State, int], *, seconds: float, unsent: int) -> None:
        """Take how everything stands.

        Args:
            states: Number of trials in each.
            seconds: That all trials have trained, added up.
            unsent: Records of the journal.
        """
        labels = {"sweep": self._sweep.name}
        for state in get_args(State):
            self._record("knet_sweep_trials", states.get(state, 0), {**labels, "state": state})
        resources, budget = self._sweep.resources, self._sweep.budget
        workers = resources.most_workers  # elastic trials count as in the budget
        gpu_seconds = seconds * workers * resources.gpus_per_worker
        values = {"knet_sweep_gpu_seconds": gpu_seconds, "knet_sweep_unsent_records": unsent}
        if self._usd_per_hour is not None:
            usd_per_hour = self._usd_per_hour * workers / resources.least_workers
            values["knet_sweep_cost_usd"] = seconds / 3600 * usd_per_hour
        if budget.usd is not None:
            values["knet_sweep_budget_usd"] = budget.usd
        if budget.gpu_hours is not None:
            values["knet_sweep_budget_gpu_seconds"] = budget.gpu_hours * 3600
        for name, value in values.items():
            self._record(name, value, labels)


def labels_of(trial: Trial) -> dict[str, str]:
    """Return what a trial is known by."""
    return {"sweep": trial.sweep, "arm": trial.arm, "seed": str(trial.seed)}
