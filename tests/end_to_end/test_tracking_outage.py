"""A sweep whose MLflow server dies under it ends as if nothing had been, and MLflow catches up.

What is trained does not matter: it is panoptic segmentation, as in no other sweep of the tests.
"""

import threading
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from knet_platform.cli.main import main
from knet_platform.planning import load_sweep
from knet_platform.storage import Store

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

TINY = Path(__file__).parents[1] / "tiny_recipe.yaml"
RECIPE = f"""\
base: {TINY}
model: {{task: panoptic, stages: 1}}
train: {{iterations: 6, batch_size: 4, log_every: 1, eval_every: 2}}
eval: {{fps_iterations: 0}}
"""
SWEEP = """\
name: outage
base: recipe.yaml
metric: {name: val/PQ, mode: max}
baseline: first
resources: {max_concurrent: 1}
arms:
  first: {}
  second: {model.feature_branches: 1}
"""


def runs(client: MlflowClient) -> dict[str, Run]:
    experiment = client.get_experiment_by_name("outage")
    if experiment is None:
        return {}
    found = client.search_runs([experiment.experiment_id])
    assert len({run.info.run_name for run in found}) == len(found)
    return {run.info.run_name: run for run in found}


def test_a_server_that_dies_in_mid_run_gets_everything_afterwards(
    ray_cluster: str, server, make_home, tmp_path: Path, monkeypatch, capsys
) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "outage.yaml").write_text(SWEEP)
    home = make_home(tmp_path, monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setattr("knet_platform.tracking.journaled.CLOSE_SECONDS", 1.0)
    client = MlflowClient(server.store)
    over = threading.Event()

    def kill_once_the_first_trial_has_logged() -> None:
        while not over.wait(0.1):
            run = runs(client).get("first/0")
            if run is not None and "train/loss" in run.data.metrics:
                server.kill()
                return

    killer = threading.Thread(target=kill_once_the_first_trial_has_logged)
    killer.start()
    code = main(["run", str(tmp_path / "outage.yaml")])
    over.set()
    killer.join()
    assert server.process is None, "it ended before the server was killed"
    captured = capsys.readouterr()
    assert code == 0
    (line,) = (line for line in captured.err.splitlines() if line.startswith("tracking: "))
    assert "updates wait in" in line
    assert "knet sync sends them" in line
    assert {name: run.info.status for name, run in runs(client).items()} == {
        "outage": "RUNNING",
        "first/0": "RUNNING",
    }

    table = (home / "reports" / "outage" / "table.md").read_text().splitlines()
    header, _, *rows = [line for line in table if line.startswith("|")]
    assert header.split("|")[2].strip() == "PQ"
    assert len(rows) == 2
    assert "first (baseline)" in rows[0]

    server.start()
    assert main(["sync"]) == 0
    assert "updates sent" in capsys.readouterr().out
    store = Store(str(home / "storage"))
    client = MlflowClient(server.uri)
    found = runs(client)
    assert {name: run.info.status for name, run in found.items()} == {
        "outage": "FINISHED",
        "first/0": "FINISHED",
        "second/0": "FINISHED",
    }
    for trial in load_sweep(tmp_path / "outage.yaml").trials:
        result = store.trial(trial.hash).result()
        assert result is not None
        assert 0 <= result.metrics["val/PQ"] <= 1
        points = store.trial(trial.hash).points()
        assert [point.step for point in points] == [1, 2, 3, 4, 5, 6]
        run_id = found[trial.name].info.run_id
        for name in ("train/loss", "val/PQ", "sys/host_memory_gb"):
            history = client.get_metric_history(run_id, name)
            assert sorted((item.step, item.value) for item in history) == [
                (point.step, point.metrics[name]) for point in points if name in point.metrics
            ]
        pictures = [item.path for item in client.list_artifacts(run_id, "images")]
        assert len(pictures) == 2 * 3, "of every evaluation, large and small"
