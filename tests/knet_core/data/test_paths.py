import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from knet_core.config import DataConfig, ShapesConfig, SplitConfig
from knet_core.data.paths import data_fingerprint, find_split, resolve_root
from knet_core.data.storage import served_from
from knet_core.errors import DataError


def test_a_relative_root_lies_below_knet_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.setenv("KNET_DATA", str(tmp_path))
    assert resolve_root(DataConfig(root="mine")) == tmp_path / "mine"


def test_a_missing_root_names_the_folder_and_the_keys(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root: no folder at .*absent.*KNET_DATA") as caught:
        resolve_root(DataConfig(root=str(tmp_path / "absent")))
    assert "\n" not in str(caught.value)


def test_missing_annotations_name_every_candidate(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError) as caught:
        find_split(DataConfig(root=str(tmp_path)), "train")
    message = str(caught.value)
    assert "instances_train2017.json, annotations/instances_train.json" in message
    assert "data.train.annotations" in message
    assert "\n" not in message


def test_the_first_existing_candidate_is_used(tmp_path: Path) -> None:
    for name in ("b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.json").touch()
    split = SplitConfig(images=("a", "b", "c"), annotations=("a.json", "b.json", "c.json"))
    found = find_split(DataConfig(root=str(tmp_path), train=split), "train")
    assert (found.images, found.annotations) == (tmp_path / "b", tmp_path / "b.json")


def test_the_fingerprint_follows_annotations_and_nothing_else(
    coco_folder: Callable[..., DataConfig],
) -> None:
    config = coco_folder()
    before = data_fingerprint(config)
    assert data_fingerprint(replace(config, num_workers=0, flip=0.5)) == before
    path = Path(config.root) / "annotations" / "instances_val.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "info": {}}))
    assert data_fingerprint(config) != before


def test_the_fingerprint_of_shapes_is_their_parameters() -> None:
    one = DataConfig(format="shapes", shapes=ShapesConfig(seed=0))
    assert data_fingerprint(one) == data_fingerprint(replace(one, root="elsewhere"))
    assert data_fingerprint(one) != data_fingerprint(replace(one, shapes=ShapesConfig(seed=1)))


def test_the_fingerprint_of_panoptic_sets_follows_json_and_segments(
    panoptic_folder: Callable[..., DataConfig],
) -> None:
    config = panoptic_folder()
    before = data_fingerprint(config)
    assert data_fingerprint(replace(config, flip=0.5)) == before
    folder = Path(config.root) / "annotations" / "panoptic_train"
    Image.new("RGB", (64, 48)).save(folder / "2.png")
    changed = data_fingerprint(config)
    (folder / "3.png").touch()
    assert len({before, changed, data_fingerprint(config)}) == 3


def test_the_fingerprint_of_label_maps_follows_every_pixel_but_not_times(
    semantic_folder: Callable[..., DataConfig],
) -> None:
    config = semantic_folder(classes=())
    names = Path(config.root) / "classes.txt"
    names.write_text("wall\nfloor\ndoor\n")
    path = Path(config.root) / "annotations" / "validation" / "1.png"
    pixels = np.array(Image.open(path))
    Image.fromarray(pixels).save(path, compress_level=0)
    before = data_fingerprint(config)
    os.utime(path, (0, 0))
    assert data_fingerprint(config) == before
    size = path.stat().st_size
    pixels[5, 5] = 3
    Image.fromarray(pixels).save(path, compress_level=0)
    assert path.stat().st_size == size
    changed = data_fingerprint(config)
    names.write_text("wall\nfloor\nwindow\n")
    assert len({before, changed, data_fingerprint(config)}) == 3


def test_fingerprints_and_shapes_need_no_torch() -> None:
    code = (
        "import sys; from knet_core.data import data_fingerprint, resolve_root, make_shapes; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_detectron2s_variable_stands_in_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ours", "theirs"):
        (tmp_path / name / "set").mkdir(parents=True)
    monkeypatch.delenv("KNET_DATA", raising=False)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "theirs"))
    assert resolve_root(DataConfig(root="set")) == tmp_path / "theirs" / "set"
    monkeypatch.setenv("KNET_DATA", str(tmp_path / "ours"))
    assert resolve_root(DataConfig(root="set")) == tmp_path / "ours" / "set"
    with pytest.raises(DataError, match=r"KNET_DATA=.*ours, DETECTRON2_DATASETS=.*theirs\)"):
        resolve_root(DataConfig(root="absent"))


def test_an_address_is_read_where_it_was_fetched_to_and_refused_elsewhere(tmp_path: Path) -> None:
    data = DataConfig(root="s3://bucket/coco")
    with served_from(data.root, tmp_path / "outer"):
        with served_from(data.root, tmp_path / "inner"):
            assert resolve_root(data) == tmp_path / "inner"
        assert resolve_root(data) == tmp_path / "outer"
        with pytest.raises(DataError):
            resolve_root(DataConfig(root="s3://bucket/other"))
    with pytest.raises(DataError, match=r"data\.root: s3://bucket/coco is an address") as caught:
        resolve_root(data)
    assert "\n" not in str(caught.value)
