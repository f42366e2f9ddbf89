"""One Ray Tune trial: fits one `TorchTrainer`, retries what may pass, records how it ended.

The folder of a trial is also Ray Train's run folder, so whatever restarts - a worker, this
driver, the whole sweep - Ray Train finds the newest checkpoint and goes on from it.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import ray.train
import ray.tune
from ray.exceptions import RayError
from ray.train.v2._internal.exceptions import RayTrainError

from knet_core import KNetError
from knet_platform.attempts import SupersededError, begin, is_pruned, may_go_on, verify
from knet_platform.failures import Policy, cause_of
from knet_platform.storage import Failure, Store, TrialResult, TrialStore
from knet_platform.worker import hang_reports, train_worker

_RAYS_RECORD = "checkpoint_manager_snapshot.json"
"""Where Ray Train notes a run's checkpoints; the store knows better (docs/design/storage.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialJob:
    """What a driver needs to know, in plain values."""

    trial_hash: str
    recipe: dict[str, Any]
    data_fingerprint: str
    """Of the data set when the trial was planned."""
    cache: dict[str, Any]
    """Where workers keep a data set that they fetch: `folder` and `gb`, see `staging.Cache`."""
    store_uri: str
    run_id: str
    """The run of the sweep that started the trial; see `attempts`."""
    workers: Sequence[int]
    """Numbers of them that it may train with, ascending; of several, as many as have room."""
    cpus_per_worker: float
    gpus_per_worker: float
    hang_minutes: float
    """Without a step; 0 waits for ever."""
    retention: dict[str, Any]
    """A `Retention`."""
    most_evaluations: int | None
    """After which a member of a population waits for the others; None: it trains to its end."""
    usd_per_worker_hour: float | None
    """None where the sweep names no price."""

    def to_config(self) -> dict[str, Any]:
        """Return what Tune takes.

        One string: Tune copies, flattens and writes down every value of it at each report.
        """
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {"trial_hash": self.trial_hash, "job": json.dumps(values)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "TrialJob":
        """Return what `to_config` made it from."""
        return cls(**json.loads(config["job"]))


Train = Callable[[TrialJob, TrialStore, int, int | None], tuple[str, bool]]
"""Takes job, store, attempt and images at once; returns device and whether the trial ended."""


def run_trial(config: dict[str, Any], train: Train | None = None) -> None:
    """Run a trial to its end; failures are recorded and reported, not raised.

    Args:
        config: A `TrialJob` as Tune has it.
        train: Brings the trial to its end; unset: a Ray Train group.
    """
    job = TrialJob.from_config(config)
    try:
        _run(job, Store(job.store_uri).trial(job.trial_hash), train or _fit)
    except SupersededError:  # whoever took it over says how it goes on
        ray.tune.report({"outcome": "stopped"})


def _run(job: TrialJob, store: TrialStore, train: Train) -> None:
    began = time.monotonic()
    policy = Policy()
    while True:
        if not may_go_on(Store(job.store_uri), job.run_id, job.trial_hash):
            _report_stop(store, job.run_id)
            return
        if _waits(job, store):
            ray.tune.report({"outcome": "waiting"})
            return
        attempt = begin(store, job.run_id)
        store.clear_failure()
        # What a driver died with comes now; what is known of it already is skipped.
        ray.tune.report({"attempt": attempt, "points": _points(store)})
        try:
            device, finished = train(job, store, attempt, policy.images_at_once)
            break
        except (ray.train.TrainingFailedError, RayTrainError, RayError, KNetError) as error:
            verify(store, job.run_id)
            if not _goes_on(store, attempt, _told_by_workers(error), policy):
                return
    verify(store, job.run_id)
    if not finished and _waits(job, store):
        ray.tune.report({"outcome": "waiting"})
        return
    if not finished:
        _report_stop(store, job.run_id)
        return
    result = _result(job, store, device, time.monotonic() - began, policy.images_at_once)
    store.write_result(result)
    final = {"step": result.step, "time": time.time(), "metrics": result.metrics}
    ray.tune.report({"outcome": "finished", "points": [final]})


def _waits(job: TrialJob, store: TrialStore) -> bool:
    """Tell whether a member has come to the end of its population's round."""
    if job.most_evaluations is None:
        return False
    state = store.state()
    return state is not None and len(state.evaluations) >= job.most_evaluations


def _points(store: TrialStore) -> list[dict[str, Any]]:
    """Return the curves so far, in plain values."""
    return [asdict(point) for point in store.points()]


def _report_stop(store: TrialStore, run_id: str) -> None:
    """Say what asked the trial to stop: the screen or the budget."""
    ray.tune.report({"outcome": "pruned" if is_pruned(store, run_id) else "paused"})


def _goes_on(store: TrialStore, attempt: int, error: Exception, policy: Policy) -> bool:
    """Record a failure and what is done about it; tell whether the trial is tried again."""
    cause, message = cause_of(error), _one_line(error)
    if stacks := hang_reports(store, attempt):
        cause = "hang"
        message = f"no step for too long; stacks in {', '.join(stacks)} of {store.uri}"
    step = store.latest_step()
    decision = policy.decide(cause, error, step)
    failure = Failure(
        cause=cause,
        kind=type(error).__name__,
        message=message,
        action=decision.action,
        attempt=attempt,
        step=step,
    )
    store.write_failure(failure, final=not decision.retry)
    if decision.retry:
        ray.tune.report({"retry": f"{message}; {decision.action}", "cause": cause})
    else:
        ray.tune.report(
            {"outcome": "failed", "reason": message, "cause": cause, "points": _points(store)}
        )
    return decision.retry


def _fit(
    job: TrialJob, store: TrialStore, attempt: int, images_at_once: int | None
) -> tuple[str, bool]:
    """Return the device's name, and whether the trial came to its end."""
    # Loads torch, which the process that runs the sweep can do without.
    from knet_platform.groups import Trainer

    store.delete(_RAYS_RECORD)
    # Ray's annotations describe its version 1.
    trainer: Any = Trainer(
        job.workers,
        train_worker,
        on_report=lambda report, saved: ray.tune.report({**report, "saved": saved}),
        # Before later points: curves only grow at their ends.
        on_restart=lambda: ray.tune.report({"points": _points(store)}),
        train_loop_config={
            **asdict(job),
            "attempt": attempt,
            "images_at_once": images_at_once,
        },
        scaling_config=scaling(job),
        run_config=ray.train.RunConfig(
            name=job.trial_hash,
            storage_path=store.uri.rpartition("/")[0],
            # Retries are decided above: Ray Train cannot tell a broken image from a broken node.
            failure_config=ray.train.FailureConfig(
                max_failures=0,
                controller_failure_limit=0,  # type: ignore[call-arg]
                max_preemption_failures=0,
            ),
        ),
    )
    device, finished = trainer.fit().return_value
    return device, finished


def scaling(job: TrialJob) -> ray.train.ScalingConfig:
    """Return what a group of workers takes: all of it or nothing, on as few nodes as can hold it.

    Beside its workers a trial takes nothing: its controller is the driver.
    """
    least, most = job.workers[0], job.workers[-1]
    # Ray's annotations describe its version 1.
    return ray.train.ScalingConfig(
        num_workers=most if least == most else (least, most),  # type: ignore[arg-type]
        use_gpu=job.gpus_per_worker > 0,
        resources_per_worker={"CPU": job.cpus_per_worker}
        | ({"GPU": job.gpus_per_worker} if job.gpus_per_worker else {}),
        placement_strategy="PACK",
    )


def _result(
    job: TrialJob,
    store: TrialStore,
    device: str,
    wall_seconds: float,
    images_at_once: int | None,
) -> TrialResult:
    name, state = store.latest_checkpoint(), store.state()
    assert name is not None, "the last step of a fit saves"
    assert state is not None, "the last step of a fit saves"
    groups = store.groups()
    bounds = [0.0, *(group.seconds for group in groups[1:]), state.seconds]
    spans = [end - start for start, end in pairwise(bounds)]
    worker_hours = sum(s * g.workers for s, g in zip(spans, groups, strict=True)) / 3600
    costs = {"sys/gpu_hours": worker_hours * job.gpus_per_worker}
    if job.usd_per_worker_hour is not None:
        costs["cost/usd"] = worker_hours * job.usd_per_worker_hour
    return TrialResult(
        trial_hash=job.trial_hash,
        step=state.step,
        metrics={**state.metrics, **_peak_memory(store), **costs},
        evaluations=state.evaluations,
        checkpoint=name,
        num_parameters=state.num_parameters,
        seconds=state.seconds,
        wall_seconds=wall_seconds,
        device=device,
        workers=groups[-1].workers,
        earlier_workers=tuple(group.workers for group in groups[:-1]),
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        micro_batch=images_at_once,
    )


def _peak_memory(store: TrialStore) -> dict[str, float]:
    """Return the most that the first worker took of host and GPU; plans count with it."""
    points = store.points()
    measured = {
        name: [point.metrics[name] for point in points if name in point.metrics]
        for name in ("sys/host_memory_gb", "sys/gpu_memory_gb")
    }
    return {name: max(values) for name, values in measured.items() if values}


def _told_by_workers(error: Exception) -> Exception:
    """Return the worker's error that explains the others."""
    if not isinstance(error, ray.train.WorkerGroupError):
        return getattr(error, "controller_failure", error)
    # Ray wraps what a worker raised, to keep its traceback, and what its death looked like.
    causes = [
        getattr(item, "_base_exc", getattr(item, "health_check_failure", item))
        for item in error.worker_failures.values()
    ]
    # One worker's death breaks the connections of the others: name the death, not those.
    telling = (c for kind in (KNetError, RayError) for c in causes if isinstance(c, kind))
    return next(telling, causes[0])


def _one_line(error: Exception) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return line if isinstance(error, KNetError) else f"{type(error).__name__}: {line}"
