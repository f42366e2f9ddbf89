"""Result files: written as predictions come, and complete or not there at all."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from knet_core.data.source import Category
from knet_core.errors import DataError, DiskFullError
from knet_core.results import ResultWriter, new_folder
from knet_core.structures import ImageInfo, Instances, PanopticMap, Segment, SemanticMap

CLASSES = (Category(7, "person"), Category(92, "sky", isthing=False))


def info(image_id: int, name: str) -> ImageInfo:
    return ImageInfo(image_id=image_id, file_name=name, input_size=(4, 6), original_size=(4, 6))


def instances(count: int) -> Instances:
    masks = torch.zeros(count, 4, 6, dtype=torch.bool)
    masks[:, 1:3, 2:] = True
    return Instances(
        scores=torch.linspace(1, 0.1, count), labels=torch.zeros(count).long(), masks=masks
    )


@pytest.mark.parametrize("counts", [(2, 1), (0, 2), (2, 0, 1), (0, 0)])
def test_detections_are_one_list_with_the_sets_ids(tmp_path: Path, counts: tuple[int]) -> None:
    with ResultWriter(tmp_path, CLASSES) as results:
        for position, count in enumerate(counts):
            results.add(info(10 + position, f"{position}.jpg"), instances(count))
    found = json.loads((tmp_path / "instances.json").read_text())
    expected = [10 + position for position, count in enumerate(counts) for _ in range(count)]
    assert [entry["image_id"] for entry in found] == expected
    assert all(entry["category_id"] == 7 for entry in found)


def test_pngs_are_there_as_soon_as_an_image_is(tmp_path: Path) -> None:
    labels = SemanticMap(labels=torch.tensor([[0, 1]], dtype=torch.uint8))
    ids = PanopticMap(
        ids=torch.tensor([[1001, 0]], dtype=torch.int32),
        segments=(Segment(id=1001, label=1, score=0.5),),
    )
    with ResultWriter(tmp_path, CLASSES) as results:
        results.add(info(3, "town/one.jpg"), labels)
        with Image.open(tmp_path / "semantic" / "town_one.png") as picture:
            assert picture.mode == "L"
            assert np.asarray(picture).tolist() == [[7, 92]]
    with ResultWriter(tmp_path, CLASSES) as results:
        results.add(info(3, "../one.jpg"), ids)
        assert (tmp_path / "panoptic" / "one.png").is_file()
        assert not (tmp_path / "panoptic.json").exists()
    document = json.loads((tmp_path / "panoptic.json").read_text())
    (annotation,) = document["annotations"]
    assert (annotation["image_id"], annotation["file_name"]) == (3, "one.png")
    assert annotation["segments_info"] == [
        {"id": 1001, "category_id": 92, "area": 1, "score": 0.5}
    ]


def test_semantic_maps_hold_large_ids_in_16_bits(tmp_path: Path) -> None:
    labels = SemanticMap(labels=torch.tensor([[0, 1]], dtype=torch.uint8))
    with ResultWriter(tmp_path, (CLASSES[0], Category(300, "sky", isthing=False))) as results:
        results.add(info(3, "one.jpg"), labels)
    with Image.open(tmp_path / "semantic" / "one.png") as picture:
        assert np.asarray(picture).tolist() == [[7, 300]]


def test_names_that_would_overwrite_each_other_are_refused(tmp_path: Path) -> None:
    labels = SemanticMap(labels=torch.zeros(2, 2, dtype=torch.uint8))
    with ResultWriter(tmp_path, CLASSES) as results:
        results.add(info(1, "a.jpg"), labels)
        with pytest.raises(DataError, match=r"image 2: a\.png would overwrite"):
            results.add(info(2, "a.png"), labels)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with new_folder(tmp_path / "deep" / "good") as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "deep" / "good").exists()
    assert (tmp_path / "deep" / "good" / "file").read_text() == "x"
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "bad"):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match="the disk is full"), new_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())
