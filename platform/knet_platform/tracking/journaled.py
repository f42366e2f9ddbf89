"""A tracker that never makes anyone wait: first into the journal, then sent from a thread."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from knet_platform.errors import TrackingError
from knet_platform.tracking.delivery import Delivery, pause
from knet_platform.tracking.journal import MAX_BYTES, Journal, JournalFullError
from knet_platform.tracking.protocol import (
    PointLike,
    Status,
    SweepRun,
    Tracker,
    TrialModel,
    TrialRun,
)

CLOSE_SECONDS = 20.0
"""Longest wait for the last updates of a sweep."""
KILLED_SECONDS = 2.0
"""The same where the sweep is stopped: Ray kills a job's process 3 s after SIGTERM."""


class JournaledTracker:
    """Writes each call down, then passes it on until it has arrived; implements `Tracker`.

    `start_sweep`, `status` and the addresses are answered at once and raise; the rest returns
    when the call is in the journal, and never raises. What an earlier process left in the journal
    is sent first.

    Args:
        tracker: Keeps what it is told.
        address: Of its store.
        path: The journal's file.
        warn: Told once why something did not arrive at once, and of each thing that went wrong
            with the journal.
        pause: Returns the seconds to wait after a number of failures in a row.
        max_bytes: Most that the journal takes on the disk.
    """

    def __init__(
        self,
        tracker: Tracker,
        address: str,
        path: Path,
        *,
        warn: Callable[[str], None],
        pause: Callable[[int], float] = pause,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._tracker = tracker
        self._address = address
        self._path = path
        self._warn = warn
        self._pause = pause
        self._max_bytes = max_bytes
        self._changed = threading.Condition()
        self._deadline: float | None = None
        self._journal: Journal | None = None
        self._incomplete: set[str] = set()
        """Trials of which something is lost: what follows must not hide it."""
        self._thread: threading.Thread | None = None
        self.lost = 0
        """Updates that nothing keeps any more."""
        self.waiting = 0
        """Updates that the journal keeps, after the sweep has ended."""
        self.problem: str | None = None
        """The first reason why an update did not arrive at once."""

    @property
    def unsent(self) -> int:
        """Return how many updates the journal keeps."""
        return 0 if self._journal is None else len(self._journal)

    def start_sweep(self, sweep: SweepRun) -> None:
        """Find or create the sweep's run, and begin to send."""
        self._tracker.start_sweep(sweep)
        self._journal = Journal(self._path, warn=self._warn, max_bytes=self._max_bytes)
        self._journal.describe(self._address, sweep)
        if len(self._journal):  # after what an earlier run left, such as that it was stopped
            self._append("start_sweep", sweep=asdict(sweep))
        self._delivery = Delivery(self._journal, self._tracker, warn=self._note)
        self._thread = threading.Thread(target=self._deliver, name="tracking", daemon=True)
        self._thread.start()

    def status(self, trial_hash: str) -> Status | None:
        """Return how a trial's run stands."""
        return self._tracker.status(trial_hash)

    def start_trial(self, trial: TrialRun, attempt: int, *, at: float | None = None) -> None:
        """Find or create a trial's run."""
        self._append(
            "start_trial", trial.hash, trial=asdict(trial), attempt=attempt, at=_or_now(at)
        )

    def log_points(self, trial_hash: str, points: Sequence[PointLike]) -> None:
        """Add to a trial's curves."""
        if points:
            values = [
                {"step": point.step, "time": point.time, "metrics": dict(point.metrics)}
                for point in points
            ]
            self._append("log_points", trial_hash, points=values)

    def log_picture(self, trial_hash: str, step: int, png: bytes) -> None:
        """Add a picture to a trial's run."""
        self._append("log_picture", trial_hash, content=png, step=step)

    def log_file(self, trial_hash: str, name: str, content: bytes) -> None:
        """Attach a file to a trial's run."""
        self._append("log_file", trial_hash, content=content, name=name)

    def log_model(self, trial_hash: str, model: TrialModel) -> None:
        """Add a finished trial's model to its run."""
        self._append("log_model", trial_hash, model=asdict(model))

    def finish_trial(
        self, trial_hash: str, status: Status, reason: str = "", *, at: float | None = None
    ) -> None:
        """Close a trial's run."""
        self._append("finish_trial", trial_hash, status=status, reason=reason, at=_or_now(at))

    def finish_sweep(
        self, status: Status, artifacts: Sequence[Path] = (), *, at: float | None = None
    ) -> None:
        """Close the sweep's run, and wait a while for everything sent before to arrive."""
        paths = [str(path.absolute()) for path in artifacts]
        self._append("finish_sweep", status=status, artifacts=paths, at=_or_now(at))
        self.close(KILLED_SECONDS if status == "KILLED" else CLOSE_SECONDS)

    def sweep_url(self) -> str | None:
        """Return the address of the sweep's own page."""
        return self._tracker.sweep_url()

    def compare_url(self) -> str | None:
        """Return the address of a page that compares the trials."""
        return self._tracker.compare_url()

    def close(self, seconds: float) -> None:
        """Send what is left, for at most `seconds`; the journal keeps the rest."""
        if self._thread is None or self._journal is None:
            return
        with self._changed:
            self._deadline = time.monotonic() + seconds
            self._changed.notify_all()
        self._thread.join(seconds)
        self._thread = None
        self._journal.close()
        self.lost += self._delivery.refused + self._journal.unwritten
        self.waiting = len(self._journal) - self._journal.unwritten

    def left(self) -> str | None:
        """Return in one line what did not arrive and what to do about it; None if all did."""
        parts = []
        if self.waiting:
            parts.append(f"{self.waiting} updates wait in {self._path}; knet sync sends them")
        if self.lost:
            parts.append(
                f"{self.lost} updates did not arrive; every result is in the store, and the same "
                f"command brings MLflow up to date"
            )
        return f"{'; '.join(parts)} ({self.problem})" if parts else None

    def _append(
        self, kind: str, trial: str = "", /, *, content: bytes = b"", **values: Any
    ) -> None:
        assert self._journal is not None, "start_sweep comes first"
        if trial in self._incomplete:
            self.lost += 1
            return
        try:
            self._journal.append(kind, trial, content=content, **values)
        except JournalFullError as error:
            self.lost += 1
            self._incomplete.add(trial)
            self._note(str(error))
        with self._changed:
            self._changed.notify_all()

    def _deliver(self) -> None:
        journal, failures = self._journal, 0
        assert journal is not None, "start_sweep comes first"
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(journal) or self._deadline is not None)
            try:
                if not self._delivery.send_batch() and self._deadline is not None:
                    return  # nothing is left of a sweep that ends
                failures = 0
            except TrackingError as error:
                failures += 1
                self._note(str(error))
                if not self._wait(self._pause(failures)):
                    return

    def _wait(self, seconds: float) -> bool:
        """Wait, less long once the sweep ends; tell whether another attempt is worth it."""
        with self._changed:
            if self._deadline is None:
                self._changed.wait_for(lambda: self._deadline is not None, seconds)
                return True
            left = self._deadline - time.monotonic()
            self._changed.wait(max(0.0, min(left, seconds)))
            return left > 0

    def _note(self, problem: str) -> None:
        if self.problem is None:
            self.problem = problem
            self._warn(problem)


def _or_now(at: float | None) -> float:
    return time.time() if at is None else at
