"""`knet import-official` through the command line, on a tiny published file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from knet_core import build_dataset
from knet_platform.cli.main import main
from knet_platform.config import load_recipe

RECIPE = """\
model:
  backbone: {name: test_resnet, pretrained: false, frozen_stages: 0}
  channels: 32
  num_kernels: 10
  stages: 2
  num_heads: 4
  ffn_channels: 64
data:
  format: shapes
  shapes: {num_train: 2, num_val: 2, size: 64}
  short_edge: [64, 64]
  long_edge: 64
  num_workers: 0
"""


@pytest.fixture
def file(tmp_path: Path, published_weights: dict[str, Any]) -> Path:
    meta = {"CLASSES": ["circle", "square"]}
    torch.save({"meta": meta, "state_dict": published_weights}, tmp_path / "published.pth")
    return tmp_path / "published.pth"


@pytest.fixture
def described(tmp_path: Path) -> Path:
    path = tmp_path / "described.yaml"
    path.write_text(RECIPE)
    return path


def test_it_says_what_the_file_was(
    file: Path, described: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["import-official", str(file), str(out), "--recipe", str(described)]) == 0
    printed = capsys.readouterr().out
    assert "instance, test_resnet, 10 kernels, 2 updates, 2 classes" in printed


def test_json_holds_the_configuration_and_the_notes(
    file: Path, described: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(file)
    torch.save({**content, "optimizer": {}}, file)
    out = tmp_path / "out"
    assert main(["import-official", str(file), str(out), f"--recipe={described}", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["checkpoint"] == str(out)
    assert result["model"]["num_kernels"] == 10
    assert result["categories"] == ["circle", "square"]
    assert "optimizer" in result["notes"][0]
    assert result["num_trainable"] <= result["num_parameters"]


def test_an_imported_model_can_be_evaluated(
    published_weights: dict[str, Any],
    described: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = load_recipe(described).data
    names = [category.name for category in build_dataset(data, "val", seed=0).categories]
    for key, weight in published_weights.items():
        if "conv_seg" in key or "fc_cls" in key:
            published_weights[key] = weight[:1].repeat(len(names), *[1] * (weight.dim() - 1))
    file, out = tmp_path / "six.pth", str(tmp_path / "out")
    torch.save({"meta": {"CLASSES": names}, "state_dict": published_weights}, file)
    assert main(["import-official", str(file), out, "--recipe", str(described)]) == 0
    description = tmp_path / "shapes.yaml"
    description.write_text("format: shapes\nshapes: {num_train: 2, num_val: 2, size: 64}\n")
    capsys.readouterr()
    assert main(["eval", out, str(description), "--json"]) == 0
    assert "val/AP" in json.loads(capsys.readouterr().out)


def test_a_damaged_file_is_one_line_and_exit_code_2(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_bytes(file.read_bytes()[:5000])
    assert main(["import-official", str(file), str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(file) in line


def test_a_split_of_classes_that_nobody_knows_asks_for_things(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["import-official", str(file), str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--things" in line


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import-official", "--help"]) == 0
    assert "knet import-official knet_s3_r50" in capsys.readouterr().out
