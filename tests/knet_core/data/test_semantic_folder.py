from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from knet_core.config import DataConfig
from knet_core.data import build_dataset, collate, make_shapes
from knet_core.data.dataset import SegmentationDataset
from knet_core.data.paths import find_split
from knet_core.data.semantic_folder import SemanticFolderSource
from knet_core.data.shapes import STUFF_CATEGORIES, THING_CATEGORIES
from knet_core.errors import ConfigError, DataError

Folder = Callable[..., DataConfig]


def dataset_of(config: DataConfig, split: str = "val") -> SegmentationDataset:
    return build_dataset(config, "train" if split == "train" else "val", seed=0, task="semantic")


def test_labels_are_category_ids_less_one_and_zero_is_ignored(semantic_folder: Folder) -> None:
    dataset = dataset_of(semantic_folder())
    assert [(c.id, c.name) for c in dataset.categories] == [(1, "wall"), (2, "floor"), (3, "door")]
    assert dataset.semantic(1)[7].tolist() == [255] * 16 + [0] * 16 + [1] * 16 + [2] * 16
    targets = dataset.load(1, epoch=0).targets
    assert targets.masks.shape == (0, 48, 64)
    assert targets.labels.shape == (0,)


def test_indices_of_a_palette_and_255_are_read_as_they_are(semantic_folder: Folder) -> None:
    config = semantic_folder()
    path = Path(config.root) / "annotations" / "validation" / "1.png"
    ids = np.array(Image.open(path))
    ids[0, 20] = 255
    picture = Image.fromarray(ids)
    picture.putpalette(list(range(255, -1, -1)) * 3)
    assert picture.mode == "P"
    picture.save(path)
    labels = dataset_of(config).semantic(1)
    assert labels[0, 20] == 255
    assert labels[1].tolist() == [255] * 16 + [0] * 16 + [1] * 16 + [2] * 16


def test_names_come_from_the_recipe_or_from_the_folder(semantic_folder: Folder) -> None:
    config = semantic_folder(classes=())
    with pytest.raises(DataError, match=r"data\.classes: no names, and no file .*classes\.txt"):
        dataset_of(config)
    names = Path(config.root) / "classes.txt"
    names.write_text("one\ntwo\nthree\n")
    assert [c.name for c in dataset_of(config).categories] == ["one", "two", "three"]
    names.write_text("one\n\nthree\n")
    with pytest.raises(DataError, match=r"classes\.txt: 3 lines, 1 of them empty"):
        dataset_of(config)


def test_more_classes_than_a_byte_can_tell_apart_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.classes: must be at most 254 names, got 255"):
        DataConfig(classes=tuple(map(str, range(255))))


def test_an_id_without_a_category_is_one_line(semantic_folder: Folder) -> None:
    dataset = dataset_of(semantic_folder(classes=("wall", "floor")))
    with pytest.raises(DataError, match=r"0\.png: holds category id 3; expected 0 .* to 2") as e:
        dataset.load(0, epoch=0)
    assert "\n" not in str(e.value)


def test_missing_and_surplus_files_are_reported_together(semantic_folder: Folder) -> None:
    config = semantic_folder()
    root = Path(config.root)
    (root / "annotations" / "validation" / "1.png").unlink()
    (root / "images" / "validation" / "2.jpg").unlink()
    with pytest.raises(DataError) as caught:
        dataset_of(config)
    first, second = str(caught.value).splitlines()
    assert "image 1: no label map" in first
    assert "2.png: no image of that name" in second


def test_an_empty_folder_and_a_missing_one_are_one_line(semantic_folder: Folder) -> None:
    config = semantic_folder()
    root = Path(config.root)
    for kind in ("images", "annotations"):
        for path in (root / kind / "validation").iterdir():
            path.unlink()
    with pytest.raises(DataError, match=r"images: none; expected files ending in \.jpeg, \.jpg"):
        dataset_of(config)
    (root / "annotations" / "validation").rmdir()
    with pytest.raises(DataError, match=r"data\.val\.annotations: .* for knet predict"):
        dataset_of(config)


@pytest.mark.parametrize(
    ("mode", "size", "message"),
    [
        ("RGB", (64, 48), r"1\.png: pixels of mode RGB; expected one byte a pixel"),
        ("L", (64, 47), r"1\.png: image 2 is 64 x 47 pixels, expected 64 x 48"),
    ],
)
def test_a_map_of_another_kind_is_one_line(
    semantic_folder: Folder, mode: str, size: tuple[int, int], message: str
) -> None:
    config = semantic_folder()
    Image.new(mode, size).save(Path(config.root) / "annotations" / "validation" / "1.png")
    with pytest.raises(DataError, match=message) as caught:
        dataset_of(config).load(1, epoch=0)
    assert "\n" not in str(caught.value)


def test_written_shapes_are_the_rendered_ones(tmp_path: Path, semantic_folder: Folder) -> None:
    make_shapes(tmp_path / "shapes", num_train=2, num_val=2, size=64, seed=3)
    layout = semantic_folder()
    sizes = {"short_edge": (64, 64), "long_edge": 64}
    root = str(tmp_path / "shapes" / "semantic")
    written = DataConfig(format="ade20k", root=root, train=layout.train, val=layout.val, **sizes)
    dataset = dataset_of(written, "train")
    assert [(c.id, c.name) for c in dataset.categories] == [
        (c.id, c.name) for c in THING_CATEGORIES + STUFF_CATEGORIES
    ]
    assert set(np.unique(dataset.semantic(0))) <= set(range(10))


AUGMENTED = {
    "short_edge": (64, 64),
    "long_edge": 128,
    "flip": 0.5,
    "scale_range": (0.5, 2.0),
    "crop": 48,
    "crop_max_share": 0.75,
    "photometric": True,
}


def test_augmented_samples_are_crops_padded_with_ignored_pixels(semantic_folder: Folder) -> None:
    dataset = dataset_of(semantic_folder(**AUGMENTED), "train")
    padded = 0
    for epoch in range(30):
        sample = dataset.load(0, epoch=epoch)
        labels = sample.targets.semantic
        assert labels is not None
        assert sample.image.shape == (3, 48, 48)
        assert labels.shape == sample.info.input_size == (48, 48)
        rows = (labels != 255).any(dim=1)
        height = int(rows.nonzero().max()) + 1
        assert height == 48 or (labels[height:] == 255).all()
        if height < 48:
            padded += 1
            assert (sample.image[:, height:] == 0).all()
    assert 1 <= padded <= 12  # one image in six is scaled to less than the crop
    batch = collate([dataset.load(i, epoch=0) for i in range(3)])
    assert batch.images.shape == (3, 3, 64, 64)


def test_augmentation_is_decided_by_seed_epoch_and_index(semantic_folder: Folder) -> None:
    config = semantic_folder(**AUGMENTED)
    one, two = (dataset_of(config, "train") for _ in range(2))
    images = []
    for epoch in range(4):
        mine, theirs = one.load(1, epoch=epoch), two.load(1, epoch=epoch)
        assert mine.image.equal(theirs.image)
        assert mine.targets.semantic is not None
        assert theirs.targets.semantic is not None
        assert mine.targets.semantic.equal(theirs.targets.semantic)
        images.append(mine.image)
    assert not any(images[0].equal(other) for other in images[1:])


def test_evaluation_sees_the_whole_image(semantic_folder: Folder) -> None:
    dataset = dataset_of(semantic_folder(**AUGMENTED))
    sample = dataset.load(0, epoch=5)
    assert sample.info.input_size == (64, 85)
    assert sample.targets.semantic is not None
    assert sample.targets.semantic.shape == (64, 85)
    assert sample.image.equal(dataset.load(0, epoch=6).image)


@pytest.mark.parametrize(
    ("file", "name", "classes", "images"),
    [("ade20k", "ade20k", 150, (6, 5)), ("camvid", "camvid", 11, (367, 101))],
)
def test_every_real_image_loads(
    real_set: Folder, file: str, name: str, classes: int, images: tuple[int, int]
) -> None:
    config = real_set(file, name, short_edge=(32, 32), long_edge=128)
    for split, count in zip(("train", "val"), images, strict=True):
        dataset = dataset_of(config, split)
        assert (len(dataset), dataset.num_classes) == (count, classes)
        seen = np.zeros(256, dtype=np.int64)
        for index in range(count):
            sample = dataset.load(index, epoch=0)
            assert sample.image.isfinite().all()
            assert sample.targets.semantic is not None
            assert sample.targets.semantic.shape == sample.image.shape[1:]
            seen += np.bincount(dataset.semantic(index).ravel(), minlength=256)
            assert sample.targets.semantic.dtype == torch.uint8
        assert seen[classes:255].sum() == 0
        assert seen[:classes].sum() > 5 * seen[255]
    if name == "camvid":
        known = [[name] for name in (Path(config.root) / "classes.txt").read_text().split()]
    else:
        table = (Path(config.root) / "objectInfo150.txt").read_text().splitlines()[1:]
        known = [[name.strip() for name in row.split("\t")[-1].split(",")] for row in table]
    assert len(config.classes) == len(known)
    assert all(name in names for name, names in zip(config.classes, known, strict=True))


@pytest.mark.parametrize("kind", ["images", "annotations"])
def test_links_out_of_the_set_are_refused(
    semantic_folder: Callable[..., DataConfig], kind: str
) -> None:
    config = semantic_folder()
    path = sorted((Path(config.root) / kind / "validation").iterdir())[1]
    outside = Path(config.root).parent / path.name
    path.rename(outside)
    path.symlink_to(outside)
    with pytest.raises(DataError, match=r"image 1: .* link that points outside the data set"):
        SemanticFolderSource(find_split(config, "val"), config)
