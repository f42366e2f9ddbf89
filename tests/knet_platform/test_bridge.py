"""What one trial's failure means for the others of its sweep, as Tune's callback decides it."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from knet_platform import attempts, bridge
from knet_platform.bridge import Bridge
from knet_platform.budget import Governor
from knet_platform.gauges import SweepGauges
from knet_platform.planning import load_sweep
from knet_platform.progress import PlainProgress
from knet_platform.screening import Screen
from knet_platform.storage import Store
from knet_platform.sweep import Sweep
from knet_platform.tracking import MemoryTracker

SWEEP = """\
name: s
base: recipe.yaml
metric: {name: val/AP, mode: max}
baseline: "1"
seeds: [0, 1]
arms:
  "1": {model.stages: 1}
  "2": {model.stages: 2}
  wide: {model.stages: 2, model.channels: 64}
  other: {model.num_kernels: 20}
  enlarged: {data.shapes.num_train: 20}
"""
RECIPE = """\
data: {format: shapes, shapes: {num_train: 8, num_val: 4, size: 64}, short_edge: [64, 64]}
model: {channels: 32}
"""


class Played:
    """A sweep whose drivers' reports are made up."""

    def __init__(self, folder: Path, scheduler: str = "") -> None:
        (folder / "recipe.yaml").write_text(RECIPE)
        (folder / "s.yaml").write_text(SWEEP + scheduler)
        self.sweep: Sweep = load_sweep(folder / "s.yaml")
        self.store = Store(str(folder / "storage"))
        self.tracker = MemoryTracker()
        progress = PlainProgress(self.sweep, finished=0)
        self.bridge = Bridge(
            self.sweep,
            self.sweep.trials,
            self.store,
            self.tracker,
            progress,
            Governor(None, spent={}, priority=[]),
            SweepGauges(self.sweep, None, lambda *_: None),
            Screen(self.sweep) if scheduler else None,
            others=Counter(),
        )
        self.trials = {trial.name: trial for trial in self.sweep.trials}
        for trial in self.sweep.trials:
            attempts.claim(self.store.trial(trial.hash), "run")

    def report(self, name: str, **result: Any) -> None:
        trial = SimpleNamespace(config={"trial_hash": self.trials[name].hash})
        self.bridge.on_trial_result(1, [], cast("Any", trial), result)

    def fail(self, name: str, cause: str, reason: str) -> None:
        self.report(name, attempt=1)
        self.report(name, outcome="failed", cause=cause, reason=reason)

    def measure(self, name: str, step: int, ap: float) -> None:
        """Report an evaluation of a trial of 100 steps."""
        point = {"step": step, "time": 0.0, "metrics": {"val/AP": ap}}
        self.report(name, step=step, total=100, points=[point], saved=False)

    def stopped(self) -> set[str]:
        """Return the trials that no driver may begin any more."""
        found = set()
        for name, trial in self.trials.items():
            try:
                attempts.verify(self.store.trial(trial.hash), "run")
            except attempts.SupersededError:
                found.add(name)
        return found


@pytest.fixture
def played(tmp_path: Path) -> Played:
    return Played(tmp_path)


@pytest.mark.parametrize("cause", ["non_finite", "crash", "preempted", "out_of_memory_training"])
def test_what_concerns_one_trial_stops_no_other(played: Played, cause: str) -> None:
    played.fail("1/0", cause, "something")
    assert played.stopped() == set()


def test_a_refused_configuration_stops_the_other_seeds_of_its_arm(played: Played) -> None:
    played.fail("2/0", "configuration", "model.stages: ...")
    assert played.stopped() == {"2/1"}


def test_the_same_refusal_of_unrelated_arms_lies_in_what_all_share(played: Played) -> None:
    played.report("1/0", attempt=1)
    played.report("1/0", outcome="finished")
    played.fail("2/0", "configuration", "the same words")
    played.fail("wide/0", "configuration", "the same words")  # both set model.stages: 2
    assert played.stopped() == {"2/1", "wide/1"}
    played.fail("other/0", "configuration", "the same words")
    running = {"1/1", "2/1", "wide/1", "other/1", "enlarged/0", "enlarged/1"}
    assert played.stopped() == running


def test_data_that_cannot_be_used_stop_the_trials_on_them(played: Played) -> None:
    played.fail("1/0", "data", "a.jpg: cut short")
    others = {name for name in played.trials if name != "1/0" and "enlarged" not in name}
    assert played.stopped() == others


def test_a_stopped_trial_has_a_reason_and_a_run_only_if_it_had_begun(played: Played) -> None:
    played.report("2/0", attempt=1)
    played.fail("1/0", "data", "a.jpg: cut short")
    for name in ("2/0", "2/1"):
        played.report(name, outcome="stopped")
        reason = played.bridge.failed[played.trials[name].hash]
        assert reason == "stopped, as 1/0 failed: a.jpg: cut short"
    assert played.tracker.status(played.trials["2/0"].hash) == "KILLED"
    assert played.tracker.status(played.trials["2/1"].hash) is None
    assert played.store.trial(played.trials["2/0"].hash).status() == "new"


def test_a_driver_that_died_is_on_record_and_the_trial_goes_on(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed: list[bool] = []
    monkeypatch.setattr(bridge, "release_abandoned", lambda: freed.append(True))
    played.report("1/0", attempt=1)
    trial = SimpleNamespace(config={"trial_hash": played.trials["1/0"].hash})
    played.bridge.on_trial_recover(1, [], cast("Any", trial))
    store = played.store.trial(played.trials["1/0"].hash)
    assert [failure.cause for failure in store.failures()] == ["preempted"]
    assert store.failure() is None
    assert freed, "else the next attempt might wait for its own workers' places"


def test_a_screened_arm_is_told_to_save_and_its_run_says_where_it_was_pruned(
    tmp_path: Path,
) -> None:
    played = Played(tmp_path, "scheduler: {name: asha, grace: 0.2, reduction_factor: 2}\n")
    for name in ("1/0", "2/0"):
        played.report(name, attempt=1)
    played.measure("1/0", 20, 0.4)
    played.measure("2/0", 10, 0.1)
    trial = played.trials["2/0"]
    assert attempts.may_go_on(played.store, played.bridge.run_id, trial.hash)
    played.measure("2/0", 20, 0.1)
    assert not attempts.may_go_on(played.store, played.bridge.run_id, trial.hash)
    assert attempts.may_go_on(played.store, played.bridge.run_id, played.trials["1/0"].hash)
    played.report("2/0", outcome="pruned")
    run = played.tracker.runs[trial.hash]
    assert (run.status, run.reason) == ("KILLED", "pruned at step 20 of 100")
    assert not played.bridge.failed
    assert not played.bridge.paused


def test_an_arm_that_ends_before_it_hears_of_the_screen_is_finished(tmp_path: Path) -> None:
    played = Played(tmp_path, "scheduler: {name: asha, grace: 0.2, reduction_factor: 2}\n")
    played.report("1/0", attempt=1)
    played.measure("1/0", 20, 0.4)
    played.report("2/0", attempt=1)
    played.measure("2/0", 20, 0.1)
    played.report("2/0", outcome="finished")
    assert played.tracker.status(played.trials["2/0"].hash) == "FINISHED"
