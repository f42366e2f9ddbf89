"""What went wrong in a trial, told apart, and how each class of failures is met.

Free of torch and of Ray Train's controller: a policy is decided from what a worker raised, and
from how far the trial has come.
"""

from collections import Counter
from dataclasses import dataclass

from ray.exceptions import NodeDiedError, RayActorError, WorkerCrashedError
from ray.train import PreemptionError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckTimeoutError,
)

from knet_core import (
    CheckpointError,
    ConfigError,
    DataError,
    EvaluationMemoryError,
    KNetError,
    NonFiniteError,
    TrainingMemoryError,
)
from knet_platform.errors import StorageError
from knet_platform.storage import Cause

_CAUSES: tuple[tuple[Cause, tuple[type[Exception], ...]], ...] = (
    ("data", (DataError,)),
    ("configuration", (ConfigError, CheckpointError)),
    ("non_finite", (NonFiniteError,)),
    ("out_of_memory_training", (TrainingMemoryError,)),
    ("out_of_memory_evaluation", (EvaluationMemoryError,)),
    ("hang", (WorkerHealthCheckTimeoutError,)),
    (
        "preempted",
        (
            PreemptionError,
            RayActorError,
            NodeDiedError,
            WorkerCrashedError,
            WorkerGroupStartupFailedError,
            WorkerGroupStartupTimeoutError,
        ),
    ),
)
_STALLS: dict[Cause, int] = {"preempted": 8, "crash": 2, "out_of_memory_training": 2, "hang": 1}
"""Failures in a row without a new checkpoint after which a trial is tried again; others: none."""
_ACTIONS: dict[Cause, str] = {
    "data": "stopped every trial of the same data",
    "configuration": "stopped the arm",
}


def cause_of(error: Exception) -> Cause:
    """Return the class of what a worker or Ray raised."""
    for cause, kinds in _CAUSES:
        if isinstance(error, kinds):
            return cause
    # Raised where the core does not expect it, and by Ray where a node has none left.
    return "out_of_memory_training" if type(error).__name__ == "OutOfMemoryError" else "crash"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """How a trial goes on after a failure."""

    retry: bool
    action: str
    """In a few words."""


class Policy:
    """Decides, failure by failure, how one trial goes on."""

    def __init__(self) -> None:
        self.images_at_once: int | None = None
        """Images of a worker that its memory has proved to allow; None: as the recipe asks."""
        self._stalls: Counter[Cause] = Counter()
        self._step = 0

    def decide(self, cause: Cause, error: Exception, step: int) -> Decision:
        """Decide on a failure.

        Args:
            cause: Its class.
            error: What was raised.
            step: Of the newest checkpoint.
        """
        if step > self._step:  # a hang is met once, whatever was reached since
            self._stalls = Counter({"hang": self._stalls["hang"]})
            self._step = step
        self._stalls[cause] += 1
        if isinstance(error, TrainingMemoryError) and error.fewer is not None:
            self.images_at_once = error.fewer
            action = f"same batch in pieces of {error.fewer}, from step {step}"
            return Decision(retry=True, action=action)
        if not _explains_itself(error) and self._stalls[cause] <= _STALLS.get(cause, 0):
            return Decision(retry=True, action=f"retried from step {step}")
        return Decision(retry=False, action=_ACTIONS.get(cause, "stopped the trial"))


def _explains_itself(error: Exception) -> bool:
    """Tell whether the same would happen again: our own errors, but for a store out of reach."""
    return isinstance(error, KNetError) and not isinstance(error, StorageError)
