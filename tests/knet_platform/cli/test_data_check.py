"""`knet data check` through the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from knet_core import CHECK_ERRORS, CHECK_WARNINGS, make_shapes
from knet_platform.cli.main import main

COCO = Path(__file__).parents[3] / "sweeps" / "data" / "coco.yaml"
SHAPES = COCO.with_name("shapes.yaml")


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    make_shapes(tmp_path / "shapes", num_train=4, num_val=2, size=64, seed=0)
    return tmp_path / "shapes"


def annotations(root: Path) -> Path:
    return next((root / "annotations").glob("instances_train*.json"))


def test_a_sound_set_passes_with_fixed_json(
    shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "check", str(COCO), f"data.root={shapes}", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report) == ["errors", "warnings", "stats"]
    assert report["errors"] == []
    assert report["stats"]["splits"]["train"]["images"] == 4
    assert report["stats"]["num_kernels"] == 100


def test_faults_are_named_and_end_with_exit_code_5(
    shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads(annotations(shapes).read_text())
    document["annotations"][0]["category_id"] = 99
    document["annotations"][1]["segmentation"] = []
    annotations(shapes).write_text(json.dumps(document))
    arguments = ["data", "check", str(COCO), f"data.root={shapes}"]
    assert main([*arguments, "--json"]) == 5
    errors = json.loads(capsys.readouterr().out)["errors"]
    assert all(list(error) == ["code", "file", "id", "message"] for error in errors)
    assert {(e["code"], e["file"], e["id"]) for e in errors} == {
        ("unknown-category", str(annotations(shapes)), document["annotations"][0]["id"]),
        ("empty-mask", str(annotations(shapes)), document["annotations"][1]["id"]),
    }
    assert main(arguments) == 5
    text = capsys.readouterr().out
    assert "error unknown-category: 1" in text
    assert "2 errors" in text


def test_warnings_alone_end_with_exit_code_0(
    shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads(annotations(shapes).read_text())
    document["annotations"].append({**document["annotations"][0], "id": 10_000})
    annotations(shapes).write_text(json.dumps(document))
    options = [f"data.root={shapes}", "model.num_kernels=1", "--json"]
    assert main(["data", "check", str(COCO), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    codes = {warning["code"] for warning in report["warnings"]}
    assert {"duplicate-mask", "too-many-instances"} <= codes


def test_page_and_picture_are_written_and_the_page_escapes_names(shapes: Path) -> None:
    document = json.loads(annotations(shapes).read_text())
    document["categories"][0]["name"] = "<script>alert(1)</script>"
    document["images"][0]["file_name"] = "<img src=x onerror=alert(2)>.png"
    annotations(shapes).write_text(json.dumps(document))
    page, picture = shapes / "page.html", shapes / "masks.png"
    options = [f"data.root={shapes}", "--html", str(page), "--picture", str(picture)]
    assert main(["data", "check", str(COCO), *options]) == 5
    text = page.read_text(encoding="utf-8")
    assert "missing-image" in text
    assert "suggested" in text.lower()
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    with Image.open(picture) as sheet:
        assert np.array(sheet).shape[1] > 3 * 64


@pytest.mark.parametrize("sample", ["0", "-3"])
def test_a_sample_of_nothing_is_refused(sample: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(COCO), "--sample", sample]) == 2
    assert "--sample" in capsys.readouterr().err


def test_a_file_in_no_folder_and_an_unknown_key_are_refused(
    shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "check", str(COCO), "--html", str(shapes / "none" / "x.html")]) == 2
    assert main(["data", "check", str(COCO), "data.rot=x"]) == 2
    assert "data.rot" in capsys.readouterr().err


def test_shapes_have_nothing_to_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(SHAPES)]) == 0
    assert "nothing on disk" in capsys.readouterr().out


def test_help_names_every_code_and_loads_no_torch() -> None:
    script = (
        "import sys\nfrom knet_platform.cli.main import main\n"
        "main(['data', 'check', '--help'])\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(code in done.stdout for code in CHECK_ERRORS | CHECK_WARNINGS)
