"""`knet eval` through the command line, on a checkpoint that the engine wrote."""

import json
from pathlib import Path

import pytest
from PIL import Image

from knet_core import fit, make_shapes
from knet_platform.cli.main import main
from knet_platform.config import load_recipe


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
    assert "6 categories" in line
    assert "number 1, is circle there and zebra here" in line


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
    printed = capsys.readouterr().out.split()
    assert printed.index("AP75") < printed.index("static") < printed.index("update")
    assert printed.count("update") == 1


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


def test_a_semantic_model_has_no_kernel_maps_and_is_not_evaluated_for_them(
    recipe: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*TASKS["semantic"], "train.iterations=1"]
    checkpoint = fit(load_recipe(recipe, overrides=settings), output_dir=tmp_path / "run")
    picture = tmp_path / "kernels.png"
    command = ["eval", str(checkpoint.checkpoint), str(data), "data.shapes.num_val=1"]
    assert main([*command, "--kernel-maps", str(picture)]) == 2
    captured = capsys.readouterr()
    assert "no instance kernels" in captured.err
    assert captured.out == ""
    assert not picture.exists()


def test_a_device_that_is_not_there_is_one_line(
    checkpoint: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(checkpoint), str(data), "--device", "cuda:77"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--device: cuda:77" in line
    assert "cpu" in line


TASKS = {
    "instance": [],
    "panoptic": ["model.task=panoptic"],
    "semantic": ["model.task=semantic", "model.semantic.head=fcn", "model.grouping=soft"],
}


def scored(task: str, root: Path, saved: Path) -> list[str]:
    """Return the command that scores saved predictions against the set's own files."""
    annotations = root / "annotations"
    if task == "instance":
        files = {"gt": annotations / "instances_val.json", "pred": saved / "instances.json"}
    elif task == "panoptic":
        files = {
            "gt-json": annotations / "panoptic_val.json",
            "gt-dir": annotations / "panoptic_val",
            "pred-json": saved / "panoptic.json",
            "pred-dir": saved / "panoptic",
        }
    else:
        files = {"gt-dir": annotations / "validation", "pred-dir": saved / "semantic"}
    options = [text for name, path in files.items() for text in (f"--{name}", str(path))]
    if task == "semantic":
        options += ["--num-classes", "10", "--reduce-zero-label", "--pred-from-one"]
    return ["score", task, *options, "--json"]


MAIN = {"instance": ("val/AP", 1), "panoptic": ("val/PQ", 100), "semantic": ("val/mIoU", 1)}
LAYOUTS = {
    "instance": ("coco", "val", "annotations/instances_val.json"),
    "panoptic": ("coco_panoptic", "val", "annotations/panoptic_val.json"),
    "semantic": ("ade20k", "images/validation", "annotations/validation"),
}


@pytest.mark.parametrize("task", TASKS)
def test_saved_predictions_score_as_the_evaluation_says(
    task: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shapes(tmp_path / "set", num_train=1, num_val=5, size=64)
    root = tmp_path / "set" / ("semantic" if task == "semantic" else "")
    data = tmp_path / "data.yaml"
    kind, images, annotations = LAYOUTS[task]
    split = f"{{images: [{images}], annotations: [{annotations}]}}"
    data.write_text(f"format: {kind}\nroot: {root}\nval: {split}\n")
    settings = [*TASKS[task], "train.iterations=1"]
    checkpoint = fit(load_recipe(recipe, overrides=settings), output_dir=tmp_path / "run")
    saved = tmp_path / "saved"
    command = ["eval", str(checkpoint.checkpoint), str(data), "--save-predictions", str(saved)]
    assert main([*command, "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert main(scored(task, root, saved)) == 0
    scores = json.loads(capsys.readouterr().out)
    name, unit = MAIN[task]
    value = scores["All"]["PQ"] if task == "panoptic" else scores[name.removeprefix("val/")]
    assert value == pytest.approx(unit * metrics[name], abs=1e-12)
    if task != "semantic":
        (document,) = (json.loads(path.read_text()) for path in saved.glob("*.json"))
        entries = document if task == "instance" else document["annotations"]
        assert {entry["image_id"] for entry in entries} <= {1, 2, 3, 4, 5}
    assert main(command) == 2  # the folder is there already
    assert "--save-predictions" in capsys.readouterr().err


@pytest.mark.parametrize("task", TASKS)
def test_images_without_annotations_are_predicted_and_not_scored(
    task: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As COCO's test-dev: a file of images and things, for every task, and no folder of maps."""
    root = tmp_path / "set"
    make_shapes(root, num_train=1, num_val=3, size=64)
    document = json.loads((root / "annotations" / "instances_val.json").read_text())
    del document["annotations"]
    stated = json.loads((root / "annotations" / "panoptic_val.json").read_text())["categories"]
    (root / "annotations" / "image_info_test-dev2017.json").write_text(json.dumps(document))
    (root / "val").rename(root / "test2017")
    settings = [*TASKS[task], "train.iterations=1"]
    checkpoint = fit(load_recipe(recipe, overrides=settings), output_dir=tmp_path / "run")
    data = tmp_path / "data.yaml"
    layout = "coco" if task == "instance" else "coco_panoptic"
    split = "{images: [test2017], annotations: [annotations/image_info_test-dev2017.json]}"
    data.write_text(f"format: {layout}\nroot: {root}\nval: {split}\n")
    command = ["eval", str(checkpoint.checkpoint), str(data)]
    saved = tmp_path / "saved"
    assert main(command) == 5
    assert main([*command, "--per-stage", "--save-predictions", str(saved)]) == 5
    lines = capsys.readouterr().err.splitlines()
    assert ["lists images without annotations" in line for line in lines] == [True, True]
    assert main([*command, "--save-predictions", str(saved), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": str(saved), "images": 3}
    names = {Path(image["file_name"]).stem for image in document["images"]}
    if task == "instance":
        found = json.loads((saved / "instances.json").read_text())
        assert {entry["image_id"] for entry in found} == {i["id"] for i in document["images"]}
    else:
        assert {path.stem for path in (saved / task).iterdir()} == names
    if task == "panoptic":
        written = json.loads((saved / "panoptic.json").read_text())
        found = written["annotations"]
        assert {entry["image_id"] for entry in found} == {i["id"] for i in document["images"]}
        assert [c["id"] for c in written["categories"]] == [c["id"] for c in stated]


def test_an_evaluation_that_fails_leaves_no_folder(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_shapes(tmp_path / "set", num_train=1, num_val=3, size=64)
    picture = sorted((tmp_path / "set" / "val").glob("*.png"))[-1]
    picture.write_bytes(picture.read_bytes()[:60])
    data = tmp_path / "data.yaml"
    data.write_text(f"format: coco\nroot: {tmp_path / 'set'}\n")
    before = sorted(path.name for path in tmp_path.iterdir())
    command = ["eval", str(checkpoint), str(data), "eval.batch_size=1"]
    assert main([*command, "--save-predictions", str(tmp_path / "saved")]) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == before
