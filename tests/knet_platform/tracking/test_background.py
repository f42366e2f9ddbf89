"""Delivery from a thread: in order, again until it arrives, and never an error for training."""

import threading
from collections.abc import Sequence

import pytest

from knet_platform.errors import TrackingError
from knet_platform.planning import Sweep
from knet_platform.storage import Evaluation
from knet_platform.tracking import BackgroundTracker, MemoryTracker, PointLike, RejectedError


class FlakyTracker(MemoryTracker):
    """Fails as often as told before it takes points."""

    def __init__(self, *errors: TrackingError) -> None:
        super().__init__()
        self.errors = list(errors)
        self.failed = threading.Event()

    def log_points(self, trial_hash: str, points: Sequence[PointLike]) -> None:
        if self.errors:
            self.failed.set()
            raise self.errors.pop(0)
        super().log_points(trial_hash, points)


def run(tracker: FlakyTracker, sweep: Sweep) -> tuple[BackgroundTracker, list[str]]:
    warnings: list[str] = []
    background = BackgroundTracker(tracker, warn=warnings.append, retry_seconds=0.001)
    background.start_sweep(sweep)
    trial = sweep.trials[0]
    background.start_trial(trial, 1)
    for step in (1, 2):
        point = Evaluation(step=step, time=1e9, metrics={"train/loss": 1.0})
        background.log_points(trial.hash, [point])
    background.finish_trial(trial.hash, "FINISHED")
    return background, warnings


def test_everything_arrives_in_order(sweep: Sweep) -> None:
    tracker = FlakyTracker()
    background, warnings = run(tracker, sweep)
    background.finish_sweep("FINISHED")
    assert tracker.runs[sweep.trials[0].hash].curves == {"train/loss": {1: 1.0, 2: 1.0}}
    assert tracker.status(sweep.trials[0].hash) == tracker.sweep_status == "FINISHED"
    assert (background.lost, warnings) == (0, [])


def test_what_does_not_arrive_is_sent_again_and_said_once(sweep: Sweep) -> None:
    tracker = FlakyTracker(*(TrackingError("no answer") for _ in range(3)))
    background, warnings = run(tracker, sweep)
    background.finish_sweep("FINISHED")
    assert tracker.runs[sweep.trials[0].hash].curves == {"train/loss": {1: 1.0, 2: 1.0}}
    assert (background.lost, warnings) == (0, ["no answer"])


def test_what_is_refused_is_counted_and_stops_nothing(sweep: Sweep) -> None:
    tracker = FlakyTracker(RejectedError("bad name"))
    background, warnings = run(tracker, sweep)
    background.finish_sweep("FINISHED")
    assert tracker.runs[sweep.trials[0].hash].curves == {"train/loss": {2: 1.0}}
    assert (background.lost, warnings) == (1, ["bad name"])


def test_a_store_that_stays_away_does_not_hold_up_the_end(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("knet_platform.tracking.background.CLOSE_SECONDS", 0.05)
    tracker = FlakyTracker(*(TrackingError("no answer") for _ in range(100_000)))
    background, warnings = run(tracker, sweep)
    assert tracker.failed.wait(10)
    background.finish_sweep("FINISHED")
    assert background.lost == 4  # two points, the trial's end, the sweep's end
    assert warnings == ["no answer"]


def test_a_store_that_is_not_there_at_the_start_is_an_error(sweep: Sweep) -> None:
    class Absent(MemoryTracker):
        def start_sweep(self, sweep: Sweep) -> None:
            raise TrackingError("no answer")

    with pytest.raises(TrackingError, match="no answer"):
        BackgroundTracker(Absent(), warn=lambda _: None).start_sweep(sweep)
