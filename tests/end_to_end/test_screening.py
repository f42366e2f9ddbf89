"""`scheduler: asha` on a real cluster: a hopeless arm is pruned, and continued in full later."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from mlflow import MlflowClient

from knet_platform.cli.main import main
from knet_platform.planning import load_sweep
from knet_platform.storage import Store

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TINY = Path(__file__).parents[1] / "tiny_recipe.yaml"
RECIPE = f"""\
base: {TINY}
model: {{stages: 1}}
optim: {{lr: 1e-3, warmup_iterations: 0}}
train: {{iterations: 150, batch_size: 4, log_every: 10, eval_every: 10}}
eval: {{probe_images: 0}}
"""
# One trial after another, the baseline first: what ASHA decides depends on the order.
SWEEP = """\
name: screened
base: recipe.yaml
metric: {name: train/loss, mode: min}
baseline: good
seeds: [0, 1]
scheduler: {name: asha, grace: 0.2, reduction_factor: 2}
arms:
  good: {}
  hopeless: {optim.lr: 1e-12}
resources: {max_concurrent: 1}
"""


def run(path: Path) -> dict[str, list[dict[str, object]]]:
    with redirect_stdout(io.StringIO()) as output:
        code = main(["run", str(path), "--json"])
    assert code == 0
    outcome: dict[str, list[dict[str, object]]] = json.loads(output.getvalue())
    return outcome


def names(trials: list[dict[str, object]]) -> list[str]:
    return [f"{trial['arm']}/{trial['seed']}" for trial in trials]


def test_a_hopeless_arm_is_pruned_and_can_be_trained_in_full_later(
    ray_cluster: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("KNET_HOME", str(tmp_path / "home"))
    for name in ("KNET_STORAGE", "KNET_DATA", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    path = tmp_path / "screened.yaml"
    path.write_text(SWEEP)
    store = Store(str(tmp_path / "home" / "storage"))

    outcome = run(path)
    assert names(outcome["finished"]) == ["good/0", "good/1"]
    assert names(outcome["pruned"]) == ["hopeless/0", "hopeless/1"]
    first, other = (
        store.trial(trial.hash) for trial in load_sweep(path).trials if trial.arm == "hopeless"
    )
    pruned, state = first.pruned(), first.state()
    assert pruned is not None
    assert 30 <= pruned.step <= 150
    assert state is not None  # it saved when it was stopped
    assert pruned.step <= state.step < 150
    assert (first.result(), other.list()) == (None, [])

    client = MlflowClient(f"sqlite:///{tmp_path}/home/mlflow.db")
    experiment = client.get_experiment_by_name("screened")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"screened", "good/0", "good/1", "hopeless/0"}
    assert runs["screened"].info.status == "FINISHED"
    assert runs["hopeless/0"].info.status == "KILLED"
    assert runs["hopeless/0"].data.tags["status_reason"] == str(pruned)

    capsys.readouterr()
    assert main(["plan", str(path)]) == 0
    plan = capsys.readouterr().out
    assert plan.count(f"pruned at step {pruned.step}") == 2
    assert "2 finished, 2 pruned, nothing left to run" in plan
    report = (tmp_path / "home/reports/screened/table.md").read_text()
    assert f"pruned at step {pruned.step}" in report

    path.write_text(
        SWEEP.replace("[0, 1]", "[0]")
        .replace("name: asha", "name: fifo")
        .replace(", grace: 0.2, reduction_factor: 2", "")
    )
    assert names(run(path)["finished"]) == ["good/0", "hopeless/0"]
    result = first.result()
    assert result is not None
    assert result.step == 150
    assert first.pruned() is None
