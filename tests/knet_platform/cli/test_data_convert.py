import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from knet_platform.cli.main import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write one image of 40 x 36, its index mask and VIA's file."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (40, 36)).save(tmp_path / "images" / "a.png")
    ids = np.zeros((36, 40), dtype=np.uint16)
    ids[:9, :9], ids[20:, 20:] = 300, 2
    Image.fromarray(ids).save(tmp_path / "masks" / "a.png")
    shape = {"name": "rect", "x": 3, "y": 4, "width": 10, "height": 5}
    regions = [{"shape_attributes": shape, "region_attributes": {}}]
    document = {"a.png1": {"filename": "a.png", "size": 1, "regions": regions}}
    (tmp_path / "images" / "via.json").write_text(json.dumps(document))
    return tmp_path


def test_via_is_written_as_coco(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "annotations" / "via.json"
    source = str(folder / "images" / "via.json")
    assert main(["data", "convert", "via", source, str(out), "--name", "box"]) == 0
    assert "1 images, 1 annotations, 1 categories" in capsys.readouterr().out
    assert json.loads(out.read_text())["categories"] == [{"id": 1, "name": "box"}]
    assert main(["data", "convert", "via", source, str(out)]) == 5
    assert "exists already" in capsys.readouterr().err


def test_index_masks_are_written_as_coco(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "masks.json"
    folders = [str(folder / "images"), str(folder / "masks")]
    assert main(["data", "convert", "index-masks", *folders, str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"file": str(out), "images": 1, "annotations": 2, "categories": 1}
    assert sorted(a["area"] for a in json.loads(out.read_text())["annotations"]) == [81, 320]
