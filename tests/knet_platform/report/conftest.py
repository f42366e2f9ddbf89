"""A sweep of three arms and its store, with results as a driver writes them."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from knet_platform.planning import load_sweep
from knet_platform.storage import Evaluation, Failure, Store, TrialResult
from knet_platform.sweep import Sweep

RECIPE = """\
data: {format: shapes}
model: {channels: 32, num_heads: 4}
train: {iterations: 300, batch_size: 8}
"""

SWEEP = """\
#!/usr/bin/env -S knet run
# Rounds of kernel update (K-Net, Table 4c)
name: stages
base: recipe.yaml
metric: {name: val/AP, mode: max}
seeds: [0, 1, 2]
baseline: "3"
arms:
  "1": {model.stages: 1}
  "3": {}
  "4": {model.stages: 4}
  "5": {model.stages: 5}
paper:
  source: K-Net, Table 4c & <COCO> val2017
  columns: {val/AP: AP, val/AP50: AP50, val/AP75: AP75, bench/fps: FPS}
  rows:
    "1": [21.8, 37.3, 22.1, 24.0]
    "3": [34.1, 55.3, 35.7, null]
    "5": [34.5, 56.5, 35.7, 20.0]
"""


def webp(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 30)).save(buffer, "WEBP")
    return buffer.getvalue()


def write_sweep(folder: Path, text: str = SWEEP) -> Path:
    (folder / "recipe.yaml").write_text(RECIPE)
    path = folder / "stages.yaml"
    path.write_text(text)
    return path


def result(trial_hash: str, ap: float, *, fps: float = 10.0) -> TrialResult:
    metrics = {"val/AP": ap, "val/AP50": ap * 1.5, "val/AP75": ap * 0.9, "bench/fps": fps}
    evaluations = tuple(
        Evaluation(step=step, time=1e9 + step, metrics={"val/AP": ap * step / 300})
        for step in (100, 200, 300)
    )
    return TrialResult(
        trial_hash=trial_hash,
        step=300,
        metrics=metrics,
        evaluations=evaluations,
        checkpoint="checkpoint_300",
        num_parameters=1000,
        seconds=60.0,
        wall_seconds=70.0,
        device="cpu",
        workers=2,
        finished_at="2026-01-01T00:00:00+00:00",
    )


@pytest.fixture
def make_result() -> Callable[..., TrialResult]:
    return result


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return load_sweep(write_sweep(tmp_path))


@pytest.fixture
def store(tmp_path: Path, sweep: Sweep) -> Store:
    """Arm 1 has one seed, the baseline 3 all three, arm 4 failed, arm 5 never started."""
    store = Store(str(tmp_path / "storage"))
    values = {("1", 0): 0.10, ("3", 0): 0.30, ("3", 1): 0.32, ("3", 2): 0.37}
    for trial in sweep.trials:
        folder = store.trial(trial.hash)
        if ap := values.get((trial.arm, trial.seed)):
            folder.write_result(result(trial.hash, ap))
            folder.write_bytes("pictures/step_000100.webp", b"half a picture")
            folder.write_bytes("pictures/step_000300.webp", webp(64, 32))
            folder.write_bytes("pictures/stages_000300.webp", webp(64, 16))
        elif trial.arm == "4":
            folder.write_failure(
                Failure(
                    cause="crash",
                    kind="WorkerDied",
                    message="killed <by> the kernel",
                    action="stopped the trial",
                    attempt=3,
                    step=0,
                )
            )
    return store
