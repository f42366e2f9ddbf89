"""Each class of failures has its policy; what it does to real trials is in `test_faults`."""

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError

from knet_core import (
    CheckpointError,
    ConfigError,
    DataError,
    EvaluationMemoryError,
    NonFiniteError,
    TrainingMemoryError,
)
from knet_platform.errors import StorageError
from knet_platform.failures import Policy, cause_of


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (DataError("a.jpg: cut short"), "data"),
        (ConfigError("model.stages: ..."), "configuration"),
        (CheckpointError("nowhere"), "configuration"),
        (NonFiniteError("nan"), "non_finite"),
        (TrainingMemoryError("no memory", None), "out_of_memory_training"),
        (OutOfMemoryError("the node's memory monitor"), "out_of_memory_training"),
        (EvaluationMemoryError("no memory"), "out_of_memory_evaluation"),
        (ActorDiedError(), "preempted"),
        (WorkerHealthCheckTimeoutError("no answer"), "hang"),
        (RuntimeError("a bug"), "crash"),
        (StorageError("s3: gone"), "crash"),
    ],
)
def test_errors_are_told_apart(error: Exception, cause: str) -> None:
    assert cause_of(error) == cause


def retries(error: Exception, steps: list[int]) -> list[bool]:
    """Return what is decided when the same error follows checkpoints of these steps."""
    policy = Policy()
    return [policy.decide(cause_of(error), error, step).retry for step in steps]


def test_a_preempted_trial_is_tried_for_ever_as_long_as_it_gets_on() -> None:
    assert all(retries(ActorDiedError(), list(range(0, 200, 2))))
    assert retries(ActorDiedError(), [10] * 9) == [True] * 8 + [False]


@pytest.mark.parametrize("error", [RuntimeError("a bug"), StorageError("s3: gone")])
def test_what_nobody_explains_is_tried_twice_without_progress(error: Exception) -> None:
    assert retries(error, [0, 0, 0]) == [True, True, False]
    assert retries(error, [0, 0, 5, 5, 5]) == [True, True, True, True, False]


def test_a_hang_is_met_once_whatever_was_reached_since() -> None:
    assert retries(WorkerHealthCheckTimeoutError("no answer"), [0, 50]) == [True, False]


@pytest.mark.parametrize(
    ("error", "action"),
    [
        (DataError("a.jpg: cut short"), "stopped every trial of the same data"),
        (ConfigError("model.stages: ..."), "stopped the arm"),
        (NonFiniteError("nan"), "stopped the trial"),
        (EvaluationMemoryError("no memory"), "stopped the trial"),
        (TrainingMemoryError("no memory", None), "stopped the trial"),
    ],
)
def test_what_would_happen_again_is_not_tried_again(error: Exception, action: str) -> None:
    decision = Policy().decide(cause_of(error), error, 5)
    assert (decision.retry, decision.action) == (False, action)


def test_pieces_grow_smaller_until_they_fit_and_stay_so() -> None:
    policy = Policy()
    for fewer in (4, 2, 1):
        error = TrainingMemoryError("no memory", fewer)
        decision = policy.decide("out_of_memory_training", error, 10)
        assert (decision.retry, policy.images_at_once) == (True, fewer)
    assert decision.action == "same batch in pieces of 1, from step 10"
    policy.decide("preempted", ActorDiedError(), 20)
    assert policy.images_at_once == 1
