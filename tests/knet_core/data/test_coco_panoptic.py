import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api

from knet_core.config import DataConfig, ShapesConfig
from knet_core.data import build_dataset, make_shapes
from knet_core.data.coco_panoptic import CocoPanopticSource
from knet_core.data.paths import find_split
from knet_core.errors import ConfigError, DataError

# pycocotools 2.0.11 decodes by a numpy protocol that numpy 2 deprecates; only tests decode by it.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

Folder = Callable[..., DataConfig]
Document = dict[str, Any]


def source_of(
    config: DataConfig, *, training: bool = False, task: Any = "panoptic"
) -> CocoPanopticSource:
    split = find_split(config, "train" if training else "val")
    return CocoPanopticSource(split, training=training, task=task)


def test_things_come_before_stuff_each_by_id(panoptic_folder: Folder) -> None:
    source = source_of(panoptic_folder())
    assert [(c.id, c.name, c.isthing) for c in source.categories] == [
        (7, "dog", True),
        (8, "cat", True),
        (5, "sky", False),
        (90, "grass", False),
    ]


def test_an_image_is_decoded_to_objects_labels_and_segments(panoptic_folder: Folder) -> None:
    source = source_of(panoptic_folder())
    labels, masks = source.objects(1)
    assert labels.tolist() == [1, 0]  # the crowd is no object
    assert [mask.any(0).nonzero()[0].tolist() for mask in masks] == [
        list(range(12, 24)),
        list(range(24, 36)),
    ]
    semantic = source.semantic(1)
    assert semantic is not None
    assert semantic[20].tolist() == [2] * 12 + [1] * 12 + [0] * 12 + [255] * 28
    truth = source.panoptic(1)
    assert (
        truth.ids[3].tolist() == [70000] * 12 + [300] * 12 + [255] * 12 + [65536] * 12 + [0] * 16
    )
    assert [(s.id, s.label, s.iscrowd) for s in truth.segments] == [
        (70000, 2, False),
        (300, 1, False),
        (255, 0, False),
        (65536, 0, True),
    ]


def test_the_instance_task_sees_things_only(panoptic_folder: Folder) -> None:
    source = source_of(panoptic_folder(), task="instance")
    assert [c.name for c in source.categories] == ["dog", "cat"]
    assert source.objects(0)[0].tolist() == [1, 0]
    semantic = source.semantic(0)
    assert semantic is not None
    assert semantic[0].tolist() == [2] * 36 + [255] * 12 + [2] * 16
    truth = source.ground_truth()
    assert json.loads(json.dumps(truth)) == truth
    assert [a["category_id"] for a in truth["annotations"]] == [8, 7, 7] * 3
    assert [a["iscrowd"] for a in truth["annotations"]] == [0, 0, 1] * 3
    mask = mask_api.decode(truth["annotations"][3]["segmentation"])
    assert np.array_equal(mask, source.objects(1)[1][0])
    assert [a["area"] for a in truth["annotations"]] == [12 * 48] * 9


def test_training_drops_images_without_things_and_tiny_ones(panoptic_folder: Folder) -> None:
    def edit(document: Document, root: Path) -> None:
        stuff, crowd = document["annotations"][0], document["annotations"][1]
        stuff["segments_info"] = stuff["segments_info"][:1]
        crowd["segments_info"] = crowd["segments_info"][3:]

    config = panoptic_folder(edit)
    kept = {
        task: [s.record(i).id for i in range(len(s))]
        for task in ("panoptic", "instance", "semantic")
        for s in [source_of(config, training=True, task=task)]
    }
    assert kept == {"panoptic": [12], "instance": [12], "semantic": [10, 12]}
    assert len(source_of(config)) == 3


def test_images_that_nobody_annotated_are_left_out(panoptic_folder: Folder) -> None:
    def edit(document: Document, root: Path) -> None:
        document["annotations"] = document["annotations"][::-1][:2]

    source = source_of(panoptic_folder(edit))
    assert [source.record(i).id for i in range(len(source))] == [12, 11]
    assert source.record(0).file_name == "2.jpg"
    assert source.panoptic(0).ids.shape == (48, 64)


# What can be wrong with a file.


def unknown_category(document: Document, root: Path) -> None:
    document["annotations"][1]["segments_info"][0]["category_id"] = 99


def unknown_image(document: Document, root: Path) -> None:
    document["annotations"][0]["image_id"] = 99


def missing_map(document: Document, root: Path) -> None:
    (root / "annotations" / "panoptic_val" / "1.png").unlink()


def missing_image(document: Document, root: Path) -> None:
    (root / "val" / "1.jpg").unlink()


def no_kind(document: Document, root: Path) -> None:
    del document["categories"][0]["isthing"]


def id_too_large(document: Document, root: Path) -> None:
    document["annotations"][1]["segments_info"][0]["id"] = 256**3


def id_of_void(document: Document, root: Path) -> None:
    document["annotations"][1]["segments_info"][0]["id"] = 0


def repeated_segment(document: Document, root: Path) -> None:
    document["annotations"][1]["segments_info"][0]["id"] = 300


def repeated_annotation(document: Document, root: Path) -> None:
    document["annotations"].append(document["annotations"][0])


def instances_file(document: Document, root: Path) -> None:
    document["annotations"] = [{"id": 1, "image_id": 10, "category_id": 7, "segmentation": []}]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (unknown_category, r"category id 99: used by 1 annotations .*categories \(5, 7, 8, 90\)"),
        (unknown_image, r"image id 99: used by 1 annotations"),
        (missing_map, r"image 11: no segments .*panoptic_val/1\.png"),
        (missing_image, r"image 11: no image file .*1\.jpg"),
        (no_kind, r"category id 7: isthing is None; expected 1 for things or 0 for stuff"),
        (id_too_large, r"image 11: segment id 16777216; expected 1 to 16777215"),
        (id_of_void, r"image 11: segment id 0; expected 1"),
        (repeated_segment, r"image 11: segment id 300 listed twice"),
        (repeated_annotation, r"image 10: annotated twice"),
        (instances_file, r"annotations\[0\]: expected an image_id, a file_name and segments_info"),
    ],
)
def test_a_wrong_entry_is_one_line_with_file_and_id(
    panoptic_folder: Folder, spoil: Callable[[Document, Path], None], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        source_of(panoptic_folder(spoil))
    for line in str(caught.value).splitlines():
        assert "panoptic_val.json: " in line


def test_all_problems_of_a_file_are_reported_together(panoptic_folder: Folder) -> None:
    def spoil(document: Document, root: Path) -> None:
        unknown_category(document, root)
        missing_map(document, root)
        unknown_image(document, root)

    with pytest.raises(DataError) as caught:
        source_of(panoptic_folder(spoil))
    assert len(str(caught.value).splitlines()) == 3


def test_a_missing_folder_of_segments_is_one_line(panoptic_folder: Folder) -> None:
    config = panoptic_folder()
    folder = Path(config.root) / "annotations" / "panoptic_val"
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(DataError, match=r"no folder .*panoptic_val; expected") as caught:
        source_of(config)
    assert "\n" not in str(caught.value)


def grow(path: Path) -> None:
    Image.new("RGB", (65, 48)).save(path)


def stray(path: Path) -> None:
    pixels = np.array(Image.open(path))
    pixels[5, 5] = (1, 2, 0)
    Image.fromarray(pixels).save(path)


def erase(path: Path) -> None:
    pixels = np.array(Image.open(path))
    pixels[:, 12:24] = 0
    Image.fromarray(pixels).save(path)


def grey(path: Path) -> None:
    Image.open(path).convert("L").save(path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (grow, r"1\.png: image 11 is 65 x 48 pixels, expected 64 x 48 from panoptic_val\.json"),
        (stray, r"1\.png: holds segment id 513, which the segments_info of image 11 .* lacks"),
        (erase, r"1\.png: has no pixel of segment id 300, which image 11 .* lists"),
        (grey, r"1\.png: pixels of mode L; expected RGB"),
        (cut, r"1\.png: cannot be decoded"),
        (Path.unlink, r"1\.png: cannot be decoded"),
    ],
)
def test_segments_that_disagree_with_the_json_are_one_line(
    panoptic_folder: Folder, spoil: Callable[[Path], None], message: str
) -> None:
    config = panoptic_folder()
    source = source_of(config)
    spoil(Path(config.root) / "annotations" / "panoptic_val" / "1.png")
    assert source.semantic(0) is not None
    for ask in (source.objects, source.semantic, source.panoptic):
        with pytest.raises(DataError, match=message) as caught:
            ask(1)
        assert "\n" not in str(caught.value)


# What samples are made of it.


def test_a_sample_has_objects_and_the_labels_below_them(panoptic_folder: Folder) -> None:
    config = panoptic_folder()
    dataset = build_dataset(config, "val", seed=0, task="panoptic")
    targets = dataset.load(0, epoch=0).targets
    assert targets.labels.tolist() == [1, 0]
    assert targets.semantic is not None
    for label, mask in zip(targets.labels, targets.masks, strict=True):
        assert (targets.semantic[mask.bool()] == label).all()
    semantic = build_dataset(config, "val", seed=0, task="semantic")
    sample = semantic.load(0, epoch=0).targets
    assert sample.masks.shape == (0, 48, 64)
    assert sample.semantic is not None
    assert sample.semantic.equal(targets.semantic)


def test_written_shapes_are_the_rendered_ones(tmp_path: Path, panoptic_folder: Folder) -> None:
    make_shapes(tmp_path / "shapes", num_train=2, num_val=2, size=64, seed=3)
    written = panoptic_folder(short_edge=(64, 64))
    config = DataConfig(
        format="coco_panoptic",
        root=str(tmp_path / "shapes"),
        train=written.train,
        val=written.val,
        short_edge=(64, 64),
        long_edge=64,
    )
    shapes = DataConfig(
        format="shapes",
        shapes=ShapesConfig(num_train=2, num_val=2, size=64, seed=3),
        short_edge=(64, 64),
        long_edge=64,
    )
    for task in ("panoptic", "instance", "semantic"):
        mine = build_dataset(config, "train", seed=0, task=task)
        theirs = build_dataset(shapes, "train", seed=0, task=task)
        assert mine.categories == theirs.categories
        for index in range(2):
            one, two = mine.load(index, epoch=3), theirs.load(index, epoch=3)
            assert one.image.equal(two.image)
            assert one.targets.masks.equal(two.targets.masks)
            assert one.targets.labels.equal(two.targets.labels)
            if task == "instance":
                assert one.targets.semantic is two.targets.semantic is None
            else:
                assert one.targets.semantic is not None
                assert two.targets.semantic is not None
                assert one.targets.semantic.equal(two.targets.semantic)


@pytest.mark.parametrize(
    ("given", "task", "message"),
    [
        (
            "coco",
            "panoptic",
            r"data\.format: coco .* model\.task=panoptic; .* coco_panoptic, cityscapes or shapes",
        ),
        (
            "coco",
            "semantic",
            r"data\.format: coco .* model\.task=semantic; .* ade20k, cityscapes or shapes",
        ),
        ("ade20k", "instance", r"data\.format: ade20k .* model\.task=instance"),
    ],
)
def test_a_format_that_cannot_serve_a_task_is_refused(given: Any, task: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_dataset(DataConfig(format=given), "val", seed=0, task=task)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("split", ["train", "val"])
def test_real_segments_have_the_stated_areas(real_set: Folder, split: Any) -> None:
    config = real_set("coco_panoptic", "coco_panoptic")
    files = find_split(config, split)
    document = json.loads(files.annotations.read_text())
    entries = {entry["image_id"]: entry["segments_info"] for entry in document["annotations"]}
    source = CocoPanopticSource(files, training=False, task="panoptic")
    assert len(source) == len(entries)
    assert len(source.categories) == 133
    assert [c.isthing for c in source.categories] == [True] * 80 + [False] * 53
    for index in range(len(source)):
        truth = source.panoptic(index)
        semantic, (labels, masks) = source.semantic(index), source.objects(index)
        assert semantic is not None
        stated = {segment["id"]: segment for segment in entries[source.record(index).id]}
        assert {segment.id for segment in truth.segments} == set(stated)
        things = []
        for segment in truth.segments:
            mask = truth.ids == segment.id
            entry = stated[segment.id]
            assert mask.sum() == entry["area"]
            assert source.categories[segment.label].id == entry["category_id"]
            assert (semantic[mask] == (255 if segment.iscrowd else segment.label)).all()
            if source.categories[segment.label].isthing and not segment.iscrowd:
                things.append((segment.label, mask))
        assert labels.tolist() == [label for label, _ in things]
        assert all(np.array_equal(a, b) for a, (_, b) in zip(masks, things, strict=True))
        assert (semantic[truth.ids == 0] == 255).all()


@pytest.mark.parametrize("name", ["../../../secret.png", "/etc/hostname", "link.png"])
def test_segments_outside_the_set_are_refused(panoptic_folder: Folder, name: str) -> None:
    def edit(document: Document, root: Path) -> None:
        (root / "annotations" / "panoptic_val" / "link.png").symlink_to("/etc/hostname")
        document["annotations"][1]["file_name"] = name

    with pytest.raises(DataError, match=r"val\.json: image 11: file_name .* points outside"):
        source_of(panoptic_folder(edit))
