import hashlib
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api

from knet_core.config import DataConfig, ShapesConfig
from knet_core.data import build_dataset, make_shapes
from knet_core.data.shapes import STUFF_CATEGORIES, THING_CATEGORIES, ShapesSource
from knet_core.errors import ConfigError, DataError, DiskFullError

# pycocotools 2.0.11 decodes by a numpy protocol that numpy 2 deprecates; only tests decode by it.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SMALL = {"num_train": 3, "num_val": 2, "size": 64, "seed": 5}


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_one_seed_gives_the_same_bytes_and_another_others(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_shapes(tmp_path / name, **SMALL)
    make_shapes(tmp_path / "c", **{**SMALL, "seed": 6})
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert (
        digests(tmp_path / "a")["train/000000.png"] != digests(tmp_path / "c")["train/000000.png"]
    )


def test_the_three_layouts_agree(tmp_path: Path) -> None:
    make_shapes(tmp_path / "set", **SMALL)
    folder = tmp_path / "set"
    for split, ade in (("train", "training"), ("val", "validation")):
        instances = json.loads((folder / f"annotations/instances_{split}.json").read_text())
        panoptic = json.loads((folder / f"annotations/panoptic_{split}.json").read_text())
        assert [c["id"] for c in panoptic["categories"] if c["isthing"]] == [
            c["id"] for c in instances["categories"]
        ]
        for image, entry in zip(panoptic["images"], panoptic["annotations"], strict=True):
            name = entry["file_name"]
            rgb = np.array(Image.open(folder / f"annotations/panoptic_{split}" / name), dtype=int)
            ids = rgb @ [1, 256, 65536]
            semantic = np.array(Image.open(folder / "semantic/annotations" / ade / name))
            assert (semantic > 0).all()
            masks = {}
            for segment in entry["segments_info"]:
                masks[segment["id"]] = ids == segment["id"]
                assert masks[segment["id"]].sum() == segment["area"]
                assert set(semantic[ids == segment["id"]]) == {segment["category_id"]}
            assert set(np.unique(ids)) == set(masks)
            objects = [a for a in instances["annotations"] if a["image_id"] == image["id"]]
            for number, annotation in enumerate(objects, start=1):
                mask = mask_api.decode(annotation["segmentation"]).astype(bool)
                assert np.array_equal(mask, masks[number])
                assert mask.sum() == annotation["area"]
            picture = (folder / split / name).read_bytes()
            assert picture == (folder / "semantic/images" / ade / name).read_bytes()
    names = (folder / "semantic/classes.txt").read_text().split()
    assert names == [c.name for c in THING_CATEGORIES + STUFF_CATEGORIES]


def test_written_and_rendered_sets_are_the_same_data(tmp_path: Path) -> None:
    make_shapes(tmp_path / "set", **SMALL)
    sizes = {"short_edge": (64, 64), "long_edge": 64}
    written = build_dataset(DataConfig(root=str(tmp_path / "set"), **sizes), "train", seed=0)
    config = DataConfig(format="shapes", shapes=ShapesConfig(**SMALL), **sizes)
    rendered = build_dataset(config, "train", seed=0)
    assert written.categories == rendered.categories
    for index in range(3):
        one, two = (d.load(index, epoch=4) for d in (written, rendered))
        assert one.image.equal(two.image)
        assert one.targets.masks.equal(two.targets.masks)
        assert one.info == two.info
    mine, theirs = written.ground_truth(), rendered.ground_truth()
    assert mine["images"] == theirs["images"]
    for a, b in zip(mine["annotations"], theirs["annotations"], strict=True):
        assert a == {key: b[key] for key in a}


def test_progress_counts_every_image(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    make_shapes(tmp_path / "set", **SMALL, progress=lambda *counts: seen.append(counts))
    assert seen == [(n, 5) for n in range(1, 6)]


def test_a_used_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="already exists and is not empty"):
        make_shapes(tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_folder_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    make_shapes(tmp_path / "set", **SMALL)
    assert (tmp_path / "set" / "train" / "000000.png").is_file()


def test_a_file_in_the_way_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be written"):
        make_shapes(tmp_path / "file" / "set", **SMALL)


def test_a_full_disk_is_named_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DiskFullError, match="disk is full"):
        make_shapes(tmp_path / "set", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_shapes(tmp_path / "set", **SMALL, progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_impossible_numbers_are_configuration_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.shapes\.size"):
        make_shapes(tmp_path / "set", **{**SMALL, "size": 8})


def test_scenes_hold_every_class_hidden_objects_and_a_spread_of_sizes() -> None:
    source = ShapesSource(ShapesConfig(num_train=80, size=128), "train")
    scenes = [source.scene(index) for index in range(len(source))]
    labels = np.concatenate([scene.labels for scene in scenes])
    areas = np.concatenate([scene.masks.sum((1, 2)) for scene in scenes])
    counts = {len(scene.labels) for scene in scenes}
    assert set(labels) == set(range(len(THING_CATEGORIES)))
    assert set(np.unique([scene.stuff for scene in scenes])) == set(range(len(STUFF_CATEGORIES)))
    assert counts == {1, 2, 3, 4, 5}
    assert areas.min() >= 100
    assert np.quantile(areas, 0.9) > 2.5 * np.quantile(areas, 0.1)
    for scene in scenes:
        assert (scene.masks.sum(0) <= 1).all()


def test_every_pixel_belongs_to_one_segment_of_its_class() -> None:
    source = ShapesSource(ShapesConfig(num_train=6, size=64), "train", task="panoptic")
    assert source.categories == THING_CATEGORIES + STUFF_CATEGORIES
    for index in range(len(source)):
        truth, labels = source.panoptic(index), source.semantic(index)
        assert labels is not None
        things, masks = source.objects(index)
        assert [s.label for s in truth.segments][: len(things)] == things.tolist()
        seen = np.zeros((64, 64), dtype=int)
        for segment in truth.segments:
            assert (labels[truth.ids == segment.id] == segment.label).all()
            seen += truth.ids == segment.id
        assert (seen == 1).all()
        for number, mask in enumerate(masks, start=1):
            assert np.array_equal(mask, truth.ids == number)
    assert ShapesSource(ShapesConfig(size=64), "train").semantic(0) is None


def test_splits_and_images_differ() -> None:
    config = ShapesConfig(num_train=3, num_val=1, size=64)
    train, val = ShapesSource(config, "train"), ShapesSource(config, "val")
    images = [train.image(0), train.image(1), train.image(2), val.image(0)]
    assert not any(np.array_equal(a, b) for a, b in pairwise(images))
    assert not np.array_equal(images[0], images[3])
