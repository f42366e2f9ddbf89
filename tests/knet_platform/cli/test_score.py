"""`knet score` through the command line: the fixed form of what it prints."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from knet_platform.cli.main import main


def test_panoptic_quality_is_printed_from_0_to_100(real_data: Path, capsys: Any) -> None:
    folder = real_data / "evaluators" / "panopticapi_sample"
    files = []
    for side in ("gt", "pred"):
        files += [f"--{side}-json", str(folder / "panoptic_examples.json")]
        files += [f"--{side}-dir", str(folder / "panoptic_examples")]
    assert main(["score", "panoptic", *files, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert set(scores) == {"All", "Things", "Stuff", "per_class"}
    assert scores["All"]["PQ"] == scores["Things"]["SQ"] == scores["Stuff"]["RQ"] == 100
    assert scores["per_class"]["1"]["pq"] in (0, 100)
    assert main(["score", "panoptic", *files]) == 0
    printed = capsys.readouterr().out
    assert "Things" in printed
    assert "100.0" in printed


def test_average_precision_is_printed_from_0_to_1(real_data: Path, capsys: Any) -> None:
    folder = real_data / "evaluators" / "cocoapi_val2014_100"
    gt = ["--gt", str(folder / "instances_val2014_100.json")]
    pred = ["--pred", str(folder / "instances_val2014_fakesegm100_results.json")]
    assert main(["score", "instance", *gt, *pred, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert list(scores) == ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100"]
    assert round(scores["AP"], 4) == 0.3195
    boxes = ["--pred", str(folder / "instances_val2014_fakebbox100_results.json")]
    assert main(["score", "instance", *gt, *boxes, "--iou-type", "bbox"]) == 0
    assert "AP50    69.7" in capsys.readouterr().out


@pytest.fixture
def labels(tmp_path: Path) -> list[str]:
    for side, pixels in (("gt", [[0, 1, 2]]), ("pred", [[0, 0, 0]])):
        (tmp_path / side).mkdir()
        Image.fromarray(np.array(pixels, dtype=np.uint8)).save(tmp_path / side / "a.png")
    return ["--gt-dir", str(tmp_path / "gt"), "--pred-dir", str(tmp_path / "pred")]


def test_mean_iou_is_printed_from_0_to_1(labels: list[str], capsys: Any) -> None:
    command = ["score", "semantic", *labels, "--num-classes", "4", "--ignore-index", "255"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "mIoU": pytest.approx(1 / 9),
        "aAcc": pytest.approx(1 / 3),
        "mAcc": pytest.approx(1 / 3),
        "per_class": [pytest.approx(1 / 3), 0.0, 0.0, None],
    }
    assert main([*command, "--reduce-zero-label", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mIoU"] == pytest.approx(0.25)
    assert main(command) == 0
    assert "IoU of class 0: 33.3" in capsys.readouterr().out


def test_bad_files_are_lines_and_exit_code_5(labels: list[str], capsys: Any) -> None:
    assert main(["score", "semantic", *labels, "--num-classes", "2"]) == 5
    (line,) = capsys.readouterr().err.splitlines()
    assert "a.png: holds value 2" in line
    files = ["--gt", labels[1], "--pred", "missing.json"]
    assert main(["score", "instance", *files]) == 5
    assert capsys.readouterr().err.startswith("error: ")


def test_a_wrong_number_of_processes_is_a_usage_error(labels: list[str], capsys: Any) -> None:
    assert main(["score", "semantic", *labels, "--num-classes", "4", "--workers", "0"]) == 2
    assert "--workers: 0" in capsys.readouterr().err
