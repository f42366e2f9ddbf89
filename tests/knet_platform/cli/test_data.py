"""`knet data make-shapes` through the command line."""

import json
from pathlib import Path

import pytest

from knet_platform.cli.main import main


def test_make_shapes_writes_the_set_and_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "shapes"
    arguments = ["data", "make-shapes", str(folder), "--train", "3", "--val", "2", "--size", "64"]
    assert main([*arguments, "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written == {"directory": str(folder), "train": 3, "val": 2, "size": 64, "seed": 0}
    assert len(list(folder.rglob("*.json"))) >= 2


def test_a_folder_in_use_is_refused_and_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    assert main(["data", "make-shapes", str(tmp_path), "--train", "1", "--val", "1"]) == 5
    assert str(tmp_path) in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "keep"
