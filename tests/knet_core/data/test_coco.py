import json
import os
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api
from pycocotools.coco import COCO

from knet_core.config import DataConfig, SplitConfig
from knet_core.data import build_dataset
from knet_core.data.coco import CocoSource
from knet_core.data.coco_annotations import run_lengths
from knet_core.data.paths import Split, SplitFiles, find_split
from knet_core.errors import DataError
from knet_core.metrics.metric import metric_factory

Folder = Callable[..., DataConfig]
Document = dict[str, Any]

# pycocotools 2.0.11 decodes by a numpy protocol that numpy 2 deprecates; only tests decode by it.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

REAL = [
    *((name, split) for name in ("coco_mini", "nuclei", "balloon") for split in ("train", "val")),
    ("coco_panoptic", "train"),
    ("coco_panoptic", "val"),
    ("coco_instance", "val"),
]


def source_of(config: DataConfig, *, training: bool = False) -> CocoSource:
    return CocoSource(find_split(config, "train" if training else "val"), training=training)


def real_files(folder: Path, split: Split) -> SplitFiles:
    config = DataConfig(root=str(folder))
    if folder.name == "coco_panoptic" and split == "val":
        names = ("annotations/instances_val2017_from_panoptic.json",)
        config = DataConfig(
            root=str(folder), val=SplitConfig(images=("val2017",), annotations=names)
        )
    return find_split(config, split)


# What can be wrong with a file.


def unknown_category(document: Document, root: Path) -> None:
    for annotation in document["annotations"]:
        annotation["category_id"] = 9


def unknown_image(document: Document, root: Path) -> None:
    document["annotations"][0]["image_id"] = 99


def missing_image(document: Document, root: Path) -> None:
    (root / "val" / "1.jpg").unlink()


def escaping_name(document: Document, root: Path) -> None:
    document["images"][1]["file_name"] = "../../secret.jpg"


def absolute_name(document: Document, root: Path) -> None:
    document["images"][1]["file_name"] = os.devnull


def null_name(document: Document, root: Path) -> None:
    document["images"][1]["file_name"] = "a\0b/c.jpg"


def polygon_outside(document: Document, root: Path) -> None:
    document["annotations"][1]["segmentation"] = [[70, 8, 90, 8, 90, 30]]


def polygon_of_another_size(document: Document, root: Path) -> None:
    document["annotations"][1]["segmentation"] = [[8, 8, 400, 8, 400, 300]]


def polygon_not_finite(document: Document, root: Path) -> None:
    document["annotations"][1]["segmentation"] = [[8, 8, float("nan"), 8, 40, 30]]


def polygon_of_two_points(document: Document, root: Path) -> None:
    document["annotations"][1]["segmentation"] = [[8, 8, 40, 30]]


def polygon_of_no_points(document: Document, root: Path) -> None:
    document["annotations"][1]["segmentation"] = [[]]


def flat_polygon(document: Document, root: Path) -> None:
    document["annotations"][1]["segmentation"] = [8, 8, 40, 8, 40, 30]


def no_segmentation(document: Document, root: Path) -> None:
    del document["annotations"][1]["segmentation"]


def empty_segmentation(document: Document, root: Path) -> None:
    document["annotations"][1]["segmentation"] = []


def damaged_rle(document: Document, root: Path) -> None:
    document["annotations"][1]["segmentation"] = {"size": [48, 64], "counts": "kQe1"}


def rle_of_another_size(document: Document, root: Path) -> None:
    document["annotations"][1]["segmentation"] = {"size": [9, 9], "counts": [81]}


def negative_rle(document: Document, root: Path) -> None:
    counts = [48 * 64 + 5, -5]
    document["annotations"][1]["segmentation"] = {"size": [48, 64], "counts": counts}


def repeated_image(document: Document, root: Path) -> None:
    document["images"][1]["id"] = 10


def repeated_category(document: Document, root: Path) -> None:
    document["categories"][1]["id"] = 7


def image_without_size(document: Document, root: Path) -> None:
    del document["images"][1]["width"]


def image_without_name(document: Document, root: Path) -> None:
    del document["images"][1]["file_name"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (unknown_category, r"category id 9: used by 3 annotations .*list of categories \(3, 7\)"),
        (unknown_image, r"image id 99: used by 1 annotations"),
        (missing_image, r"image 11: no image file .*1\.jpg"),
        (escaping_name, r"image 11: file_name '../../secret.jpg' points outside the data set"),
        (absolute_name, r"image 11: file_name '/dev/null' points outside the data set"),
        (null_name, r"image 11: no image file"),
        (polygon_outside, r"annotation 101: polygon outside its image 11: x from 70 to 90"),
        (polygon_of_another_size, r"annotation 101: polygon outside its image 11: .* to 400"),
        (polygon_not_finite, r"annotation 101: polygon outside its image 11: x from nan"),
        (polygon_of_two_points, r"annotation 101: polygon of 4 numbers"),
        (polygon_of_no_points, r"annotation 101: polygon of 0 numbers"),
        (flat_polygon, r"annotation 101: no usable segmentation"),
        (no_segmentation, r"annotation 101: no usable segmentation"),
        (empty_segmentation, r"annotation 101: segmentation is empty"),
        (damaged_rle, r"annotation 101: run lengths cover \d+ pixels, expected 48 x 64"),
        (rle_of_another_size, r"annotation 101: run lengths of size \[9, 9\]"),
        (negative_rle, r"annotation 101: run lengths"),
        (repeated_image, r"image id 10: listed twice"),
        (repeated_category, r"category id 7: listed twice"),
        (image_without_size, r"image 11: height 48, width None"),
        (image_without_name, r"images\[1\]: expected an integer id and a file_name"),
    ],
)
def test_a_wrong_entry_is_one_line_with_file_and_id(
    coco_folder: Folder, spoil: Callable[[Document, Path], None], message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        source_of(coco_folder(spoil))
    for line in str(caught.value).splitlines():
        assert "instances_val.json: " in line


def test_all_problems_of_a_file_are_reported_together(coco_folder: Folder) -> None:
    def spoil(document: Document, root: Path) -> None:
        missing_image(document, root)
        polygon_outside(document, root)
        document["annotations"][2]["category_id"] = 1

    with pytest.raises(DataError) as caught:
        source_of(coco_folder(spoil))
    assert len(str(caught.value).splitlines()) == 3


def test_a_thousand_problems_stay_readable(coco_folder: Folder) -> None:
    def spoil(document: Document, root: Path) -> None:
        document["annotations"] *= 400
        for number, annotation in enumerate(document["annotations"]):
            document["annotations"][number] = {**annotation, "segmentation": []}

    with pytest.raises(DataError, match="and 1180 more problems") as caught:
        source_of(coco_folder(spoil))
    assert len(str(caught.value).splitlines()) == 21


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": [', r"instances_val\.json: not JSON"),
        ("[]", r"instances_val\.json: no list named 'images'"),
        ('{"images": [], "categories": []}', r"no list named 'annotations'"),
    ],
)
def test_a_broken_annotation_file_is_one_line(
    coco_folder: Folder, content: str, message: str
) -> None:
    config = coco_folder()
    (Path(config.root) / "annotations" / "instances_val.json").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        source_of(config)
    assert "\n" not in str(caught.value)


def test_a_truncated_jpeg_is_one_line(coco_folder: Folder) -> None:
    config = coco_folder()
    path = Path(config.root) / "val" / "1.jpg"
    path.write_bytes(path.read_bytes()[:700])
    source = source_of(config)
    assert source.image(0).shape == (48, 64, 3)
    with pytest.raises(DataError, match=r"1\.jpg: cannot be decoded \(.*\); expected a whole"):
        source.image(1)


def test_a_file_that_is_no_image_is_one_line(coco_folder: Folder) -> None:
    config = coco_folder()
    (Path(config.root) / "val" / "1.jpg").write_text("not found")
    with pytest.raises(DataError, match=r"1\.jpg: cannot be decoded"):
        source_of(config).image(1)


def test_sixteen_bit_pixels_are_refused_rather_than_clipped(coco_folder: Folder) -> None:
    config = coco_folder()
    deep = Image.fromarray(np.full((48, 64), 4000, dtype=np.uint16))
    deep.save(Path(config.root) / "val" / "1.jpg", format="PNG")
    with pytest.raises(DataError, match="expected 8 bits"):
        source_of(config).image(1)


def test_an_image_of_another_size_is_one_line(coco_folder: Folder) -> None:
    config = coco_folder()
    Image.new("RGB", (48, 64)).save(Path(config.root) / "val" / "1.jpg")
    with pytest.raises(DataError, match=r"1\.jpg: image 11 is 48 x 64 pixels, expected 64 x 48"):
        source_of(config).image(1)


# What is used and how.


def test_training_drops_empty_crowd_only_and_tiny_images(coco_folder: Folder) -> None:
    def edit(document: Document, root: Path) -> None:
        document["annotations"][0]["iscrowd"] = 1
        del document["annotations"][1]
        for folder in ("train", "val"):
            Image.new("RGB", (64, 31)).save(root / folder / "tiny.jpg")
        document["images"].append({"id": 20, "file_name": "tiny.jpg", "height": 31, "width": 64})
        document["annotations"].append(
            {"image_id": 20, "category_id": 7, "segmentation": [[1, 1, 9, 1, 9, 9]]}
        )

    config = coco_folder(edit)
    training, evaluation = source_of(config, training=True), source_of(config)
    assert [training.record(i).id for i in range(len(training))] == [12]
    assert [evaluation.record(i).id for i in range(len(evaluation))] == [10, 11, 12, 20]
    labels, masks = evaluation.objects(0)
    assert labels.shape == (0,)
    assert masks.shape == (0, 48, 64)


def test_crowds_are_marked_as_undecided(coco_folder: Folder) -> None:
    def edit(document: Document, root: Path) -> None:
        crowd = {"size": [48, 64], "counts": [48 * 60, 48 * 4]}
        document["annotations"].append(
            {"id": 9, "image_id": 10, "category_id": 3, "iscrowd": 1, "segmentation": crowd}
        )

    source = source_of(coco_folder(edit))
    labels = source.semantic(0)
    assert labels is not None
    assert (labels[:, 60:] == 255).all()
    assert (labels[:, :60] == 2).all()  # the number of classes
    assert source.semantic(1) is None
    with pytest.raises(DataError, match="holds instances, no panoptic segments"):
        source.panoptic(0)


def test_a_split_without_usable_images_is_an_error(coco_folder: Folder) -> None:
    def edit(document: Document, root: Path) -> None:
        document["annotations"].clear()

    config = coco_folder(edit)
    assert len(source_of(config)) == 3
    with pytest.raises(DataError, match="none of its 3 images can be used"):
        source_of(config, training=True)


def test_polygons_across_the_border_are_clipped_as_coco_does(coco_folder: Folder) -> None:
    polygon = [-0.6, 10, 80.0, 10, 64.4, 48.7, -0.6, 40]
    edge = [64.2, 3, 64.9, 3, 64.9, 9]  # outside by a pixel of rounding only

    def edit(document: Document, root: Path) -> None:
        document["annotations"][0]["segmentation"] = [polygon, edge]

    _, masks = source_of(coco_folder(edit)).objects(0)
    expected = mask_api.decode(mask_api.merge(mask_api.frPyObjects([polygon, edge], 48, 64)))
    assert np.array_equal(masks[0], expected)


def test_labels_are_positions_in_the_list_sorted_by_id(coco_folder: Folder) -> None:
    source = source_of(coco_folder())
    assert [(c.id, c.name) for c in source.categories] == [(3, "cat"), (7, "dog")]
    assert source.objects(0)[0].tolist() == [1]


def test_names_may_lead_to_another_folder_of_the_set(coco_folder: Folder) -> None:
    def edit(document: Document, root: Path) -> None:
        (root / "more").mkdir()
        (root / "val" / "1.jpg").rename(root / "more" / "1.jpg")
        document["images"][1]["file_name"] = "../more/1.jpg"

    assert source_of(coco_folder(edit)).image(1).shape == (48, 64, 3)


def test_roots_and_image_folders_may_lead_through_a_parent(coco_folder: Folder) -> None:
    config = coco_folder()
    root = Path(config.root)
    (root / "val").rename(root.parent / "photos")
    images = SplitConfig(images=("../photos",), annotations=config.val.annotations)
    around = replace(config, root=str(root / ".." / root.name), val=images)
    assert source_of(around).image(1).shape == (48, 64, 3)


def test_ground_truth_is_plain_json_and_states_missing_areas(coco_folder: Folder) -> None:
    def edit(document: Document, root: Path) -> None:
        document["annotations"][1]["area"] = 5.5

    truth = source_of(coco_folder(edit)).ground_truth()
    assert json.loads(json.dumps(truth)) == truth
    assert [a["id"] for a in truth["annotations"]] == [1, 2, 3]
    assert [a["area"] for a in truth["annotations"]] == [32 * 22, 5.5, 32 * 22]


def test_compressed_run_lengths_are_read_as_the_coco_api_reads_them() -> None:
    rng = np.random.default_rng(0)
    for density in (0.0, 0.003, 0.5, 1.0):
        mask = np.asfortranarray(rng.random((211, 307)) < density, dtype=np.uint8)
        lengths = run_lengths(mask_api.encode(mask)["counts"])
        runs = np.repeat(np.arange(len(lengths)) % 2, lengths)
        assert np.array_equal(runs.reshape(mask.shape, order="F"), mask)
    assert run_lengths(b"").sum() == 0


@pytest.mark.parametrize(("name", "split"), REAL)
def test_real_masks_equal_pycocotools(real_data: Path, name: str, split: Split) -> None:
    files = real_files(real_data / name, split)
    coco = COCO(str(files.annotations))
    source = CocoSource(files, training=False)
    crowds = 0
    for index in range(len(source)):
        record = source.record(index)
        theirs = coco.imgToAnns[record.id]
        labels, masks = source.objects(index)
        single = [a for a in theirs if not a["iscrowd"]]
        crowds += len(theirs) - len(single)
        assert [source.categories[i].id for i in labels] == [a["category_id"] for a in single]
        for mask, annotation in zip(masks, single, strict=True):
            assert np.array_equal(mask, coco.annToMask(annotation))
    truth = source.ground_truth()
    assert sum(a["iscrowd"] for a in truth["annotations"]) == crowds
    assert source.image(0).dtype == np.uint8


def test_nothing_is_decoded_before_it_is_asked_for(
    coco_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = coco_folder()

    def refuse(*arguments: object) -> None:
        raise AssertionError("decoded too early")

    monkeypatch.setattr(Image, "open", refuse)
    monkeypatch.setattr("knet_core.data.coco.run_lengths", refuse)
    assert len(source_of(config, training=True)) == 3


# Files of images only, and what must not be read.


def test_images_without_annotations_can_be_predicted_but_not_scored(coco_folder: Folder) -> None:
    def edit(document: Document, root: Path) -> None:
        del document["annotations"]

    config = coco_folder(edit)
    source = source_of(config)
    assert len(source) == 3
    assert len(source.categories) == 2
    assert source.image(1).shape == (48, 64, 3)
    assert source.objects(1)[1].shape == (0, 48, 64)
    assert not source.annotated
    dataset = build_dataset(config, "val", seed=0)
    with pytest.raises(DataError, match=r"lists images without annotations") as caught:
        metric_factory(dataset)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"no list named 'annotations'"):
        source_of(config, training=True)


def test_the_published_layout_of_coco_is_found(tmp_path: Path, coco_folder: Folder) -> None:
    root = Path(coco_folder().root)
    for split in ("train", "val"):
        (root / split).rename(root / f"{split}2017")
        path = root / "annotations" / f"instances_{split}.json"
        path.rename(path.with_stem(f"instances_{split}2017"))
    config = DataConfig(root=str(root))
    assert len(source_of(config)) == len(source_of(config, training=True)) == 3


def led_outside(document: Document, root: Path) -> None:
    path = root / "val" / "1.jpg"
    path.rename(root.parent / "secret.jpg")
    path.symlink_to(root.parent / "secret.jpg")


def led_outside_by_a_folder(document: Document, root: Path) -> None:
    (root.parent / "secrets").mkdir()
    (root / "val" / "1.jpg").rename(root.parent / "secrets" / "1.jpg")
    (root / "val" / "more").symlink_to(root.parent / "secrets")
    document["images"][1]["file_name"] = "more/1.jpg"


@pytest.mark.parametrize("spoil", [led_outside, led_outside_by_a_folder])
def test_links_out_of_the_set_are_refused(
    coco_folder: Folder, spoil: Callable[[Document, Path], None]
) -> None:
    with pytest.raises(
        DataError, match=r"instances_val\.json: image 11: file_name '.*1\.jpg' points outside"
    ) as caught:
        source_of(coco_folder(spoil))
    assert "\n" not in str(caught.value)


def test_links_within_the_set_and_of_the_recipes_folders_are_followed(
    coco_folder: Folder,
) -> None:
    root = Path(coco_folder().root)
    (root / "val" / "1.jpg").rename(root / "one.jpg")
    (root / "val" / "1.jpg").symlink_to(root / "one.jpg")
    (root / "val").rename(root.parent / "disk")
    (root / "val").symlink_to(root.parent / "disk")
    assert source_of(DataConfig(root=str(root))).image(1).shape == (48, 64, 3)


@pytest.mark.parametrize(("height", "width"), [(50_000, 50_000), (2**70, 64), (70_000, 1)])
def test_images_said_to_be_huge_are_refused_before_anything_is_decoded(
    coco_folder: Folder, height: int, width: int
) -> None:
    def edit(document: Document, root: Path) -> None:
        document["images"][1].update(height=height, width=width)

    with pytest.raises(DataError, match=r"image 11: .* expected"):
        source_of(coco_folder(edit))


@pytest.mark.parametrize("side", [12_000, 50_000])
def test_an_image_that_unpacks_to_gigabytes_is_one_line(coco_folder: Folder, side: int) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + check

    sides = side.to_bytes(4, "big") * 2
    header = chunk(b"IHDR", sides + bytes([8, 2, 0, 0, 0]))
    data = chunk(b"IDAT", zlib.compress(bytes(1000)))
    config = coco_folder()
    bomb = b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")
    (Path(config.root) / "val" / "1.jpg").write_bytes(bomb)
    with pytest.raises(DataError, match=r"1\.jpg: .*pixels.*; expected") as caught:
        source_of(config).image(1)
    assert "\n" not in str(caught.value)


def test_run_lengths_that_decode_to_foreign_memory_have_no_runs() -> None:
    for counts in (b"oooooooo0", b"0\x000", b"~~0", b"ooooooooooooooo"):
        assert len(run_lengths(counts)) == 0
