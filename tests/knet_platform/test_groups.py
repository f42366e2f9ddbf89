"""When an elastic trial starts and changes its number of workers; nothing of Ray runs.

That Ray Train does as it is told is seen in `end_to_end/test_nodes.py`.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.train
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision

from knet_platform import groups
from knet_platform.groups import ElasticPolicy, make_trainer


class Cluster:
    """Stands for Ray's coordinator: says what is reserved for the trial."""

    def __init__(self, *cpus: int) -> None:
        self.cpus = cpus
        self.looked_anew: list[bool] = []
        self.get_reserved_resources = SimpleNamespace(remote=self._reserved)

    def _reserved(self, requester: str, recompute: bool = False) -> dict[str, Any]:
        self.looked_anew.append(recompute)
        return {f"node{index}": {"CPU": float(cpus)} for index, cpus in enumerate(self.cpus)}


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch) -> ElasticPolicy:
    """One of a trial with 2, 4 or 8 workers; it waits for nothing and asks every time."""
    monkeypatch.setattr(ray, "get", lambda value, timeout=None: value)
    monkeypatch.setattr(groups, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr(ElasticPolicy, "GET_RESERVED_RESOURCES_INTERVAL_S", 0)
    config: Any = ray.train.ScalingConfig(
        num_workers=(2, 8),  # type: ignore[arg-type]
        resources_per_worker={"CPU": 1},
        elastic_resize_monitor_interval_s=0,  # type: ignore[call-arg]
    )
    return ElasticPolicy(config, (2, 4, 8))


def seen_by(policy: ElasticPolicy, cluster: Cluster) -> None:
    client = SimpleNamespace(
        _autoscaling_coordinator=cluster, maybe_send_resource_request=lambda *arguments: None
    )
    policy._coordinator_client = client  # type: ignore[assignment]


def size(decision: Any) -> int | None:
    assert isinstance(decision, NoopDecision | ResizeDecision)
    return decision.num_workers if isinstance(decision, ResizeDecision) else None


@pytest.mark.parametrize(
    ("cpus", "expected"),
    [((1,), None), ((), None), ((3,), 2), ((2, 3), 4), ((4, 3), 4), ((4, 4), 8), ((9, 9), 8)],
)
def test_a_group_starts_with_a_number_that_shares_the_batch_or_waits(
    policy: ElasticPolicy, cpus: tuple[int, ...], expected: int | None
) -> None:
    seen_by(policy, cluster := Cluster(*cpus))
    assert size(policy.make_decision_for_non_running_worker_group()) == expected
    assert cluster.looked_anew[0], "not what was reserved before a node died"


def polled(*, saved: bool) -> Any:
    report = SimpleNamespace(checkpoint="checkpoint_8" if saved else None)
    first, second = SimpleNamespace(training_report=report), SimpleNamespace(training_report=None)
    return SimpleNamespace(worker_statuses={0: first, 1: second})


@pytest.mark.parametrize(
    ("cpus", "saved", "expected"),
    [((4, 4), False, None), ((4, 4), True, 8), ((5,), True, None), ((7,), True, None)],
)
def test_a_group_grows_when_its_work_has_just_been_saved(
    policy: ElasticPolicy, cpus: tuple[int, ...], saved: bool, expected: int | None
) -> None:
    seen_by(policy, Cluster(*cpus))
    running: Any = SimpleNamespace(start_time=0.0, num_workers=4)
    decision = policy.make_decision_for_running_worker_group(running, polled(saved=saved))
    assert size(decision) == expected


def test_only_an_elastic_trial_gives_up_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1e6")
    fixed = ray.train.ScalingConfig(num_workers=2)
    make_trainer([2], print, scaling_config=fixed)
    assert groups.os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == "1e6"
    elastic: Any = ray.train.ScalingConfig(num_workers=(2, 4))  # type: ignore[arg-type]
    make_trainer([2, 4], print, scaling_config=elastic)
    assert groups.os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == "60"
