"""Delivery to a tracker from a thread, so that a slow or absent store never stops training."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from knet_platform.errors import TrackingError
from knet_platform.planning import Sweep, Trial
from knet_platform.tracking.protocol import PointLike, RejectedError, Status, Tracker

RETRY_SECONDS = 5.0
CLOSE_SECONDS = 20.0
"""Longest wait for the last updates of a sweep."""
KILLED_SECONDS = 2.0
"""The same where the sweep is stopped: Ray kills a job's process 3 s after SIGTERM."""


class BackgroundTracker:
    """Passes calls on in order; what fails for want of an answer is sent again until it arrives.

    `start_sweep`, `status` and `compare_url` are answered at once and raise; the rest never
    raises. `lost` counts the updates that never arrived.

    Args:
        tracker: Does the work.
        warn: Told once, when the first update does not arrive.
        retry_seconds: Pause after an update that did not arrive.
    """

    def __init__(
        self,
        tracker: Tracker,
        *,
        warn: Callable[[str], None],
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        self._tracker = tracker
        self._warn = warn
        self._retry_seconds = retry_seconds
        self._pending: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._deadline: float | None = None
        self._thread: threading.Thread | None = None
        self.lost = 0
        self.problem: str | None = None
        """The first reason why an update did not arrive at once."""

    def start_sweep(self, sweep: Sweep) -> None:
        """Find or create the sweep's run."""
        self._tracker.start_sweep(sweep)
        self._thread = threading.Thread(target=self._deliver, name="tracking", daemon=True)
        self._thread.start()

    def status(self, trial_hash: str) -> Status | None:
        """Return how a trial's run stands."""
        return self._tracker.status(trial_hash)

    def start_trial(self, trial: Trial, attempt: int) -> None:
        """Find or create a trial's run."""
        self._send(lambda: self._tracker.start_trial(trial, attempt))

    def log_points(self, trial_hash: str, points: Sequence[PointLike]) -> None:
        """Add to a trial's curves."""
        self._send(lambda: self._tracker.log_points(trial_hash, points))

    def log_picture(self, trial_hash: str, step: int, png: bytes) -> None:
        """Add a picture to a trial's run."""
        self._send(lambda: self._tracker.log_picture(trial_hash, step, png))

    def log_file(self, trial_hash: str, name: str, content: bytes) -> None:
        """Attach a file to a trial's run."""
        self._send(lambda: self._tracker.log_file(trial_hash, name, content))

    def finish_trial(self, trial_hash: str, status: Status, reason: str = "") -> None:
        """Close a trial's run."""
        self._send(lambda: self._tracker.finish_trial(trial_hash, status, reason))

    def finish_sweep(self, status: Status, artifacts: Sequence[Path] = ()) -> None:
        """Close the sweep's run, and wait a while for everything sent before to arrive."""
        self._send(lambda: self._tracker.finish_sweep(status, artifacts))
        self.close(KILLED_SECONDS if status == "KILLED" else CLOSE_SECONDS)

    def compare_url(self) -> str | None:
        """Return the address of a page that compares the trials."""
        return self._tracker.compare_url()

    def close(self, seconds: float) -> None:
        """Deliver what is left, for at most `seconds`, and count the rest as lost."""
        with self._changed:
            self._deadline = time.monotonic() + seconds
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(seconds)
            self._thread = None
        with self._changed:
            self.lost += len(self._pending)
            self._pending.clear()

    def _send(self, update: Callable[[], None]) -> None:
        with self._changed:
            self._pending.append(update)
            self._changed.notify_all()

    def _deliver(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._deadline is not None)
                if not self._pending:
                    return
                update = self._pending[0]
            try:
                update()
            except RejectedError as error:
                self.lost += 1
                self._note(error)
            except TrackingError as error:
                self._note(error)
                if self._gives_up():
                    return
                continue
            with self._changed:
                if self._pending:  # else closed meanwhile, and counted
                    self._pending.popleft()

    def _gives_up(self) -> bool:
        with self._changed:
            if self._deadline is None:
                self._changed.wait_for(lambda: self._deadline is not None, self._retry_seconds)
                return False
            left = self._deadline - time.monotonic()
            self._changed.wait(max(0.0, min(left, self._retry_seconds)))
            return left <= 0

    def _note(self, error: TrackingError) -> None:
        if self.problem is None:
            self.problem = str(error)
            self._warn(self.problem)
