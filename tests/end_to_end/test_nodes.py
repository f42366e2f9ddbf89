"""An elastic trial on two nodes: one dies in mid-run, and another has room later on.

Another trial goes on beside it.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.util
from mlflow import MlflowClient
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)

from knet_core.checkpoint_state import RECIPE_FILE, dump_recipe
from knet_platform.cli.main import main
from knet_platform.planning import load_sweep
from knet_platform.storage import Store, TrialStore
from knet_platform.sweep import Trial

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "tiny_recipe.yaml"
STEPS, INTERVAL = 16, 4
SAVED, GROWN = 2 * INTERVAL, 3 * INTERVAL
RECIPE = f"""\
base: {TINY}
model: {{stages: 1}}
train: {{batch_size: 4, micro_batch: 1, log_every: 1}}
eval: {{fps_iterations: 0, probe_images: 0}}
"""
CPUS = 5
"""More than the head has: workers go to three nodes with room for two each."""
# More detections than there are pairs of kernels and classes: a trial of its own, trained alike.
SWEEP = f"""\
name: elastic
base: recipe.yaml
metric: {{name: val/AP, mode: max}}
baseline: one
resources: {{workers: [2, 4], cpus_per_worker: {CPUS}}}
arms:
  one: {{eval.max_detections: 98}}
  other: {{eval.max_detections: 99}}
"""


@dataclass(frozen=True)
class Watched:
    """A trial under way, whose steps the test can hold up."""

    trial: Trial
    store: TrialStore
    orders: Path

    def hold(self, step: int) -> None:
        self.orders.mkdir()
        (self.orders / "pause").write_text("0")  # for `place`
        (self.orders / "hold").write_text(str(step))

    def let_go(self) -> None:
        (self.orders / "hold").unlink(missing_ok=True)

    def place(self) -> tuple[str, int]:
        """Return the node of one of its workers and the number of the last step; -1: none yet."""
        file = self.orders / "place"
        told = file.read_text().split() if file.exists() else []
        return (told[0], int(told[1])) if len(told) == 2 else ("", -1)

    @property
    def workers(self) -> list[int]:
        return [group.workers for group in self.store.groups()]


def reserved() -> list[list[str]]:
    """Return the nodes of all that is reserved together, place by place."""
    table = ray.util.placement_group_table().values()
    held = [group for group in table if group["state"] == "CREATED"]
    assert {group["strategy"] for group in held} == {"PACK"}
    return [list(group["bundles_to_node_id"].values()) for group in held]


def look_at_nodes() -> None:
    """Let Ray's coordinator see new nodes at once, which it looks for every 20 seconds."""

    def tick(coordinator: Any) -> None:
        coordinator._tick()

    ray.get(get_or_create_autoscaling_coordinator().__ray_call__.remote(tick))


def room_is_set_aside() -> bool:
    """Return whether Ray's coordinator has reserved something beyond the least of a trial."""

    def reservations(coordinator: Any) -> dict[str, Any]:
        asked = coordinator._ongoing_reqs.items()
        return {name: request.reserved_resources for name, request in asked}

    found = ray.get(get_or_create_autoscaling_coordinator().__ray_call__.remote(reservations))
    return any(nodes for name, nodes in found.items() if name.endswith("-further"))


def without_ray(trial: Trial, folder: Path, parts: list[tuple[int, int, int]]) -> None:
    """Train on this machine: in each part so many workers from one step to another."""
    folder.mkdir()
    (folder / RECIPE_FILE).write_text(dump_recipe(trial.recipe))
    path = os.pathsep.join([str(ROOT), str(ROOT / "platform")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("run_group.py")
    arguments = [":".join(map(str, part)) for part in parts]
    command = [sys.executable, str(script), str(folder), *arguments]
    subprocess.run(command, env=environment, check=True, timeout=300)


def test_a_trial_goes_on_with_fewer_workers_when_a_node_dies_and_with_more_when_there_is_room(
    cluster: Any,
    add_nodes: Callable[..., dict[str, Any]],
    wait_for: Callable[..., Any],
    faults: Path,
    tmp_path: Path,
    make_home: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rhythm = f"train: {{iterations: {STEPS}, eval_every: {STEPS}, checkpoint_every: {INTERVAL}}}\n"
    nodes = add_nodes(3, num_cpus=2 * CPUS)
    look_at_nodes()
    (tmp_path / "base.yaml").write_text(RECIPE)
    (tmp_path / "recipe.yaml").write_text("base: base.yaml\n" + rhythm)
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    store = Store(str(make_home(tmp_path, monkeypatch) / "storage"))
    watched = [
        Watched(trial, store.trial(trial.hash), faults / trial.hash)
        for trial in load_sweep(tmp_path / "sweep.yaml").trials
    ]
    for item in watched:
        item.hold(SAVED + 1)

    def take_a_node_away() -> tuple[Watched, Watched, list[list[str]]]:
        """Return the trial it had, the other one, and where both were."""
        for item in watched:
            wait_for(lambda item=item: item.place()[1] == SAVED + 1)
            wait_for(lambda item=item: item.store.latest_step() == SAVED)
        places = reserved()
        large = next(item for item in watched if item.workers == [4])
        small = next(item for item in watched if item is not large)
        (elsewhere,) = (set(at) for at in places if small.place()[0] in at)
        lost = next(iter(nodes.keys() - elsewhere))
        cluster.remove_node(nodes[lost], allow_graceful=False)
        wait_for(lambda: large.workers == [4, 2])
        small.let_go()  # was in mid-run all the time
        wait_for(lambda: small.store.result())
        wait_for(room_is_set_aside)
        # Ray Train may end a group before it has passed on what that reported last.
        (large.orders / "deaf").write_text(str(GROWN))
        large.let_go()
        return large, small, places

    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(take_a_node_away)
        # Whatever goes wrong there, the trials end.
        taken.add_done_callback(lambda _: [item.let_go() for item in watched])
        assert main(["run", str(tmp_path / "sweep.yaml")]) == 0
        large, small, places = taken.result()

    # Drivers on the head, four workers on two nodes and two on one: as few as can hold them.
    head = cluster.head_node.node_id
    assert [at for at in places if head in at] == [[head], [head]]
    groups = [at for at in places if head not in at]
    assert sorted((len(at), len(set(at))) for at in groups) == [(2, 1), (4, 2)]
    assert {node for at in groups for node in at} == nodes.keys()

    failures = [(item.cause, item.action, item.attempt) for item in large.store.failures()]
    assert failures == [("preempted", f"retried from step {SAVED}", 1)]
    assert (large.workers, small.workers) == ([4, 2, 4], [2])
    assert small.store.failures() == ()

    client = MlflowClient(f"sqlite:///{tmp_path}/home/mlflow.db")
    experiment = client.get_experiment_by_name("elastic")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    runs = {str(run.info.run_name): run for run in found}
    assert len(runs) == len(found) == 3, "one for the sweep and one for each trial"
    for item, attempts in ((large, "2"), (small, "1")):
        run = runs[item.trial.name]
        assert (run.info.status, run.data.tags["attempt"]) == ("FINISHED", attempts)
        points = client.get_metric_history(run.info.run_id, "train/loss")
        assert sorted(point.step for point in points) == list(range(1, STEPS + 1))

    table = (tmp_path / "home" / "reports" / "elastic" / "table.md").read_text()
    assert f"flagged: {large.trial.name}: elastic, trained with 4, then 2, then 4 workers" in table

    # The same numbers of workers on one machine, without Ray and without a break.
    without_ray(
        large.trial, tmp_path / "alone", [(4, 0, SAVED), (2, SAVED, GROWN), (4, GROWN, STEPS)]
    )
    weights = f"checkpoint_{STEPS}/model.safetensors"
    assert large.store.read_bytes(weights) == (tmp_path / "alone" / weights).read_bytes()
