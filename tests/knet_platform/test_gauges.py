"""What Prometheus hears of trials and sweeps, and how many series that makes."""

import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any, cast

import pytest

from knet_platform import attempts, bridge, gauges
from knet_platform.bridge import Bridge
from knet_platform.budget import Governor
from knet_platform.gauges import SERIES, SweepGauges, ToRay
from knet_platform.planning import load_sweep
from knet_platform.prices import Price
from knet_platform.progress import PlainProgress
from knet_platform.storage import Store
from knet_platform.sweep import Sweep
from knet_platform.sweep_file import Budget
from knet_platform.tracking import MemoryTracker

SWEEP = """\
name: s
base: recipe.yaml
metric: {name: val/AP, mode: max}
baseline: a=0.1
seeds: [0, 1]
arms: {a=0.1: {model.stages: 1}, b: {model.stages: 2}}
resources: {workers: 2, gpus_per_worker: 1}
"""
RECIPE = "data: {format: shapes, shapes: {num_train: 8, num_val: 4, size: 64}}\n"
PRICE = Price(
    usd_per_hour=36.0, trials_per_instance=1, gpu="A10G", gpu_memory_gb=24, basis="", assumed=False
)
OF_ATTEMPTS = {n for n in SERIES if n.startswith("knet_trial_")} - {"knet_trial_evaluation"}
A0 = {"sweep": "s", "arm": "a=0.1", "seed": "0"}


class Recorded:
    """Stands for one process: keeps of each series what was last said, as Ray's agent does."""

    def __init__(self) -> None:
        self.series: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}

    def __call__(self, name: str, value: float | None, labels: dict[str, str]) -> None:
        assert set(labels) == set(SERIES[name].labels)  # Ray refuses others
        key = (name, frozenset(labels.items()))
        if value is None:
            del self.series[key]
            return
        before = self.series.get(key, 0.0) if SERIES[name].is_counter else 0.0
        self.series[key] = before + value

    def value(self, name: str, **labels: str) -> float:
        return self.series[name, frozenset(labels.items())]

    def names(self) -> set[str]:
        return {name for name, _ in self.series}


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "s.yaml").write_text(SWEEP)
    return load_sweep(tmp_path / "s.yaml")


class Running:
    """A sweep whose drivers' reports are made up."""

    def __init__(self, sweep: Sweep, folder: Path) -> None:
        self.recorded = Recorded()
        self.store = Store(str(folder / "storage"))
        self.bridge = Bridge(
            sweep,
            sweep.trials,
            self.store,
            MemoryTracker(),
            PlainProgress(sweep, finished=0),
            Governor(None, spent={"earlier": 3600.0}, priority=[]),
            SweepGauges(sweep, PRICE, self.recorded),
            None,
            others=Counter({"finished": 3}),
        )
        self.trials = {trial.name: trial for trial in sweep.trials}

    def report(self, name: str, **result: Any) -> None:
        trial = SimpleNamespace(config={"trial_hash": self.trials[name].hash})
        self.bridge.on_trial_result(1, [], cast("Any", trial), result)

    def measure(self, name: str, step: int, *, saved: bool = False, **metrics: float) -> None:
        points = [{"step": step, "time": 0.0, "metrics": metrics}] if metrics else []
        self.report(name, step=step, total=100, points=points, saved=saved)

    def states(self) -> dict[str, float]:
        self.bridge.on_experiment_end([])
        known = ("finished", "running", "waiting", "failed", "pruned")
        value = self.recorded.value
        found = {s: value("knet_sweep_trials", sweep="s", state=s) for s in known}
        return {state: count for state, count in found.items() if count}


def test_an_attempt_says_how_it_goes_in_base_units(sweep: Sweep, tmp_path: Path) -> None:
    running, before = Running(sweep, tmp_path), time.time()
    running.report("a=0.1/0", attempt=2)
    measured = {"train/loss": 2.5, "sys/data_wait": 0.25, "sys/gpu_memory_gb": 3.0}
    running.measure("a=0.1/0", 7, **measured)
    told = {key: v for key, v in running.recorded.series.items() if key[0] in OF_ATTEMPTS}
    assert {labels for _, labels in told} == {frozenset(A0.items())}
    values = {name.removeprefix("knet_trial_"): v for (name, _), v in told.items()}
    moments = {values.pop(f"{what}_timestamp_seconds") for what in ("report", "checkpoint")}
    assert all(before <= moment <= time.time() for moment in moments)
    assert values == {
        "step": 7, "planned_steps": 100, "attempt": 2,
        "loss": 2.5, "data_wait_ratio": 0.25, "gpu_memory_bytes": 3e9,
    }  # fmt: skip


def test_only_a_checkpoint_moves_the_moment_up_to_which_nothing_would_be_lost(
    sweep: Sweep, tmp_path: Path
) -> None:
    running = Running(sweep, tmp_path)
    running.report("a=0.1/0", attempt=1)

    def saved() -> float:
        return running.recorded.value("knet_trial_checkpoint_timestamp_seconds", **A0)

    running.measure("a=0.1/0", 1)
    first = saved()
    running.measure("a=0.1/0", 2)
    assert saved() == first
    running.measure("a=0.1/0", 3, saved=True)
    assert saved() > first


def test_a_report_without_points_keeps_what_was_measured(sweep: Sweep, tmp_path: Path) -> None:
    running = Running(sweep, tmp_path)
    running.report("a=0.1/0", attempt=1)
    running.measure("a=0.1/0", 1, **{"train/loss": 2.0})
    running.measure("a=0.1/0", 2, saved=True)
    assert running.recorded.value("knet_trial_loss", **A0) == 2.0
    assert running.recorded.value("knet_trial_step", **A0) == 2


def test_nothing_is_told_of_an_attempt_that_has_ended(sweep: Sweep, tmp_path: Path) -> None:
    """The next one may have to wait for its workers, and says how it goes itself."""
    running = Running(sweep, tmp_path)
    running.report("a=0.1/0", attempt=1)
    running.measure("a=0.1/0", 1, **{"train/loss": 2.0})
    running.report("a=0.1/0", attempt=2)
    assert not OF_ATTEMPTS & running.recorded.names()
    running.measure("a=0.1/0", 1)
    assert "knet_trial_loss" not in running.recorded.names()
    running.report("a=0.1/0", outcome="finished")
    assert not OF_ATTEMPTS & running.recorded.names()


def test_a_sweep_counts_its_trials_by_state(sweep: Sweep, tmp_path: Path) -> None:
    running = Running(sweep, tmp_path)
    for trial in sweep.trials:
        attempts.claim(running.store.trial(trial.hash), running.bridge.run_id)
    assert running.states() == {"finished": 3, "waiting": 4}
    for name in ("a=0.1/0", "b/0", "a=0.1/1"):
        running.report(name, attempt=1)
    running.report("a=0.1/0", outcome="finished")
    running.report("b/0", outcome="failed", cause="data", reason="x")  # and with it all others
    running.report("b/1", outcome="stopped")
    assert running.states() == {"finished": 4, "running": 1, "failed": 2}
    running.report("a=0.1/1", outcome="paused")
    assert running.states() == {"finished": 4, "waiting": 1, "failed": 2}


def test_a_sweep_says_what_it_has_cost_and_what_it_may(sweep: Sweep) -> None:
    recorded = Recorded()
    limited = replace(sweep, budget=Budget(usd=100.0, gpu_hours=5.0))
    SweepGauges(limited, PRICE, recorded).look({"running": 1}, seconds=7200.0, unsent=4)
    values = {
        name.removeprefix("knet_sweep_"): value
        for (name, _), value in recorded.series.items()
        if name != "knet_sweep_trials"
    }
    assert values == {
        "gpu_seconds": 2 * 7200.0, "cost_usd": 72.0, "unsent_records": 4,
        "budget_usd": 100.0, "budget_gpu_seconds": 5 * 3600.0,
    }  # fmt: skip


def test_a_price_that_nobody_named_makes_no_cost(sweep: Sweep) -> None:
    recorded = Recorded()
    told = SweepGauges(sweep, replace(PRICE, assumed=True), recorded)
    told.look({}, seconds=7200.0, unsent=0)
    assert "knet_sweep_cost_usd" not in recorded.names()
    assert "knet_sweep_budget_usd" not in recorded.names()


def test_earlier_runs_are_paid_for_too_and_retries_counted_by_cause(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge, "release_abandoned", lambda: None)  # no cluster here
    running = Running(sweep, tmp_path)
    running.report("b/0", attempt=1)
    running.report("b/0", retry="node lost; retried", cause="preempted")
    running.report("b/0", retry="a damaged checkpoint was passed")  # ends no attempt
    running.report("b/0", attempt=2)
    trial = SimpleNamespace(config={"trial_hash": running.trials["b/0"].hash})
    running.bridge.on_trial_recover(1, [], cast("Any", trial))
    value = running.recorded.value
    assert value("knet_sweep_retries", sweep="s", cause="preempted") == 2
    running.bridge.on_experiment_end([])
    assert 36.0 <= value("knet_sweep_cost_usd", sweep="s") < 37.0


def test_a_sweep_of_a_thousand_trials_makes_about_a_thousand_series(
    sweep: Sweep, tmp_path: Path
) -> None:
    """Prometheus scrapes at any time: one of each trial, and a dozen of each that is running."""
    first = sweep.trials[0]
    many = replace(
        sweep,
        trials=tuple(
            replace(first, arm=f"arm{n // 2}", seed=n % 2, hash=f"{n:016x}") for n in range(1000)
        ),
    )
    running = Running(many, tmp_path)
    everything = {"train/loss", "sys/images_per_s", "sys/data_wait", "sys/host_memory_gb"}
    everything |= {"sys/gpu_memory_gb", "sys/gpu_utilization"}
    for trial in many.trials:
        running.report(trial.name, attempt=1)
        for step in range(10, 101, 10):
            metrics = {**dict.fromkeys(everything, 1.0), "val/AP": step / 100}
            running.measure(trial.name, step, **metrics)
        told = [name for name, _ in running.recorded.series if name in OF_ATTEMPTS]
        assert len(told) == len(OF_ATTEMPTS) == 11
        running.report(trial.name, outcome="paused")
    for cause in ("preempted", "crash", "hang"):
        running.report(many.trials[0].name, retry="x", cause=cause)
    running.bridge.on_experiment_end([])

    by_name = Counter(name for name, _ in running.recorded.series)
    assert by_name.pop("knet_trial_evaluation") == 1000
    assert by_name.total() < 20


class FakeGauge:
    """Stands for Ray's gauge or counter: notes every value that it is handed."""

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.heard: list[float] = []
        self.again = Event()

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.heard.append(value)
        if len(self.heard) > 3:
            self.again.set()

    def inc(self, value: float, tags: dict[str, str]) -> None:
        self.heard.append(value)


@pytest.fixture
def ray_gauges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauges, "Gauge", FakeGauge)
    monkeypatch.setattr(gauges, "Counter", FakeGauge)


@pytest.mark.usefixtures("ray_gauges")
def test_gauges_are_repeated_until_closed_and_counters_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray forgets a gauge's value once it has handed it on."""
    monkeypatch.setattr(gauges, "REPEAT_SECONDS", 0.01)
    record = ToRay()
    record("knet_sweep_retries", 1.0, {"sweep": "s", "cause": "hang"})
    record("knet_sweep_cost_usd", 2.0, {"sweep": "s"})
    record("knet_sweep_gpu_seconds", 3.0, {"sweep": "s"})
    record("knet_sweep_gpu_seconds", None, {"sweep": "s"})
    let_go = list(record._of("knet_sweep_gpu_seconds").heard)
    gauge, counter = record._of("knet_sweep_cost_usd"), record._of("knet_sweep_retries")
    assert gauge.again.wait(10)
    record.close()
    assert set(gauge.heard) == {2.0}
    assert record._of("knet_sweep_gpu_seconds").heard == let_go
    assert counter.heard == [1.0]
    assert not [thread for thread in threading.enumerate() if thread.name == "gauges"]


@pytest.mark.usefixtures("ray_gauges")
def test_labels_that_ray_would_keep_for_nothing_are_not_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of an attempt shorter than the pause nothing is told; of all that stays, the last value."""
    monkeypatch.setattr(gauges, "REPEAT_SECONDS", 600.0)
    record = ToRay()
    record("knet_trial_step", 1.0, A0)
    record("knet_trial_step", None, A0)
    record("knet_sweep_cost_usd", 2.0, {"sweep": "s"})
    record("knet_sweep_cost_usd", 3.0, {"sweep": "s"})
    record.close()
    assert record._of("knet_trial_step").heard == []
    assert record._of("knet_sweep_cost_usd").heard == [3.0]


@pytest.mark.usefixtures("ray_gauges")
def test_what_has_been_told_once_is_told_at_every_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauges, "REPEAT_SECONDS", 0.01)
    record = ToRay()
    record("knet_trial_step", 1.0, A0)
    step = record._of("knet_trial_step")
    assert step.again.wait(10)
    monkeypatch.setattr(gauges, "REPEAT_SECONDS", 600.0)
    record("knet_trial_step", 2.0, A0)
    assert 2.0 in step.heard
    record.close()


def test_names_and_units_are_prometheus() -> None:
    for name, series in SERIES.items():
        assert not name.endswith(("_total", "_gb", "_percent", "_minutes", "_hours")), name
        assert len(series.help) > 10
