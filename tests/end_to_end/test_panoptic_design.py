"""A shipped sweep of another task than the demo's, on a real cluster."""

from pathlib import Path

import pytest

from knet_platform.cli.main import main
from knet_platform.planning import load_sweep
from knet_platform.storage import Store

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
SWEEP = ROOT / "sweeps" / "panoptic_design.yaml"
TINY = (ROOT / "tests" / "end_to_end" / "tiny.yaml").read_text()


@pytest.mark.usefixtures("ray_cluster")
def test_every_arm_is_trained_and_judged_by_panoptic_quality(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, scale = tmp_path / "home", tmp_path / "tiny.yaml"
    # Two trials of one worker each: the other tests train on two, one trial after the other.
    scale.write_text(
        TINY.replace("workers: 2", "workers: 1").replace("max_concurrent: 1", "max_concurrent: 2")
    )
    monkeypatch.setenv("KNET_HOME", str(home))
    for name in ("KNET_STORAGE", "KNET_DATA", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    assert main(["run", str(SWEEP), "--scale", str(scale)]) == 0
    for trial in load_sweep(SWEEP, scale=str(scale)).trials:
        result = Store(str(home / "storage")).trial(trial.hash).result()
        assert result is not None
        assert 0 <= result.metrics["val/PQ"] <= 1
    lines = (home / "reports" / "panoptic_design" / "table.md").read_text().splitlines()
    header, _, *rows = [line for line in lines if line.startswith("|")]
    assert header.split("|")[2].strip() == "PQ"
    arms = [row.split("|")[1].strip() for row in rows]
    assert len(arms) == 4
    assert "published (baseline)" in arms
