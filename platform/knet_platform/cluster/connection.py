"""The Ray cluster in use: connect to it or start one here, and count the trials it holds."""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from knet_platform.errors import CapacityError, UsageError
from knet_platform.fork_server import executable
from knet_platform.sweep_file import Resources

SETTINGS = {
    # The old reporter can be silenced; nobody reads the files that Tune's loggers write.
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Tune writes down all trials again and again, for a restoration that never happens.
    "TUNE_GLOBAL_CHECKPOINT_S": "1e6",
    # Said on small machines about every trial, whose processes are many and mostly idle.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "PYTHON worker processes have been started",
    # Ray Train looks at its workers this often (seconds; default 2): a trial of a minute should
    # not wait for that.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",
    # A trial waits for the workers of the one before it, for as long as that takes.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "1e6",
    # Relative paths in a recipe lie where the sweep was started.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # `tuner` handles signals itself.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Variable in which Ray tells a job how it was submitted."""
GROWS_TO = "KNET_GROWS_TO"
"""Variable with what an autoscaled cluster's machines have once all of them are there."""
MOST_LISTED = 10_000
"""Ray lists no more entries than this at once."""
HEAD = {"node:__internal_head__": 0.001}
"""Drivers run on the head, which outlives spot nodes, and take nothing that workers need."""
_OTHER_PYTHON = {"conda", "container", "image_uri", "pip", "py_executable", "uv"}
"""Fields of a runtime environment that say which Python runs."""


def prepare_environment() -> None:
    """Set what Ray reads from the environment, without overriding the user; before importing it.

    Without a stated mode, servers and clients of Ray guess differently whether tokens are needed.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if "RAY_AUTH_MODE" not in os.environ:
        token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
        known = token.is_file() or "RAY_AUTH_TOKEN" in os.environ
        connects = "RAY_ADDRESS" in os.environ
        os.environ["RAY_AUTH_MODE"] = "token" if known or not connects else "disabled"


def ray_address() -> str | None:
    """Return the cluster to connect to; None for one started here.

    Raises:
        UsageError: `RAY_ADDRESS` is that of a dashboard.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address and address.startswith(("http://", "https://")):
        raise UsageError(
            f"RAY_ADDRESS: {address} takes jobs, not connections; use `knet submit`, or unset "
            f"RAY_ADDRESS to start Ray here"
        )
    return address


@contextmanager
def connected(*, gpus: bool = True) -> Iterator[None]:
    """Use the cluster of `RAY_ADDRESS` (set inside every Ray job), else one started here.

    A connection that exists is used as it is.

    Args:
        gpus: Whether processes that are started there use GPUs.

    Raises:
        UsageError: The address is of another kind, nothing answers there, or Ray does not start.
    """
    import ray

    address = ray_address()
    if ray.is_initialized():
        yield
        return
    options = {
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": worker_environment(gpus=gpus),
    }
    if address:
        _connect(address, options)
    else:
        _start(options)
    try:
        if address:
            _release_leftovers()
        yield
    finally:
        ray.shutdown()


def worker_environment(*, gpus: bool) -> dict[str, Any]:
    """Return what Ray's processes are started in beyond what their job says (`fork_server`).

    A job that brings a Python of its own keeps that.

    Args:
        gpus: Whether they use GPUs.
    """
    job = json.loads(os.environ.get(_JOB_CONFIG, "{}"))
    own = _OTHER_PYTHON & (job.get("runtime_env") or {}).keys()
    return {} if gpus or own else {"py_executable": executable()}


def _connect(address: str, options: Mapping[str, Any]) -> None:
    import ray

    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UsageError(
            f"RAY_ADDRESS: cannot connect to {address} ({reason}); expected a running cluster "
            f"with the same RAY_AUTH_MODE ({os.environ.get('RAY_AUTH_MODE')}); unset RAY_ADDRESS "
            f"to start Ray here"
        ) from error


def _start(options: Mapping[str, Any]) -> None:
    import ray

    try:
        # Ray cleans up behind stopped trials only where its dashboard runs.
        ray.init(address="local", include_dashboard=True, **options)
    except Exception as error:  # Ray raises just that where its node is not up in 30 seconds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"Ray: cannot start a cluster here ({reason}); expected free processors, memory and "
            f"room in RAY_TMPDIR ({os.environ.get('RAY_TMPDIR', '/tmp')}), whose ray/ has its "
            f"logs; run again, or set RAY_ADDRESS to a running cluster"
        ) from error


def _release_leftovers() -> None:
    """Free what a killed run reserved last.

    Ray frees a dead process's reservations when it dies, and misses those that its actors asked
    for at that very moment: they would keep every later trial waiting for ever.
    """
    import ray
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group
    from ray.util.state import list_jobs, list_placement_groups

    address = ray.get_runtime_context().gcs_address  # else Ray guesses, of several on a machine
    jobs = list_jobs(address=address, filters=[("status", "=", "RUNNING")], limit=MOST_LISTED)
    running = {job.job_id for job in jobs}
    for group in list_placement_groups(address=address, detail=True, limit=MOST_LISTED):
        abandoned = group.creator_job_id not in running and not group.is_detached
        if abandoned and group.state != "REMOVED":
            remove_placement_group(
                PlacementGroup(PlacementGroupID(bytes.fromhex(group.placement_group_id)))
            )


def release_abandoned() -> None:
    """Free what drivers of this process that are dead had reserved, or asked for.

    Ray does that when their job ends.
    """
    import ray
    from ray._private.state import state
    from ray._raylet import PlacementGroupID
    from ray.core.generated.gcs_pb2 import (  # type: ignore[attr-defined]
        ActorTableData,
        PlacementGroupTableData,
    )
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    ours = ray.get_runtime_context().get_job_id()
    accessor = state._connect_and_get_accessor()

    def is_dead(actor: ray.ActorID) -> bool:
        known = accessor.get_actor_info(actor)
        return known is None or ActorTableData.FromString(known).state == ActorTableData.DEAD

    for item in accessor.get_placement_group_table():
        group = PlacementGroupTableData.FromString(item)
        actor = ray.ActorID(group.creator_actor_id)
        exists = group.state != PlacementGroupTableData.REMOVED
        # What this process itself has made, such as Tune's groups of drivers, has no actor. A
        # group that was asked for as its actor died does not know of that death.
        made_there = exists and group.creator_job_id.hex() == ours and not actor.is_nil()
        if made_there and is_dead(actor):
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))


def trial_slots(resources: Resources) -> int:
    """Return how many trials can train at once.

    Drivers take nothing that workers need and a trial gets all its workers or none, so any
    number of trials may wait for each other without a deadlock. An elastic trial counts with
    the least that it starts with.

    Raises:
        CapacityError: Not even one.
        UsageError: `KNET_GROWS_TO` says nothing that can be read.
    """
    import ray

    worker = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    nodes = [node["Resources"] for node in alive]
    workers = sum(_fitting(worker, node) for node in nodes)
    slots = max(workers, _workers_after_scaling(worker)) // resources.least_workers
    if slots == 0:
        raise CapacityError(
            f"resources: one trial needs {resources.least_workers} workers of {_shown(worker)}, "
            f"and the cluster holds {workers} ({_all(nodes)}); use fewer or smaller workers, or "
            f"add nodes; where they come by themselves, {GROWS_TO} says how many (CPU=64,GPU=8)"
        )
    return slots


def _workers_after_scaling(worker: Mapping[str, float]) -> int:
    """Return the workers that fit once an autoscaler has added all it may; 0 without one.

    Ray's autoscaler tells nobody how far it may go, so the files of a cluster do.
    """
    stated = os.environ.get(GROWS_TO)
    if not stated:
        return 0
    try:
        parts = (part.partition("=") for part in stated.split(","))
        most = {name.strip(): float(amount) for name, _, amount in parts}
    except ValueError as error:
        raise UsageError(
            f"{GROWS_TO}: got '{stated}', expected what all machines together may have, as in "
            f"CPU=64,GPU=8"
        ) from error
    return _fitting(worker, most)


def _fitting(worker: Mapping[str, float], node: Mapping[str, float]) -> int:
    return min(int(node.get(name, 0) / need + 1e-9) for name, need in worker.items() if need > 0)


def _all(nodes: Sequence[Mapping[str, float]]) -> str:
    return "; ".join(_shown({"CPU": n.get("CPU", 0), "GPU": n.get("GPU", 0)}) for n in nodes)


def _shown(resources: Mapping[str, float]) -> str:
    return " + ".join(
        f"{value:g} {name}" for name, value in resources.items() if value or name == "CPU"
    )
