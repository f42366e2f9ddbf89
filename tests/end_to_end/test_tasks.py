"""Sweeps of the other tasks than the demo's, on a real cluster."""

from pathlib import Path

import pytest

from knet_platform.cli.main import main
from knet_platform.planning import load_sweep
from knet_platform.storage import Store

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
TINY = (ROOT / "tests" / "end_to_end" / "tiny.yaml").read_text()
PANOPTIC = f"""\
name: panoptic
base: {ROOT}/sweeps/recipes/knet_r50_panoptic_1x.yaml
metric: {{name: val/PQ, mode: max}}
baseline: published
arms:
  published: {{}}
  one_branch: {{model.feature_branches: 1}}
"""
SEMANTIC = f"""\
name: semantic
base: {ROOT}/sweeps/recipes/knet_fcn_r50_ade20k.yaml
metric: {{name: val/mIoU, mode: max}}
baseline: fcn
arms:
  fcn: {{}}
"""
SMALL = [
    "data.crop=null",
    "data.scale_range=[1,1]",
    "model.update_channels=null",
    "train.sync_batch_norm=false",
]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("text", "overrides", "column"),
    [(PANOPTIC, [], "PQ"), (SEMANTIC, SMALL, "mIoU")],
    ids=["panoptic", "semantic"],
)
def test_every_arm_is_trained_and_judged_by_its_tasks_metric(
    text: str,
    overrides: list[str],
    column: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    home, file, scale = (tmp_path / name for name in ("home", "sweep.yaml", "tiny.yaml"))
    file.write_text(text)
    scale.write_text(TINY.replace("max_concurrent: 1", "max_concurrent: 2"))
    monkeypatch.setenv("KNET_HOME", str(home))
    for name in ("KNET_STORAGE", "KNET_DATA", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    assert main(["run", str(file), "--scale", str(scale), *overrides]) == 0
    sweep = load_sweep(file, scale=str(scale), overrides=overrides)
    for trial in sweep.trials:
        result = Store(str(home / "storage")).trial(trial.hash).result()
        assert result is not None
        assert 0 <= result.metrics[f"val/{column}"] <= 1
    lines = (home / "reports" / sweep.name / "table.md").read_text().splitlines()
    header, _, *rows = [line for line in lines if line.startswith("|")]
    assert header.split("|")[2].strip() == column
    assert len(rows) == len(sweep.arms)
    assert f"{sweep.baseline} (baseline)" in rows[0]
