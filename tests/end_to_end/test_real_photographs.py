"""The sweep of the README on photographs: COCO's eighty classes, and crowded microscope images."""

import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import pytest
from mlflow import MlflowClient

from knet_core import load_model
from knet_platform.cli.main import main
from knet_platform.planning import load_sweep
from knet_platform.staging import Cache
from knet_platform.storage import Store

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
SWEEP = f"""\
# Rounds of kernel update, two arms
name: photographs
base: {ROOT}/sweeps/recipes/knet_r50_instance_1x.yaml
metric: {{name: val/AP, mode: max}}
seeds: [0]
baseline: "3"
arms:
  "1": {{model.stages: 1}}
  "3": {{}}
"""


@pytest.mark.parametrize(
    ("scheme", "folder", "num_classes"), [("", "coco_mini", 80), ("file://", "nuclei", 1)]
)
def test_a_sweep_trains_on_real_images(
    scheme: str,
    folder: str,
    num_classes: int,
    real_data: Path,
    ray_cluster: str,
    tmp_path: Path,
    make_home: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home = make_home(tmp_path, monkeypatch)
    file = tmp_path / "photographs.yaml"
    file.write_text(SWEEP)
    laptop = (ROOT / "sweeps" / "scales" / "laptop.yaml").read_text()
    assert "workers: 2," in laptop
    alone = laptop.replace("workers: 2,", "workers: 1,").replace("../", f"{ROOT}/sweeps/")
    (tmp_path / "laptop.yaml").write_text(alone)
    scale = str(tmp_path / "laptop.yaml")
    overrides = [
        f"data={ROOT}/sweeps/data/coco.yaml",
        f"data.root={scheme}{real_data / folder}",
        "train.iterations=20",
        "train.log_every=2",
        "train.eval_every=20",
        "train.batch_size=4",
        "optim.warmup_iterations=2",
        "eval.max_detections=20",
        "eval.fps_iterations=2",
    ]
    assert main(["run", str(file), "--scale", scale, "--seeds", "1", *overrides]) == 0

    sweep = load_sweep(file, scale=scale, overrides=overrides, seeds=1)
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    experiment = client.get_experiment_by_name("photographs")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"photographs", "1/0", "3/0"}
    # Behind an address: all trials' workers share what the first of them fetched.
    sets = [(state.address, state.complete) for state in Cache(home / "cache", None).states()]
    assert sets == ([(sweep.trials[0].recipe.data.root, True)] if scheme else [])
    for trial in sweep.trials:
        run = runs[trial.name]
        assert run.info.status == "FINISHED"
        losses = [m.value for m in client.get_metric_history(run.info.run_id, "train/loss")]
        # Few images a step make single losses jumpy, so halves of the run are compared; twenty
        # steps are enough for masks to form, while eighty classes stay unlearned.
        assert mean(losses[-5:]) < 0.9 * mean(losses[:5])
        assert all(math.isfinite(value) for value in run.data.metrics.values())
        result = Store(str(home / "storage")).trial(trial.hash).result()
        assert result is not None
        checkpoint = home / "storage" / "trials" / trial.hash / result.checkpoint
        assert load_model(checkpoint).num_classes == num_classes
