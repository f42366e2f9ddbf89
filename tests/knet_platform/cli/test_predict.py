"""`knet predict` through the command line, on checkpoints that the engine wrote."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api

from knet_core import fit
from knet_platform.cli.main import main
from knet_platform.config import load_recipe

SEMANTIC = [
    "model.task=semantic",
    "model.semantic.head=fcn",
    "model.grouping=soft",
    "train.iterations=1",
]
PANOPTIC = ["model.task=panoptic", "train.iterations=1"]


@pytest.fixture
def photographs(tmp_path: Path) -> list[str]:
    rng = np.random.default_rng(0)
    paths = []
    for name, size in (("wide", (50, 90)), ("tall", (80, 40))):
        path = tmp_path / f"{name}.jpg"
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
        paths.append(str(path))
    return paths


def trained(recipe: Path, tmp_path: Path, *settings: str) -> str:
    checkpoint = fit(load_recipe(recipe, overrides=settings), output_dir=tmp_path / "run")
    return str(checkpoint.checkpoint)


def test_instances_become_pictures_and_coco_results(
    recipe: Path, tmp_path: Path, photographs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["predict", trained(recipe, tmp_path), *photographs, "--out", str(out), "--json"]
    assert main(command) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["files"] == ["instances.json", "tall.png", "wide.png"]
    found = json.loads((out / "instances.json").read_text())
    assert {entry["file_name"] for entry in found} == {"wide.jpg", "tall.jpg"}
    (best,) = [e for e in found if e["file_name"] == "wide.jpg"][:1]
    assert best["segmentation"]["size"] == [50, 90]
    assert 0 <= mask_api.area(best["segmentation"]) <= 50 * 90
    assert best["category_id"] in range(1, 7)
    with Image.open(out / "wide.png") as picture:
        assert picture.width > picture.height


def test_limits_of_the_command_line_count(
    recipe: Path, tmp_path: Path, photographs: list[str]
) -> None:
    out = tmp_path / "out"
    command = ["predict", trained(recipe, tmp_path), *photographs, "eval.max_detections=2"]
    assert main([*command, "--out", str(out)]) == 0
    assert len(json.loads((out / "instances.json").read_text())) == 4


def test_panoptic_maps_become_coco_panoptic_files(
    recipe: Path, tmp_path: Path, photographs: list[str]
) -> None:
    out = tmp_path / "out"
    checkpoint = trained(recipe, tmp_path, *PANOPTIC)
    assert main(["predict", checkpoint, *photographs, "--out", str(out)]) == 0
    document = json.loads((out / "panoptic.json").read_text())
    assert [image["file_name"] for image in document["images"]] == ["wide.jpg", "tall.jpg"]
    for annotation, size in zip(document["annotations"], ((50, 90), (80, 40)), strict=True):
        with Image.open(out / "panoptic" / annotation["file_name"]) as image:
            pixels = np.asarray(image).astype(int)
        ids = pixels[..., 0] + 256 * pixels[..., 1] + 65536 * pixels[..., 2]
        assert ids.shape == size
        areas = {s["id"]: s["area"] for s in annotation["segments_info"]}
        assert areas == {i: int((ids == i).sum()) for i in np.unique(ids).tolist() if i}


def test_semantic_maps_become_label_images_also_with_flips_and_scales(
    recipe: Path, tmp_path: Path, photographs: list[str]
) -> None:
    out = tmp_path / "out"
    settings = ["eval.scales=[1,1.5]", "eval.flip=true"]
    checkpoint = trained(recipe, tmp_path, *SEMANTIC)
    assert main(["predict", checkpoint, *photographs, *settings, "--out", str(out)]) == 0
    with Image.open(out / "semantic" / "tall.png") as image:
        labels = np.asarray(image)
    assert labels.shape == (80, 40)
    assert 1 <= labels.min() <= labels.max() <= 10


def test_stages_lie_side_by_side(recipe: Path, tmp_path: Path, photographs: list[str]) -> None:
    out = tmp_path / "out"
    checkpoint = trained(recipe, tmp_path)
    assert main(["predict", checkpoint, photographs[1], "--stages", "--out", str(out)]) == 0
    with Image.open(out / "tall.png") as image:
        assert 0.9 < image.width / image.height < 1.1  # 80 x 40 twice: static, one update


def test_stages_are_shown_of_images_seen_once(
    recipe: Path, tmp_path: Path, photographs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = trained(recipe, tmp_path, *SEMANTIC)
    out = tmp_path / "out"
    words = ["predict", checkpoint, *photographs, "eval.flip=true", "--stages", "--out", str(out)]
    assert main(words) == 2
    assert "eval.flip set" in capsys.readouterr().err
    assert main(["predict", checkpoint, str(tmp_path), "--out", str(out)]) == 2
    assert f"{tmp_path}: is a folder; expected image files" in capsys.readouterr().err
    assert not out.exists()


def test_all_problems_are_named_at_once_and_nothing_is_left(
    recipe: Path, tmp_path: Path, photographs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "wide.jpg"
    twin.write_bytes(Path(photographs[0]).read_bytes())
    command = ["predict", str(tmp_path), *photographs, str(twin), "missing.jpg", "train.seed=1"]
    assert main([*command, "--out", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    for line, text in zip(lines, ("missing.jpg", "wide", "train.seed=1", "--out"), strict=True):
        assert text in line


def test_a_damaged_image_leaves_no_folder_behind(
    recipe: Path, tmp_path: Path, photographs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path(photographs[1]).write_bytes(Path(photographs[1]).read_bytes()[:200])
    before = sorted(path.name for path in tmp_path.iterdir())
    checkpoint = trained(recipe, tmp_path)
    assert main(["predict", checkpoint, *photographs, "--out", str(tmp_path / "out")]) == 5
    (line,) = capsys.readouterr().err.splitlines()
    assert "tall.jpg" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "run"])
