"""A node is taken away in mid-run: its trial saves in time, to a bucket, and goes on elsewhere.

What is trained does not matter: it is semantic segmentation, as in no other sweep of the tests.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from mlflow import MlflowClient
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from knet_platform.checkpoints import step_of
from knet_platform.cli.main import main
from knet_platform.planning import load_sweep
from knet_platform.storage import Store

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TINY = Path(__file__).parents[1] / "tiny_recipe.yaml"
STEPS, INTERVAL = 50, 25
RECIPE = f"""\
base: {TINY}
model:
  task: semantic
  semantic: {{head: fcn}}
  stages: 1
  grouping: soft
train: {{iterations: {STEPS}, batch_size: 4, log_every: 1, eval_every: {STEPS}}}
eval: {{fps_iterations: 0}}
"""
CPUS = 5
"""More than the head has: whoever wants so many trains on another node."""
SWEEP = f"""\
name: preempted
base: recipe.yaml
metric: {{name: val/mIoU, mode: max}}
baseline: only
resources: {{cpus_per_worker: {CPUS}}}
arms: {{only: {{train.checkpoint_every: {INTERVAL}}}}}
"""
NOTICE_SECONDS = 30
"""Between the notice and the end of a spot machine, at the cloud that gives the least."""


def test_a_drained_node_costs_less_than_the_steps_between_two_checkpoints(
    cluster: Any,
    add_nodes: Callable[..., dict[str, Any]],
    wait_for: Callable[..., Any],
    s3_environment: dict[str, str],
    faults: Path,
    s3_uri: str,
    tmp_path: Path,
    make_home: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = add_nodes(2, num_cpus=CPUS, env_vars=s3_environment)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    home = make_home(tmp_path, monkeypatch)
    monkeypatch.setenv("KNET_STORAGE", f"{s3_uri}/{tmp_path.name}")
    (trial,) = load_sweep(tmp_path / "sweep.yaml").trials
    store = Store(f"{s3_uri}/{tmp_path.name}").trial(trial.hash)
    orders = faults / trial.hash
    orders.mkdir()
    (orders / "watch").write_text("0.5")
    (orders / "pause").write_text("0.6")

    def place() -> tuple[str, int] | None:
        """Return the node and the number of the last step."""
        told = (orders / "place").read_text().split() if (orders / "place").exists() else []
        return (told[0], int(told[1])) if len(told) == 2 else None

    def take_the_node_away() -> tuple[str, int, int]:
        """Return it, the step of the checkpoint that came within the notice, and the last step."""
        wait_for(lambda: (at := place()) and at[1] >= 2)
        node, _ = wait_for(place)
        deadline_ms = int(1000 * (time.time() + NOTICE_SECONDS))
        ray._private.worker.global_worker.gcs_client.drain_node(
            node, DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "spot", deadline_ms
        )
        saved = wait_for(store.latest_checkpoint, NOTICE_SECONDS)
        cluster.remove_node(nodes[node], allow_graceful=False)
        _, last = wait_for(place)
        (orders / "none").write_text("0")
        (orders / "none").replace(orders / "pause")  # whoever reads it reads a number
        return node, step_of(saved), last

    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(take_the_node_away)
        assert main(["run", str(tmp_path / "sweep.yaml")]) == 0
        lost, saved, last = taken.result()

    failures = [(item.cause, item.action, item.attempt) for item in store.failures()]
    assert failures == [("preempted", f"retried from step {saved}", 1)]
    assert last - saved < INTERVAL
    assert saved < INTERVAL, "not one that was due anyway"
    (other,) = nodes.keys() - {lost}
    assert place() == (other, STEPS - 1)
    result = store.result()
    assert result is not None
    assert 0 <= result.metrics["val/mIoU"] <= 1
    table = (home / "reports" / "preempted" / "table.md").read_text().splitlines()
    header, _, row = [line for line in table if line.startswith("|")]
    assert header.split("|")[2].strip() == "mIoU"
    assert "only (baseline)" in row
    assert store.latest_checkpoint() == result.checkpoint == f"checkpoint_{STEPS}"
    assert not (home / "storage").exists()

    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    experiment = client.get_experiment_by_name("preempted")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"preempted", "only/0"}
    run = runs["only/0"]
    assert (run.info.status, run.data.tags["attempt"]) == ("FINISHED", "2")
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted(point.step for point in losses) == list(range(1, STEPS + 1))
