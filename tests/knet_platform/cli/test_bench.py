"""`knet bench` through the command line, on a network that predicts in milliseconds."""

import json
from pathlib import Path

import pytest

from knet_core import fit
from knet_platform.cli.main import main
from knet_platform.config import load_recipe

SHORT = ["--size", "64x96", "--iterations", "2", "--runs", "2", "--device", "cpu"]


def test_it_times_a_recipe_without_its_data(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = ["data.format=coco", f"data.root={tmp_path / 'nowhere'}", "model.stages=2"]
    assert main(["bench", str(recipe), *values, *SHORT, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["size"] == [64, 96]
    assert (found["iterations"], found["runs"]) == (2, 2)
    assert found["forward"]["mean"] > found["result"]["mean"] > 0
    assert found["forward"]["spread"] >= 0
    assert found["peak_memory"] > 2**20
    assert "threads" in found["device"]


@pytest.mark.parametrize("task", ["instance", "panoptic"])
def test_it_prints_device_torch_and_both_speeds(
    recipe: Path, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    assert main(["bench", str(recipe), f"model.task={task}", *SHORT]) == 0
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed
    assert "2 runs of 2 images" in printed
    for text in ("network alone", "image to result", "images/s", "peak memory"):
        assert text in printed


def test_it_times_a_checkpoint(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = fit(load_recipe(recipe), output_dir=tmp_path / "run").checkpoint
    assert main(["bench", str(checkpoint), *SHORT, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["network"] == str(checkpoint)
    assert main(["bench", str(checkpoint), "model.stages=2", *SHORT]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "model.stages=2" in line


@pytest.mark.parametrize(
    ("option", "value"),
    [("--size", "800"), ("--size", "0x64"), ("--size", "100x64"), ("--runs", "0")],
)
def test_a_bad_number_is_a_usage_error_that_names_it(
    recipe: Path, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(recipe), option, value]) == 2
    printed = capsys.readouterr().err
    assert option in printed
    assert repr(value) in printed


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        (["data.format=cityscapes", "model.task=panoptic"], 19),
        (["data.format=ade20k", "data.classes=[road,sky]", "model.task=semantic"], 2),
    ],
)
def test_classes_follow_from_the_data_of_the_recipe(
    recipe: Path, values: list[str], classes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(recipe), *values, *SHORT, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["classes"] == classes
