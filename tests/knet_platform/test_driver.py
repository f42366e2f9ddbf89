"""Which of several errors is named, how short memory is met, and which cluster is ours."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.tune
from ray.exceptions import RayActorError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerHealthCheckFailedError,
)

from knet_core import DataError, TrainingMemoryError
from knet_platform import attempts
from knet_platform.cluster import HEAD
from knet_platform.driver import (
    TrialJob,
    _one_line,
    _told_by_workers,
    run_trial,
    scaling,
)
from knet_platform.storage import Group, Store, TrialStore

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


def job_with(workers: list[int], gpus: float = 0) -> TrialJob:
    return TrialJob(
        trial_hash="0123456789abcdef", recipe={}, store_uri="", run_id="run",
        workers=workers, cpus_per_worker=2, gpus_per_worker=gpus, hang_minutes=0, retention={},
        most_evaluations=None, usd_per_worker_hour=None, data_fingerprint="", cache={},
    )  # fmt: skip


def leave_checkpoint(store: TrialStore, seconds: float) -> None:
    state = {
        "format": 1, "step": 8, "epoch": 1.0, "categories": [], "metrics": {"val/AP": 0.5},
        "evaluations": [], "seconds": seconds, "num_parameters": 1,
    }  # fmt: skip
    for name in ("model.safetensors", "trainer.pt", "recipe.yaml", "state.json"):
        store.write_bytes(f"checkpoint_8/{name}", json.dumps(state).encode())


def test_how_little_memory_a_result_took_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path)).trial("0123456789abcdef")
    attempts.claim(store, "run")
    reported: list[dict[str, Any]] = []
    monkeypatch.setattr(ray.tune, "report", reported.append)

    def train(
        job: TrialJob, store: TrialStore, attempt: int, images_at_once: int | None
    ) -> tuple[str, bool]:
        if images_at_once != 1:
            raise TrainingMemoryError("no memory", 1 if images_at_once == 2 else 2)
        store.add_group(Group(workers=1, seconds=0.0))
        leave_checkpoint(store, seconds=1.0)
        return "cpu", True

    job = replace(job_with([1]), store_uri=str(tmp_path))
    run_trial(job.to_config(), train=train)
    result = store.result()
    assert result is not None
    assert result.micro_batch == 1
    assert [item.get("attempt") for item in reported] == [1, None, 2, None, 3, None]
    assert reported[-1]["outcome"] == "finished"


def test_workers_come_all_at_once_on_few_nodes_and_nothing_beside_them() -> None:
    """What a driver itself takes is `cluster.HEAD`: a sliver of the head, no CPU and no GPU."""
    found = scaling(job_with([4], gpus=1))
    assert (found.num_workers, found.placement_strategy, found.use_gpu) == (4, "PACK", True)
    assert found.total_resources == {"CPU": 8, "GPU": 4}
    assert set(HEAD) == {"node:__internal_head__"}
    alone = scaling(job_with([1]))
    assert (alone.use_gpu, alone.total_resources) == (False, {"CPU": 2})
    assert scaling(job_with([2, 4, 8])).num_workers == (2, 8)


def test_what_a_trial_costs_counts_every_groups_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path)).trial("0123456789abcdef")
    attempts.claim(store, "run")
    monkeypatch.setattr(ray.tune, "report", lambda values: None)

    def train(
        job: TrialJob, store: TrialStore, attempt: int, images_at_once: int | None
    ) -> tuple[str, bool]:
        for workers, seconds in ((4, 0), (8, 3600), (2, 1800), (2, 2400)):  # the second is lost
            store.add_group(Group(workers=workers, seconds=seconds))
        leave_checkpoint(store, seconds=5400)
        return "cuda", True

    job = replace(job_with([2, 4, 8], gpus=1), store_uri=str(tmp_path), usd_per_worker_hour=3.0)
    run_trial(job.to_config(), train=train)
    result = store.result()
    assert result is not None
    assert (result.earlier_workers, result.workers) == ((4,), 2)
    assert result.metrics["sys/gpu_hours"] == pytest.approx(0.5 * 4 + 1.0 * 2)
    assert result.metrics["cost/usd"] == pytest.approx(4.0 * 3)
