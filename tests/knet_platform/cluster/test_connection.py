"""How many trials a cluster holds; Ray that does not start is one line with the way out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table

from knet_platform.cluster import release_abandoned, trial_slots, worker_environment
from knet_platform.errors import CapacityError, UsageError
from knet_platform.sweep_file import Resources

START = """\
from knet_platform.cluster import connected, prepare_environment
from knet_platform.errors import UsageError

prepare_environment()
try:
    with connected():
        pass
except UsageError as error:
    print(error)
"""


@pytest.fixture
def head_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that has no node but a head with one CPU."""
    head = {"Alive": True, "Resources": {"CPU": 1.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [head])
    monkeypatch.delenv("KNET_GROWS_TO", raising=False)


@pytest.mark.usefixtures("head_alone")
def test_trials_are_counted_by_what_a_cluster_may_grow_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray's autoscaler tells nobody; without it nothing would start where no machine is yet."""
    trials = Resources(workers=2, gpus_per_worker=1)
    with pytest.raises(CapacityError, match=r"KNET_GROWS_TO says how many \(CPU=64,GPU=8\)"):
        trial_slots(trials)
    monkeypatch.setenv("KNET_GROWS_TO", "CPU=256, GPU=9")
    assert trial_slots(trials) == 4
    assert trial_slots(Resources(workers=(1, 8), gpus_per_worker=1)) == 9
    monkeypatch.setenv("KNET_GROWS_TO", "CPU:256")
    with pytest.raises(UsageError, match="KNET_GROWS_TO: got 'CPU:256', expected what all"):
        trial_slots(trials)


def test_processes_are_forked_where_no_gpu_is_used_and_no_other_python(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert "knet_platform.fork_server" in worker_environment(gpus=False)["py_executable"]
    assert worker_environment(gpus=True) == {}
    for job, own in (({"working_dir": "gcs://a.zip"}, False), ({"pip": ["timm==1.0.9"]}, True)):
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": job}))
        assert (worker_environment(gpus=False) == {}) == own


class Driver:
    def reserve(self) -> PlacementGroup:
        return placement_group([{"CPU": 0.01}])


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_only_what_dead_drivers_reserved_is_freed() -> None:
    """Ray itself keeps it until the job ends: nobody could train there any more."""
    lives, dies = (ray.remote(num_cpus=0)(Driver).remote() for _ in range(2))
    theirs = ray.get([lives.reserve.remote(), dies.reserve.remote()])
    kept, lost, ours = (*theirs, placement_group([{"CPU": 0.01}]))
    ray.get([group.ready() for group in (kept, lost, ours)])
    ray.kill(dies)
    while answers(dies):  # until the order to die has arrived
        pass

    release_abandoned()
    while state(lost) != "REMOVED":  # asynchronously
        pass
    assert [state(kept), state(ours)] == ["CREATED", "CREATED"]
    for group in (kept, ours):
        ray.util.remove_placement_group(group)


def answers(actor: ActorHandle) -> bool:
    try:
        ray.get(actor.__ray_ready__.remote())
    except RayActorError:
        return False
    return True


def state(group: PlacementGroup) -> str:
    return str(placement_group_table(group)["state"])


@pytest.mark.ray
def test_a_cluster_that_cannot_be_started_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sockets would lie in a folder with more characters than the system takes."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 120)))
    done = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("Ray: cannot start a cluster here (")
    assert "107 bytes" in line
    assert "set RAY_ADDRESS to a running cluster" in line
