"""A tracker in memory: for tests, and as the plainest statement of the rules."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from knet_platform.tracking.protocol import (
    PointLike,
    Status,
    SweepRun,
    TrialModel,
    TrialRun,
)


@dataclass(kw_only=True)
class Run:
    """What is known of one trial."""

    name: str
    status: Status
    attempt: int
    reason: str = ""
    curves: dict[str, dict[int, float]] = field(default_factory=dict)
    """Metric name to values by step."""
    pictures: dict[int, bytes] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    model: TrialModel | None = None


class MemoryTracker:
    """Implements `Tracker`."""

    unsent = 0

    def __init__(self) -> None:
        self.sweep: SweepRun | None = None
        self.sweep_status: Status | None = None
        self.runs: dict[str, Run] = {}
        self.artifacts: list[Path] = []

    def start_sweep(self, sweep: SweepRun) -> None:
        """Remember the sweep."""
        self.sweep, self.sweep_status = sweep, "RUNNING"

    def status(self, trial_hash: str) -> Status | None:
        """Return how a trial stands."""
        run = self.runs.get(trial_hash)
        return run.status if run else None

    def start_trial(self, trial: TrialRun, attempt: int, *, at: float | None = None) -> None:
        """Find or create a run."""
        run = self.runs.setdefault(
            trial.hash, Run(name=trial.name, status="RUNNING", attempt=attempt)
        )
        run.status, run.attempt, run.reason = "RUNNING", attempt, ""

    def log_points(self, trial_hash: str, points: Sequence[PointLike]) -> None:
        """Add what lies beyond the curves' ends."""
        curves = self.runs[trial_hash].curves
        for point in points:
            for name, value in point.metrics.items():
                curve = curves.setdefault(name, {})
                if point.step > max(curve, default=-1):
                    curve[point.step] = value

    def log_picture(self, trial_hash: str, step: int, png: bytes) -> None:
        """Keep a picture."""
        self.runs[trial_hash].pictures[step] = png

    def log_file(self, trial_hash: str, name: str, content: bytes) -> None:
        """Keep a file."""
        self.runs[trial_hash].files[name] = content

    def log_model(self, trial_hash: str, model: TrialModel) -> None:
        """Keep a model."""
        self.runs[trial_hash].model = model

    def finish_trial(
        self, trial_hash: str, status: Status, reason: str = "", *, at: float | None = None
    ) -> None:
        """Close a run."""
        run = self.runs[trial_hash]
        run.status, run.reason = status, reason

    def finish_sweep(
        self, status: Status, artifacts: Sequence[Path] = (), *, at: float | None = None
    ) -> None:
        """Close the sweep."""
        self.sweep_status = status
        self.artifacts = list(artifacts)

    def sweep_url(self) -> str | None:
        """Return None: there is no page."""
        return None

    def compare_url(self) -> str | None:
        """Return None: there is no page."""
        return None
