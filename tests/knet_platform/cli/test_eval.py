"""`knet eval` through the command line, on a checkpoint that the engine wrote."""

import json
from pathlib import Path

import pytest
from PIL import Image

from knet_core import fit
from knet_platform.cli.main import main
from knet_platform.config import load_recipe


@pytest.fixture
def checkpoint(recipe: Path, tmp_path: Path) -> Path:
    return fit(load_recipe(recipe), output_dir=tmp_path / "run").checkpoint


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "shapes.yaml"
    path.write_text("format: shapes\nshapes: {num_train: 4, num_val: 3, size: 64}\n")
    return path


def test_it_prints_the_metrics_of_the_data(
    checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(checkpoint), str(data), "eval.batch_size=2", "--json"]) == 0
    assert 0.0 <= json.loads(capsys.readouterr().out)["val/AP"] <= 1.0
    assert main(["eval", str(checkpoint), str(data), "data.shapes.num_val=1"]) == 0
    printed = capsys.readouterr().out
    assert "1 images" in printed
    assert "AP50" in printed


def test_other_categories_are_one_line_that_names_both(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_of_one = {
        "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 64}],
        "annotations": [],
        "categories": [{"id": 1, "name": "zebra"}],
    }
    (tmp_path / "val").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "val" / "a.png")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val.json").write_text(json.dumps(set_of_one))
    data = tmp_path / "zebra.yaml"
    data.write_text(f"format: coco\nroot: {tmp_path}\n")
    assert main(["eval", str(checkpoint), str(data)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "circle" in line
    assert "zebra" in line


def test_settings_of_the_model_are_refused(
    checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(checkpoint), str(data), "model.stages=2"]) == 2
    assert "model.stages=2" in capsys.readouterr().err


def test_a_folder_without_a_checkpoint_is_one_line_and_exit_code_2(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(tmp_path), str(data)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_every_stage_can_be_scored_and_the_last_is_the_result(
    checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(checkpoint), str(data), "--per-stage", "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert {"val/stage0/AP", "val/stage1/AP"} <= set(metrics)
    assert "val/stage2/AP" not in metrics
    assert metrics["val/stage1/AP"] == metrics["val/AP"]
    assert main(["eval", str(checkpoint), str(data), "--per-stage"]) == 0
    assert "AP, stage 0" in capsys.readouterr().out


def test_kernel_maps_are_a_picture_of_every_instance_kernel(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "kernels.png"
    assert main(["eval", str(checkpoint), str(data), "--kernel-maps", str(picture)]) == 0
    with Image.open(picture) as image:
        assert image.width > 10 * 200  # ten kernels in a row
    capsys.readouterr()
    missing = tmp_path / "nowhere" / "kernels.png"
    assert main(["eval", str(checkpoint), str(data), "--kernel-maps", str(missing)]) == 2
    assert "no folder" in capsys.readouterr().err
