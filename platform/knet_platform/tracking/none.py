"""A tracker that keeps nothing, for runs that nobody wants tracked."""

from collections.abc import Sequence
from pathlib import Path

from knet_platform.tracking.protocol import (
    PointLike,
    Status,
    SweepRun,
    TrialModel,
    TrialRun,
)


class NoTracker:
    """Implements `Tracker`; results, curves and pictures are in the store all the same."""

    unsent = waiting = lost = 0

    def start_sweep(self, sweep: SweepRun) -> None:
        """Do nothing."""

    def status(self, trial_hash: str) -> Status | None:
        """Return None: no trial has a run."""
        return None

    def start_trial(self, trial: TrialRun, attempt: int, *, at: float | None = None) -> None:
        """Do nothing."""

    def log_points(self, trial_hash: str, points: Sequence[PointLike]) -> None:
        """Do nothing."""

    def log_picture(self, trial_hash: str, step: int, png: bytes) -> None:
        """Do nothing."""

    def log_file(self, trial_hash: str, name: str, content: bytes) -> None:
        """Do nothing."""

    def log_model(self, trial_hash: str, model: TrialModel) -> None:
        """Do nothing."""

    def finish_trial(
        self, trial_hash: str, status: Status, reason: str = "", *, at: float | None = None
    ) -> None:
        """Do nothing."""

    def finish_sweep(
        self, status: Status, artifacts: Sequence[Path] = (), *, at: float | None = None
    ) -> None:
        """Do nothing."""

    def sweep_url(self) -> str | None:
        """Return None: there is no page."""
        return None

    def compare_url(self) -> str | None:
        """Return None: there is no page."""
        return None

    def left(self) -> str | None:
        """Return None: nothing waits for a store."""
        return None
