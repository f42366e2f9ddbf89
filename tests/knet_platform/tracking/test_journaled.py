"""Delivery through the journal: in order, again until it arrives, and never an error or a wait."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from knet_platform.errors import TrackingError
from knet_platform.storage import Evaluation
from knet_platform.tracking import (
    Delivery,
    Journal,
    JournaledTracker,
    MemoryTracker,
    PointLike,
    RejectedError,
    SweepRun,
    pause,
)


class FlakyTracker(MemoryTracker):
    """Fails as often as told before it takes points."""

    def __init__(self, *errors: TrackingError) -> None:
        super().__init__()
        self.errors = list(errors)
        self.failed = threading.Event()
        self.calls = 0

    def log_points(self, trial_hash: str, points: Sequence[PointLike]) -> None:
        self.calls += 1
        if self.errors:
            self.failed.set()
            raise self.errors.pop(0)
        super().log_points(trial_hash, points)


class AbsentTracker(FlakyTracker):
    """Answers at the start and then no more, until it is back."""

    def __init__(self) -> None:
        super().__init__()
        self.back = threading.Event()

    def log_points(self, trial_hash: str, points: Sequence[PointLike]) -> None:
        if not self.back.is_set():
            self.failed.set()
            raise TrackingError("no answer")
        super().log_points(trial_hash, points)


Open = Callable[..., JournaledTracker]


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def journaled(tmp_path: Path, warnings: list[str]) -> Open:
    def make(tracker: MemoryTracker, **options: int) -> JournaledTracker:
        return JournaledTracker(
            tracker,
            "none",
            tmp_path / "journal.db",
            warn=warnings.append,
            pause=lambda failures: 0.001,
            **options,
        )

    return make


def point(step: int, name: str = "train/loss") -> Evaluation:
    return Evaluation(step=step, time=1e9, metrics={name: float(step)})


def run(tracker: JournaledTracker, sweep, steps: Sequence[int] = (1, 2)) -> None:
    tracker.start_sweep(sweep.run)
    tracker.start_trial(sweep.trial, 1)
    for step in steps:
        tracker.log_points(sweep.trial.hash, [point(step)])
    tracker.finish_trial(sweep.trial.hash, "FINISHED")


def test_everything_arrives_in_order(journaled, sweep, tmp_path, warnings) -> None:
    tracker = MemoryTracker()
    background = journaled(tracker)
    run(background, sweep)
    background.log_picture(sweep.trial.hash, 2, b"png")
    background.log_file(sweep.trial.hash, "patch.diff", b"\xff\x00")
    page = tmp_path / "index.html"
    page.write_text("table")
    background.finish_sweep("FINISHED", [page, tmp_path / "gone.csv"])
    record = tracker.runs[sweep.trial.hash]
    assert record.curves == {"train/loss": {1: 1.0, 2: 2.0}}
    assert (record.pictures, record.files) == ({2: b"png"}, {"patch.diff": b"\xff\x00"})
    assert tracker.status(sweep.trial.hash) == tracker.sweep_status == "FINISHED"
    assert tracker.artifacts == [page]
    assert (background.left(), warnings) == (None, [])
    assert not list(tmp_path.glob("journal.db*"))


def test_what_does_not_arrive_is_sent_again_and_said_once(journaled, sweep, warnings) -> None:
    tracker = FlakyTracker(*(TrackingError("no answer") for _ in range(3)))
    background = journaled(tracker)
    run(background, sweep)
    background.finish_sweep("FINISHED")
    assert tracker.runs[sweep.trial.hash].curves == {"train/loss": {1: 1.0, 2: 2.0}}
    assert (background.left(), warnings) == (None, ["no answer"])


def test_what_gathered_meanwhile_is_sent_in_few_calls(journaled, sweep) -> None:
    tracker = AbsentTracker()
    background = journaled(tracker)
    run(background, sweep, range(1, 501))
    assert tracker.failed.wait(10)
    tracker.back.set()
    background.finish_sweep("FINISHED")
    assert list(tracker.runs[sweep.trial.hash].curves["train/loss"]) == list(range(1, 501))
    assert tracker.calls <= 3


def test_of_many_points_only_those_refused_are_left_out(journaled, sweep, warnings) -> None:
    class Choosy(AbsentTracker):
        def log_points(self, trial_hash: str, points: Sequence[PointLike]) -> None:
            if self.back.is_set() and any("bad" in point.metrics for point in points):
                raise RejectedError("bad name")
            super().log_points(trial_hash, points)

    tracker = Choosy()
    background = journaled(tracker)
    background.start_sweep(sweep.run)
    background.start_trial(sweep.trial, 1)
    for name, step in (("train/loss", 1), ("bad", 2), ("train/loss", 3)):
        background.log_points(sweep.trial.hash, [point(step, name)])
    assert tracker.failed.wait(10)
    tracker.back.set()
    background.finish_sweep("FINISHED")
    assert tracker.runs[sweep.trial.hash].curves == {"train/loss": {1: 1.0, 3: 3.0}}
    assert background.lost == 1
    assert "1 updates did not arrive" in background.left()


def test_a_store_that_stays_away_does_not_hold_up_the_end(
    journaled, sweep, warnings, monkeypatch
) -> None:
    monkeypatch.setattr("knet_platform.tracking.journaled.CLOSE_SECONDS", 0.05)
    tracker = AbsentTracker()
    background = journaled(tracker)
    run(background, sweep)
    assert tracker.failed.wait(10)
    background.finish_sweep("FINISHED")
    assert (background.waiting, background.lost) == (4, 0)  # points, the trial's end, the sweep's
    assert background.unsent == 4
    assert "knet sync sends them (no answer)" in background.left()
    assert warnings == ["no answer"]


def test_the_next_run_first_sends_what_waits(
    journaled, sweep, tmp_path, warnings, monkeypatch
) -> None:
    monkeypatch.setattr("knet_platform.tracking.journaled.KILLED_SECONDS", 0.05)
    tracker = AbsentTracker()
    first = journaled(tracker)
    run(first, sweep)
    assert tracker.failed.wait(10)
    first.finish_sweep("KILLED")
    tracker.back.set()
    second = journaled(tracker)
    second.start_sweep(sweep.run)
    second.start_trial(sweep.trial, 2)
    second.log_points(sweep.trial.hash, [point(3)])
    second.close(10)
    assert list(tracker.runs[sweep.trial.hash].curves["train/loss"]) == [1, 2, 3]
    assert tracker.runs[sweep.trial.hash].status == "RUNNING"
    assert tracker.sweep_status == "RUNNING", "the earlier run's end came before this one's start"
    assert second.left() is None
    assert not list(tmp_path.glob("journal.db*"))


def test_a_trial_that_lost_an_update_is_not_marked_as_finished(
    journaled, sweep, monkeypatch
) -> None:
    """So that the next run of the sweep brings it whole from the store."""
    monkeypatch.setattr("knet_platform.tracking.journal.WAITING_BYTES", 20_000)
    tracker = AbsentTracker()
    background = journaled(tracker, max_bytes=16 * 4096)
    run(background, sweep, range(1, 1001))
    tracker.back.set()
    background.finish_sweep("FINISHED")
    assert background.lost > 0
    steps = list(tracker.runs[sweep.trial.hash].curves["train/loss"])
    assert steps == list(range(1, len(steps) + 1)), "the curve has no hole"
    assert tracker.status(sweep.trial.hash) == "RUNNING"


def test_a_store_that_is_not_there_at_the_start_is_an_error(journaled, sweep, tmp_path) -> None:
    class Absent(MemoryTracker):
        def start_sweep(self, sweep: SweepRun) -> None:
            raise TrackingError("no answer")

    with pytest.raises(TrackingError, match="no answer"):
        journaled(Absent()).start_sweep(sweep.run)
    assert not list(tmp_path.glob("journal.db*"))


def test_pauses_grow_and_differ() -> None:
    pauses = [[pause(failures) for _ in range(20)] for failures in (1, 3, 100)]
    assert max(pauses[0]) <= 1 < min(pauses[1]) <= max(pauses[1]) <= 4 < min(pauses[2])
    assert max(pauses[2]) <= 30
    assert len(set(pauses[2])) == 20


def test_a_record_of_a_later_version_is_left_out(tmp_path, sweep, warnings) -> None:
    journal = Journal(tmp_path / "s.db", warn=warnings.append)
    journal.append("log_video", "a")
    delivery = Delivery(journal, MemoryTracker(), warn=warnings.append)
    assert delivery.send_batch()
    assert (len(journal), delivery.refused) == (0, 1)
    assert "log_video" in warnings[0]
