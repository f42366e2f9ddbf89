from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from knet_core.config import DataConfig, SplitConfig
from knet_core.data import build_dataset, data_fingerprint
from knet_core.data.cityscapes import CityscapesSource
from knet_core.data.paths import find_split
from knet_core.errors import DataError

# The trainId of every labelId as cityscapesScripts' labels.py has it; what is not here is ignored.
TRAIN_IDS = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11}
TRAIN_IDS |= {25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}

Folder = Callable[..., DataConfig]


@pytest.fixture
def cityscapes(tmp_path: Path) -> Folder:
    """Write two cities of one split each with images of 64 x 40.

    Every map has columns of 4 pixels: labels 0 to 7 in the upper half, and below it two cars, a
    crowd of cars, a trailer (ignored), a person, sky.
    """

    def write(**options: Any) -> DataConfig:
        root = tmp_path / "cityscapes"
        instances = np.zeros((40, 64), dtype=np.int32)
        instances[:20, :32] = np.arange(8).repeat(4)
        for place, value in enumerate((26000, 26001, 26, 30000, 24003, 23)):
            instances[20:, 4 * place : 4 * place + 4] = value
        labels = np.where(instances >= 1000, instances // 1000, instances)
        for split, city in (("train", "aachen"), ("train", "bonn"), ("val", "ulm")):
            for kind in ("leftImg8bit", "gtFine"):
                (root / kind / split / city).mkdir(parents=True)
            stem = f"{city}_000000_000019"
            photograph = root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png"
            Image.new("RGB", (64, 40), (9, 9, 9)).save(photograph)
            folder = root / "gtFine" / split / city
            Image.fromarray(labels.astype(np.uint8)).save(folder / f"{stem}_gtFine_labelIds.png")
            picture = Image.fromarray(instances.astype(np.uint16))
            picture.save(folder / f"{stem}_gtFine_instanceIds.png")
        splits = {
            split: SplitConfig(images=(f"leftImg8bit/{split}",), annotations=(f"gtFine/{split}",))
            for split in ("train", "val")
        }
        sizes: dict[str, Any] = {"short_edge": (40, 40), "long_edge": 64, "flip": 0.0}
        return DataConfig(format="cityscapes", root=str(root), **splits, **{**sizes, **options})

    return write


def source_of(config: DataConfig, task: Any, split: Any = "val") -> CityscapesSource:
    return CityscapesSource(find_split(config, split), training=split == "train", task=task)


def test_semantic_labels_are_the_train_ids(cityscapes: Folder) -> None:
    config = cityscapes()
    path = next(Path(config.root).glob("gtFine/val/*/*_labelIds.png"))
    ids = np.arange(34, dtype=np.uint8).repeat(40).reshape(34, 40)
    picture = np.zeros((40, 64), dtype=np.uint8)
    picture[:34, :40] = ids
    Image.fromarray(picture).save(path)
    source = source_of(config, "semantic")
    labels = source.semantic(0)
    assert labels is not None
    for label_id in range(34):
        assert (labels[label_id, :40] == TRAIN_IDS.get(label_id, 255)).all()
    assert len(source.categories) == 19
    assert [c.name for c in source.categories[::6]] == [
        "road",
        "traffic light",
        "rider",
        "bicycle",
    ]


def test_things_are_objects_and_what_nobody_separated_is_a_crowd(cityscapes: Folder) -> None:
    source = source_of(cityscapes(), "instance")
    assert [c.id for c in source.categories] == [24, 25, 26, 27, 28, 31, 32, 33]
    labels, masks = source.objects(0)
    assert labels.tolist() == [0, 2, 2]  # a person and two cars, by id
    assert [mask.any(0).nonzero()[0].tolist() for mask in masks] == [
        list(range(16, 20)),
        list(range(4)),
        list(range(4, 8)),
    ]
    assert (masks.sum((1, 2)) == 80).all()
    semantic = source.semantic(0)
    assert semantic is not None
    assert (semantic[20:, 8:12] == 255).all()
    assert (semantic[:20] == 8).all()
    truth = source.ground_truth()
    assert sorted((a["category_id"], a["iscrowd"]) for a in truth["annotations"]) == [
        (24, 0),
        (26, 0),
        (26, 0),
        (26, 1),
    ]


def test_a_panoptic_map_has_things_stuff_and_void(cityscapes: Folder) -> None:
    source = source_of(cityscapes(), "panoptic")
    assert len(source.categories) == 19
    assert [c.isthing for c in source.categories] == [True] * 8 + [False] * 11
    truth = source.panoptic(0)
    found = {s.id: (source.categories[s.label].name, s.iscrowd) for s in truth.segments}
    assert found == {
        7: ("road", False),
        23: ("sky", False),
        26: ("car", True),
        24003: ("person", False),
        26000: ("car", False),
        26001: ("car", False),
    }
    assert set(np.unique(truth.ids).tolist()) == {0, *found}
    assert (truth.ids[20:, 12:16] == 0).all()  # the trailer


@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_samples_of_every_task_can_be_trained_on(cityscapes: Folder, task: Any) -> None:
    dataset = build_dataset(cityscapes(), "train", seed=0, task=task)
    assert len(dataset) == 2
    sample = dataset.load(1, epoch=0)
    assert sample.image.shape == (3, 40, 64)
    assert sample.info.file_name == "bonn/bonn_000000_000019_leftImg8bit.png"
    assert len(sample.targets.labels) == (0 if task == "semantic" else 3)


def test_the_fingerprint_follows_every_map(cityscapes: Folder) -> None:
    config = cityscapes()
    before = data_fingerprint(config)
    for name in ("labelIds", "instanceIds"):
        path = next(Path(config.root).glob(f"gtFine/val/*/*_{name}.png"))
        Image.new("L", (64, 40)).save(path)
        assert data_fingerprint(config) != before
        before = data_fingerprint(config)


def missing(path: Path) -> None:
    path.unlink()


def unknown(path: Path) -> None:
    Image.new("I;16", (64, 40), 34).save(path)


def too_large(path: Path) -> None:
    Image.new("I;16", (64, 40), 34001).save(path)


def coloured(path: Path) -> None:
    Image.new("RGB", (64, 40)).save(path)


def grown(path: Path) -> None:
    Image.new("L", (65, 40)).save(path)


def led_outside(path: Path) -> None:
    outside = path.parents[4] / "elsewhere.png"
    path.rename(outside)
    path.symlink_to(outside)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (missing, r"image ulm_000000_000019: no map .*instanceIds\.png"),
        (unknown, r"instanceIds\.png: holds id 34; expected classes 0 to 33"),
        (too_large, r"instanceIds\.png: holds id 34001"),
        (coloured, r"instanceIds\.png: pixels of mode RGB"),
        (grown, r"instanceIds\.png: image 1 is 65 x 40 pixels, expected 64 x 40"),
        (led_outside, r"image ulm_000000_000019: .* link that points outside the data set"),
    ],
)
def test_a_wrong_map_is_one_line_with_its_file(
    cityscapes: Folder, spoil: Callable[[Path], None], message: str
) -> None:
    config = cityscapes()
    spoil(next(Path(config.root).glob("gtFine/val/*/*_instanceIds.png")))
    with pytest.raises(DataError, match=message) as caught:
        source_of(config, "instance").objects(0)
    assert "\n" not in str(caught.value)
