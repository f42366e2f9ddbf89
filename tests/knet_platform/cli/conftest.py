"""A state folder of its own for every test, and a run small enough for seconds."""

from pathlib import Path

import pytest

from knet_core import fit
from knet_platform.config import load_recipe

RECIPE = """\
model:
  backbone: {name: test_resnet, pretrained: false, frozen_stages: 0, norm_eval: false}
  channels: 32
  num_kernels: 10
  stages: 1
  ffn_channels: 64
data:
  format: shapes
  shapes: {num_train: 4, num_val: 2, size: 64}
  short_edge: [64, 64]
  long_edge: 64
  num_workers: 0
train: {iterations: 2, batch_size: 2, log_every: 1, eval_every: 1}
eval: {fps_iterations: 1, probe_images: 1}
"""
SWEEP = """\
# Width of the kernels
name: width
base: tiny.yaml
metric: {name: val/AP, mode: max}
seeds: [0, 1]
baseline: "narrow"
arms:
  narrow: {}
  model.channels=64: {model.channels: 64}
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("KNET_STORAGE", "MLFLOW_TRACKING_URI", "KNET_DATA", "KNET_CACHE", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KNET_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of that recipe leaves, for all tests to read."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(RECIPE)
    trained = fit(load_recipe(folder / "tiny.yaml"), output_dir=folder).checkpoint
    assert trained is not None
    return trained


@pytest.fixture
def width_sweep(recipe: Path) -> Path:
    """A sweep of that recipe."""
    path = recipe.with_name("width.yaml")
    path.write_text(SWEEP)
    return path
