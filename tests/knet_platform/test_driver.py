"""Of several workers' errors the one that explains the others is named; which cluster is ours."""

import pytest
import ray
from ray.exceptions import RayActorError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerHealthCheckFailedError,
)

from knet_core import DataError
from knet_platform.driver import _name_cluster, _one_line, _told_by_workers

SYMPTOM = UserExceptionWithTraceback(RuntimeError("connection closed\nby peer"), "traceback")
DEATH = WorkerHealthCheckFailedError("a check failed", RayActorError())
OURS = UserExceptionWithTraceback(DataError("image.jpg: cut short"), "traceback")


@pytest.mark.parametrize(
    ("failures", "line"),
    [
        ((SYMPTOM,), "RuntimeError: connection closed"),
        ((SYMPTOM, DEATH), f"RayActorError: {RayActorError()}".splitlines()[0]),
        ((SYMPTOM, DEATH, OURS), "image.jpg: cut short"),
    ],
)
def test_the_telling_error_is_one_line(failures: tuple[Exception, ...], line: str) -> None:
    error = WorkerGroupError("several", dict(enumerate(failures)))
    assert _one_line(_told_by_workers(error)) == line


def test_a_controllers_failure_is_its_cause() -> None:
    assert (
        _one_line(_told_by_workers(ControllerError(ValueError("no node"))))
        == "ValueError: no node"
    )


@pytest.mark.ray
def test_ray_trains_processes_are_told_which_cluster_is_theirs(
    ray_cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else they ask the machine's newest cluster, which knows no controller of ours."""
    monkeypatch.setenv("RAY_ADDRESS", "of another cluster")
    _name_cluster()
    there = get_env_vars_to_propagate()["RAY_ADDRESS"]
    assert there == ray.get_runtime_context().gcs_address
