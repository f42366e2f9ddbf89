"""`search:` on a real cluster: suggestions are trained, tracked, and searched on from later."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from mlflow import MlflowClient

from knet_platform.cli.main import main
from knet_platform.storage import Store

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
TINY = Path(__file__).with_name("tiny.yaml")
SWEEP = f"""\
name: tuned
base: {ROOT}/sweeps/recipes/knet_r50_instance_1x.yaml
metric: {{name: train/loss, mode: min}}
baseline: base
arms: {{base: {{}}}}
search:
  name: optuna
  trials: 1
  space: {{optim.lr: {{log_uniform: [1.0e-4, 1.0e-2]}}, loss.cls: {{choice: [1, 2]}}}}
"""


def knet(*arguments: str) -> tuple[int, dict[str, object]]:
    with redirect_stdout(io.StringIO()) as output:
        code = main([*arguments, "--json"])
    outcome: dict[str, object] = json.loads(output.getvalue())
    return code, outcome


def test_a_search_runs_what_it_suggests_and_goes_on_from_it(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KNET_HOME", str(tmp_path / "home"))
    for name in ("KNET_STORAGE", "KNET_DATA", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "tuned.yaml"
    path.write_text(SWEEP)
    scale = tmp_path / "tiny.yaml"
    scale.write_text(TINY.read_text().replace("workers: 2", "workers: 1"))
    arguments = (str(path), "--scale", str(scale))
    store = Store(str(tmp_path / "home" / "storage"))

    code, first = knet("run", *arguments)
    assert (code, first["unsuggested"]) == (0, 0)
    base, suggested = first["finished"]
    assert base["arm"] == "base"
    assert suggested["arm"].startswith("optim.lr=")
    before = [store.trial(trial["trial_hash"]).result() for trial in first["finished"]]

    path.write_text(SWEEP.replace("trials: 1", "trials: 2"))
    code, plan = knet("plan", *arguments)
    assert [row["state"] for row in plan["trials"]] == ["finished", "finished"]
    assert plan["search"]["to_come"] == 1
    code, second = knet("run", *arguments)
    assert code == 0
    assert second["finished"][:2] == first["finished"]
    assert len(second["finished"]) == 3
    after = [store.trial(trial["trial_hash"]).result() for trial in first["finished"]]
    assert after == before  # neither was run again

    client = MlflowClient(f"sqlite:///{tmp_path}/home/mlflow.db")
    experiment = client.get_experiment_by_name("tuned")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"tuned", *(f"{trial['arm']}/0" for trial in second["finished"])}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}

    code, report = knet("report", *arguments)
    losses = [arm["metrics"]["train/loss"]["mean"] for arm in report["arms"].values()]
    assert losses == sorted(losses)
    assert len(losses) == 3
