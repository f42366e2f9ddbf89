"""When an elastic trial starts and changes its number of workers; nothing of Ray runs.

That Ray Train does as it is told is seen in `end_to_end/test_nodes.py`.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.train
from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import (
    ResourceRequestPriority,
)
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision

from knet_platform import groups
from knet_platform.groups import ElasticPolicy, Trainer


class Coordinator:
    """Stands for Ray's: says what is reserved for the least of the trial, and for more."""

    def __init__(self, least: int, further: int) -> None:
        self.asked: dict[str, tuple[int, int]] = {}
        self._cpus = {"train": least, "train-further": further}
        self.get_reserved_resources = SimpleNamespace(remote=self._reserved)
        self.request_resources = SimpleNamespace(remote=self._request)
        self.cancel_request = SimpleNamespace(remote=self.asked.pop)

    def _reserved(self, requester: str) -> dict[str, Any]:
        return {"node": {"CPU": float(self._cpus[requester])}}

    def _request(self, *, requester_id: str, resources: list[Any], **options: Any) -> None:
        self.asked[requester_id] = (len(resources), options["priority"].value)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(groups, "time", clock)
    return clock


Make = Callable[[Coordinator, int], ElasticPolicy]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Make:
    """Return what makes the policy of a trial with 2, 4 or 8 workers."""
    config: Any = ray.train.ScalingConfig(
        num_workers=(2, 8),  # type: ignore[arg-type]
        resources_per_worker={"CPU": 1},
    )

    def make(coordinator: Coordinator, free: int) -> ElasticPolicy:
        monkeypatch.setattr(ray, "get", lambda value, timeout=None: value)
        monkeypatch.setattr(groups, "available_resources_per_node", lambda: {"n": {"CPU": free}})
        policy = ElasticPolicy(config, (2, 4, 8))
        policy._requester_id = "train"
        client: Any = SimpleNamespace(
            _autoscaling_coordinator=coordinator,
            maybe_send_resource_request=lambda config, count: coordinator._request(
                requester_id="train",
                resources=[{}] * count,
                priority=ResourceRequestPriority.HIGH,
            ),
            cancel_resource_request=lambda: coordinator.asked.pop("train"),
        )
        policy._coordinator_client = client
        return policy

    return make


def size(decision: Any) -> int | None:
    assert isinstance(decision, NoopDecision | ResizeDecision)
    return decision.num_workers if isinstance(decision, ResizeDecision) else None


@pytest.mark.parametrize(
    ("least", "further", "free", "expected"),
    [
        (0, 0, 8, None),
        (1, 0, 8, None),
        (2, 0, 8, 2),
        (2, 1, 8, 2),
        (2, 2, 8, 4),
        (2, 5, 8, 4),
        (2, 6, 8, 8),
        (2, 6, 7, 4),  # others have not made room yet, or a node died
        (2, 6, 1, None),
    ],
)
def test_a_group_starts_with_a_number_that_shares_the_batch_or_waits(
    make: Make, clock: Clock, least: int, further: int, free: int, expected: int | None
) -> None:
    policy = make(Coordinator(least, further), free)
    began = clock.now
    while clock.now < began + 10:
        before = clock.now
        assert size(policy.make_decision_for_non_running_worker_group()) is None
        assert clock.now > before, "waits without taking a processor"
    assert size(policy.make_decision_for_non_running_worker_group()) == expected


def polled(*, saved: bool, step: int = 8) -> Any:
    checkpoint = f"checkpoint_{step}" if saved else None
    report = SimpleNamespace(checkpoint=checkpoint, metrics={"step": step, "total": 12})
    first, second = SimpleNamespace(training_report=report), SimpleNamespace(training_report=None)
    return SimpleNamespace(worker_statuses={0: first, 1: second})


@pytest.mark.parametrize(
    ("least", "further", "free", "saved", "expected"),
    [
        (2, 6, 4, False, None),
        (2, 6, 4, True, 8),
        (2, 6, 3, True, None),  # reserved, and not free yet
        (2, 3, 4, True, None),
        (2, 0, 0, True, 2),  # others lack their least
        (2, 0, 0, False, None),
        (1, 0, 0, True, None),
    ],
)
def test_a_group_of_four_changes_when_its_work_has_just_been_saved(
    make: Make, least: int, further: int, free: int, saved: bool, expected: int | None
) -> None:
    policy = make(Coordinator(least, further), free)
    running: Any = SimpleNamespace(start_time=0.0, num_workers=4)
    decision = policy.make_decision_for_running_worker_group(running, polled(saved=saved))
    assert size(decision) == expected


def test_a_group_does_not_grow_at_the_end(make: Make) -> None:
    policy = make(Coordinator(2, 6), 4)
    running: Any = SimpleNamespace(start_time=0.0, num_workers=4)
    done = polled(saved=True, step=12)
    assert size(policy.make_decision_for_running_worker_group(running, done)) is None


def test_a_trials_least_comes_before_the_growth_of_others(make: Make) -> None:
    policy = make(coordinator := Coordinator(0, 0), 0)
    policy.make_decision_for_non_running_worker_group()
    assert coordinator.asked == {"train": (2, 10), "train-further": (6, 0)}
    policy._cancel_resource_request()
    assert coordinator.asked == {}


def test_only_an_elastic_trial_gives_up_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1e6")
    fixed = ray.train.ScalingConfig(num_workers=2)
    Trainer([2], print, on_report=print, on_restart=print, scaling_config=fixed)
    assert groups.os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == "1e6"
    elastic: Any = ray.train.ScalingConfig(num_workers=(2, 4))  # type: ignore[arg-type]
    Trainer([2, 4], print, on_report=print, on_restart=print, scaling_config=elastic)
    assert groups.os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == "60"
