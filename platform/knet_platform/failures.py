"""What went wrong in a trial, told apart: each class of failures has a policy of its own."""

from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    WorkerCrashedError,
)

from knet_core import CheckpointError, ConfigError, DataError, NonFiniteError
from knet_platform.storage import Cause

_LOST = (ActorDiedError, ActorUnavailableError, NodeDiedError, WorkerCrashedError)


def cause_of(error: Exception) -> Cause:
    """Return the class of what a worker or Ray raised."""
    if isinstance(error, DataError):
        return "data"
    if isinstance(error, ConfigError | CheckpointError):
        return "configuration"
    if isinstance(error, NonFiniteError):
        return "non_finite"
    return "preempted" if isinstance(error, _LOST) else "crash"
