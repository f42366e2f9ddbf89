"""A small sweep for trackers to follow."""

from pathlib import Path

import pytest

from knet_platform.planning import Sweep, load_sweep

SWEEP = """\
# Rounds of kernel update
name: NAME
base: recipe.yaml
metric: {name: val/AP, mode: max}
seeds: [0]
baseline: "2"
arms:
  "1": {model.stages: 1}
  "2": {model.stages: 2}
"""


@pytest.fixture
def sweep(tmp_path: Path, request: pytest.FixtureRequest) -> Sweep:
    """Under a name of its own for each test, since tests share a store."""
    (tmp_path / "recipe.yaml").write_text("data: {format: shapes}\n")
    path = tmp_path / "stages.yaml"
    path.write_text(SWEEP.replace("NAME", request.node.name))
    return load_sweep(path)
