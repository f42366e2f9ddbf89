"""The data set doctor: every fault is planted in a copy of a real set and must be named."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from knet_core.config import DataConfig, SplitConfig
from knet_core.data.check import check_data
from knet_core.data.check_report import CHECK_ERRORS, CHECK_WARNINGS, CheckReport
from knet_core.data.dataset import build_dataset
from knet_core.errors import ConfigError, DataError

RealSet = Callable[..., DataConfig]
Named = set[tuple[str, str, object]]


def named(report: CheckReport) -> Named:
    """Code, file name and id of everything that was found."""
    return {(f.code, Path(f.file).name, f.id) for f in (*report.errors, *report.warnings)}


def copied(config: DataConfig, folder: Path) -> DataConfig:
    shutil.copytree(config.root, folder)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)  # the originals are read-only
    return dataclasses.replace(config, root=str(folder))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("file", "name"),
    [("coco", "coco_mini"), ("coco_panoptic", "coco_panoptic"), ("balloon", "balloon")],
)
def test_untouched_real_sets_have_no_errors(real_set: RealSet, file: str, name: str) -> None:
    report = check_data(real_set(file, name))
    assert report.errors == ()
    assert report.stats.splits.keys() == {"train", "val"}
    assert all(split.images == split.checked_images for split in report.stats.splits.values())


def test_an_untouched_semantic_set_has_no_errors(real_set: RealSet) -> None:
    report = check_data(real_set("camvid", "camvid"), sample=20)
    assert report.errors == ()
    assert report.stats.splits["train"].images == 367
    assert report.stats.splits["train"].checked_images == 20
    assert report.stats.suggested_kernels is None


def test_every_fault_of_coco_instances_is_named(real_set: RealSet, tmp_path: Path) -> None:
    config = copied(real_set("coco", "coco_mini"), tmp_path / "set")
    root = tmp_path / "set"
    path = root / "annotations" / "instances_train2017.json"
    document = json.loads(path.read_text())
    images, annotations = document["images"], document["annotations"]
    expected: Named = set()

    def plant(code: str, number: object, file: str = path.name) -> None:
        expected.add((code, file, number))

    spare = iter(images)

    def image(code: str) -> dict[str, Any]:
        """The next image that has no fault yet; it shall get this one."""
        entry: dict[str, Any] = next(spare)
        plant(code, entry["id"], entry["file_name"])
        return entry

    folder = root / "train2017"
    (folder / image("missing-image")["file_name"]).unlink()
    cut(folder / image("unreadable-image")["file_name"])
    (folder / image("unreadable-image")["file_name"]).write_text("no image")
    wide = image("size-mismatch")
    Image.new("RGB", (wide["width"] + 3, wide["height"])).save(folder / wide["file_name"])
    outside = next(spare)
    outside["file_name"] = "../../secret.jpg"
    plant("outside-root", outside["id"], "secret.jpg")
    linked = image("outside-root")
    shutil.move(folder / linked["file_name"], tmp_path / "elsewhere.jpg")
    (folder / linked["file_name"]).symlink_to(tmp_path / "elsewhere.jpg")
    small = image("tiny-image")
    small["height"] = small["width"] = 20
    plant("size-mismatch", small["id"], small["file_name"])
    annotations[:] = [a for a in annotations if a["image_id"] != small["id"]]
    Image.new("RGB", (20, 30)).save(folder / small["file_name"])
    leaked = image("leaked-image")
    victim = json.loads((root / "annotations" / "instances_val2017.json").read_text())["images"][0]
    expected.discard(("leaked-image", leaked["file_name"], leaked["id"]))
    plant("leaked-image", victim["id"], victim["file_name"])
    with Image.open(folder / leaked["file_name"]) as picture:  # other bytes, the same pixels
        picture.save(root / "val2017" / victim["file_name"], format="PNG")
    plant("size-mismatch", victim["id"], victim["file_name"])
    twin, original = image("duplicate-image"), leaked
    shutil.copy(folder / original["file_name"], folder / twin["file_name"])
    plant("size-mismatch", twin["id"], twin["file_name"])
    nameless = next(spare)
    del nameless["height"]
    plant("bad-entry", nameless["id"])
    twice = next(spare)
    images.append(dict(twice))
    plant("duplicate-id", twice["id"])
    plant("duplicate-image", twice["id"], twice["file_name"])

    host = images[40]
    height, width = host["height"], host["width"]
    annotations[:] = [a for a in annotations if a["image_id"] != host["id"]]
    square = [[10.0, 10.0, 90.0, 10.0, 90.0, 90.0, 10.0, 90.0]]
    pixels = height * width
    masks: dict[str, Any] = {
        "empty-mask": [],
        "bad-polygon": [[1, 1, 20, 20]],
        "out-of-image": [[width + 50, 5, width + 90, 5, width + 90, 40]],
        "clipped-mask": [[width - 60, 20, width + 9, 20, width + 9, 60, width - 60, 60]],
        "tiny-mask": [[5.1, 5.1, 5.2, 5.1, 5.2, 5.2]],
        "bad-rle": {"size": [height, width], "counts": [5, 7]},
        "size-mismatch": {"size": [width, height], "counts": [0, pixels]},
        "area-mismatch": [[5, 5, 45, 5, 45, 45, 5, 45]],
        "bad-entry": 7,
        "duplicate-mask": [[200, 120, 260, 120, 260, 180, 200, 180]],
        "overlapping-masks": [[100, 10, 150, 10, 150, 60, 100, 60]],
    }
    template = {"image_id": host["id"], "category_id": 1, "iscrowd": 0}
    for number, (code, mask) in enumerate(masks.items(), start=1):
        stated = {"area": 160_000.0} if code == "area-mismatch" else {}
        annotations.append({**template, "id": number, "segmentation": mask, **stated})
        plant(code, number)
    annotations += [
        {**template, "id": 50, "segmentation": {"size": [height, width], "counts": [pixels]}},
        {**template, "id": 51, "segmentation": masks["duplicate-mask"]},
        {**template, "id": 52, "segmentation": [[100, 10, 151, 10, 151, 60, 100, 60]]},
        {**template, "id": 53, "segmentation": square, "image_id": 123456789},
        {**template, "id": 54, "segmentation": square, "category_id": 9999},
        {**template, "id": 55, "segmentation": [[float("nan")] * 6]},
        {**template, "id": 56, "segmentation": square, "iscrowd": 1},
        {**template, "id": 56, "segmentation": square, "iscrowd": 1},
        "no annotation",
    ]
    for code in ("duplicate-mask", "overlapping-masks"):
        expected.discard((code, path.name, list(masks).index(code) + 1))
    for code, number in (
        ("empty-mask", 50),
        ("duplicate-mask", 51),
        ("overlapping-masks", 52),
        ("unknown-image", 53),
        ("unknown-category", 54),
        ("bad-polygon", 55),
        ("duplicate-id", 56),
        ("bad-entry", f"annotations[{len(annotations) - 1}]"),
    ):
        plant(code, number)
    document["categories"].append({"id": 500, "name": "dragon"})
    document["categories"].append({"id": 500, "name": "dragon"})
    document["categories"].append({"id": None})
    plant("duplicate-id", 500)
    plant("bad-entry", f"categories[{len(document['categories']) - 1}]")
    plant("category-mismatch", 500, "instances_val2017.json")
    path.write_text(json.dumps(document))

    found = named(check_data(config))
    assert expected - found == set()
    untouched = named(check_data(real_set("coco", "coco_mini")))
    # An image of another size than stated has run lengths and polygons of the stated one.
    assert found - expected - untouched == set()


def test_every_fault_of_coco_panoptic_is_named(real_set: RealSet, tmp_path: Path) -> None:
    config = copied(real_set("coco_panoptic", "coco_panoptic"), tmp_path / "set")
    path = tmp_path / "set" / "annotations" / "panoptic_val2017.json"
    maps = path.with_suffix("")
    document = json.loads(path.read_text())
    rows = iter(document["annotations"])
    expected: Named = set()

    def row(*, segments: int = 1) -> dict[str, Any]:
        return next(row for row in rows if len(row["segments_info"]) >= segments)

    missing, damaged, grey, small = row(), row(), row(), row()
    (maps / missing["file_name"]).unlink()
    expected.add(("missing-map", missing["file_name"], missing["image_id"]))
    cut(maps / damaged["file_name"])
    expected.add(("unreadable-map", damaged["file_name"], damaged["image_id"]))
    with Image.open(maps / grey["file_name"]) as picture:
        picture.convert("L").save(maps / grey["file_name"])
    expected.add(("unreadable-map", grey["file_name"], grey["image_id"]))
    with Image.open(maps / small["file_name"]) as picture:
        part = picture.crop((0, 0, picture.width, picture.height - 1))
        part.save(maps / small["file_name"])
    expected.add(("size-mismatch", small["file_name"], small["image_id"]))

    unlisted, absent = row(segments=2), row()
    gone = unlisted["segments_info"].pop()
    expected.add(("unlisted-segment", unlisted["file_name"], gone["id"]))
    ghost = {"id": 77, "category_id": 1, "area": 5, "bbox": [0, 0, 1, 1], "iscrowd": 0}
    absent["segments_info"].append(ghost)
    expected.add(("absent-segment", absent["file_name"], 77))

    wrong_area, strange, double = row(), row(), row()
    segment = wrong_area["segments_info"][0]
    segment["area"] += 1
    expected.add(("area-mismatch", wrong_area["file_name"], segment["id"]))
    strange["segments_info"][0]["category_id"] = 9999
    expected.add(("unknown-category", path.name, strange["segments_info"][0]["id"]))
    double["segments_info"].append(dict(double["segments_info"][0]))
    expected.add(("duplicate-id", path.name, double["segments_info"][0]["id"]))
    zero, twice = row(), row()
    zero["segments_info"].append({**ghost, "id": 0})
    expected.add(("bad-entry", path.name, 0))
    document["annotations"].append(dict(twice))
    expected.add(("duplicate-id", path.name, twice["image_id"]))
    document["annotations"].append({**twice, "image_id": 424242})
    expected.add(("unknown-image", path.name, "424242"))
    document["annotations"].append({"image_id": 1})
    expected.add(("bad-entry", path.name, f"annotations[{len(document['annotations']) - 1}]"))
    escaping = row()
    escaping["file_name"] = "/etc/passwd"
    expected.add(("outside-root", "passwd", escaping["image_id"]))
    document["categories"][0]["isthing"] = 5
    expected.add(("bad-entry", path.name, document["categories"][0]["id"]))
    path.write_text(json.dumps(document))

    found = named(check_data(config))
    assert expected - found == set()
    # Of the map that was cut by one row, areas changed as well.
    assert {f for f in found - expected if f[1] != small["file_name"]} == set()


def test_every_fault_of_a_semantic_folder_is_named(real_set: RealSet, tmp_path: Path) -> None:
    whole = real_set("camvid", "camvid")
    config = dataclasses.replace(whole, root=str(tmp_path))
    for split in ("training", "validation"):
        for kind, ending in (("images", "jpg"), ("annotations", "png")):
            folder = tmp_path / kind / split
            folder.mkdir(parents=True)
            for path in sorted(Path(whole.root, kind, split).glob(f"*.{ending}"))[:10]:
                shutil.copyfile(path, folder / path.name)
    assert check_data(config).errors == ()
    images, maps = tmp_path / "images" / "training", tmp_path / "annotations" / "training"
    stems = sorted(path.stem for path in images.iterdir())
    (maps / f"{stems[0]}.png").unlink()
    (images / f"{stems[1]}.jpg").unlink()
    cut(images / f"{stems[2]}.jpg")
    cut(maps / f"{stems[3]}.png")
    with Image.open(maps / f"{stems[4]}.png") as picture:
        ids = np.array(picture)
    ids[:5, :5] = 12  # of 11 classes
    Image.fromarray(ids).save(maps / f"{stems[4]}.png")
    Image.fromarray(ids[:-1]).save(maps / f"{stems[5]}.png")
    leaked = sorted((tmp_path / "images" / "validation").iterdir())[0]
    shutil.copyfile(images / f"{stems[6]}.jpg", leaked)
    Image.fromarray(ids.astype(np.uint16)).save(maps / f"{stems[7]}.png")
    shutil.copyfile(images / f"{stems[8]}.jpg", images / f"{stems[8]}.png")
    expected: Named = {
        ("missing-map", f"{stems[0]}.jpg", stems[0]),
        ("map-without-image", f"{stems[1]}.png", stems[1]),
        ("unreadable-image", f"{stems[2]}.jpg", stems[2]),
        ("unreadable-map", f"{stems[3]}.png", stems[3]),
        ("unknown-category", f"{stems[4]}.png", stems[4]),
        ("size-mismatch", f"{stems[5]}.png", stems[5]),
        ("unknown-category", f"{stems[5]}.png", stems[5]),
        ("leaked-image", leaked.name, leaked.stem),
        ("unreadable-map", f"{stems[7]}.png", stems[7]),
        ("duplicate-id", "training", stems[8]),
    }
    assert named(check_data(config)) == expected


def test_what_the_loader_refuses_is_never_passed(
    coco_folder: Callable[..., DataConfig], tmp_path: Path
) -> None:
    """The last step asks the loaders; here about images of which none can be learned from."""

    def spoil(document: dict[str, Any], root: Path) -> None:
        for number, path in enumerate(sorted((root / "val").iterdir())):
            Image.new("RGB", (64, 48), (number, 0, 0)).save(path)  # or it would be a leak
        document["annotations"] = []

    config = coco_folder(spoil)
    with pytest.raises(DataError):
        build_dataset(config, "train", seed=0)
    report = check_data(config)
    assert [finding.code for finding in report.errors] == ["refused-by-loader"]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"images": 3}', '{"images": []}'])
def test_a_file_of_another_kind_is_a_finding(
    coco_folder: Callable[..., DataConfig], text: str
) -> None:
    config = coco_folder()
    path = Path(config.root, "annotations", "instances_train.json")
    path.write_text(text)
    report = check_data(config)
    assert ("unreadable-annotations", path.name, None) in named(report)
    assert "val" in report.stats.splits  # the other split is looked at all the same


def test_missing_folders_and_a_missing_root_are_findings(tmp_path: Path) -> None:
    report = check_data(DataConfig(root=str(tmp_path)))
    assert {finding.code for finding in report.errors} == {"missing-files"}
    assert len(report.errors) == 4  # images and annotations of both splits
    report = check_data(DataConfig(root=str(tmp_path / "none")))
    assert [finding.code for finding in report.errors] == ["missing-files"]


def test_a_file_of_images_alone_serves_evaluation_but_not_training(
    coco_folder: Callable[..., DataConfig],
) -> None:
    config = coco_folder()
    for split in ("train", "val"):
        path = Path(config.root, "annotations", f"instances_{split}.json")
        document = json.loads(path.read_text())
        del document["annotations"]
        path.write_text(json.dumps(document))
    for path in Path(config.root, "val").iterdir():
        Image.new("RGB", (64, 48), (0, 0, int(path.stem))).save(path, format="PNG")
    report = check_data(config)
    assert [f.code for f in report.errors] == ["refused-by-loader"]
    assert report.errors[0].file.endswith("instances_train.json")
    assert [f.code for f in report.warnings] == ["no-annotations", "no-annotations"]


def test_a_test_set_beside_panoptic_training_images_is_told_from_a_fault(
    real_set: RealSet, tmp_path: Path
) -> None:
    """COCO's test-dev file lists the things alone, without `isthing`, and has no maps."""
    config = copied(real_set("coco_panoptic", "coco_panoptic"), tmp_path / "set")
    annotations = tmp_path / "set" / "annotations"
    document = json.loads((annotations / "panoptic_val2017.json").read_text())
    things = [{"id": c["id"], "name": c["name"]} for c in document["categories"] if c["isthing"]]
    path = annotations / "image_info_test-dev2017.json"
    path.write_text(json.dumps({"images": document["images"], "categories": things}))
    split = SplitConfig(images=("val2017",), annotations=(f"annotations/{path.name}",))
    report = check_data(dataclasses.replace(config, val=split), sample=2)
    assert report.errors == ()
    assert ("no-annotations", path.name, None) in named(report)
    assert report.stats.splits["val"].images == 50


@pytest.mark.parametrize("name", ["coco_panoptic", "coco"])
def test_images_whose_masks_cannot_be_drawn_are_left_out_of_the_picture(
    real_set: RealSet, tmp_path: Path, name: str
) -> None:
    config = copied(real_set(name, "coco_panoptic"), tmp_path / "set")
    annotations = tmp_path / "set" / "annotations"
    if name == "coco_panoptic":
        for path in sorted((annotations / "panoptic_train2017").iterdir())[1:]:
            path.unlink()
    else:
        path = annotations / "instances_train2017.json"
        document = json.loads(path.read_text())
        for image in document["images"][1:]:
            del image["height"]
        path.write_text(json.dumps(document))
    report = check_data(config, picture=True)
    assert report.picture is not None


def test_figures_count_objects_and_suggest_kernels(
    coco_folder: Callable[..., DataConfig],
) -> None:
    def crowd(document: dict[str, Any], root: Path) -> None:
        first = document["annotations"][0]
        for number in range(60):
            x, y = 6 * (number % 10), 6 * (number // 10)
            box = [[x, y, x + 5, y, x + 5, y + 5, x, y + 5]]
            document["annotations"].append({**first, "id": 500 + number, "segmentation": box})
        document["annotations"].append({**first, "id": 900, "iscrowd": 1})
        document["annotations"][1]["category_id"] = 3

    stats = check_data(coco_folder(crowd), num_kernels=50).stats
    train = stats.splits["train"]
    assert train.instances_per_image == {1: 2, 61: 1}
    assert (train.objects, train.crowds, train.crowd_share) == (63, 1, 1 / 64)
    assert train.classes == {"cat": 1, "dog": 62}
    assert (train.images_over_kernels, stats.suggested_kernels) == (1, 64)


def test_a_sample_is_repeated_by_its_seed_and_drawn_as_a_picture(real_set: RealSet) -> None:
    config = real_set("coco", "coco_mini")
    done: list[tuple[int, int]] = []
    report = check_data(
        config, sample=5, seed=3, picture=True, progress=lambda *now: done.append(now)
    )
    assert done == [(count, 10) for count in range(1, 11)]
    again = check_data(config, sample=5, seed=3, picture=True)
    assert report.picture is not None
    assert report.picture == again.picture
    assert report.picture.startswith(b"\x89PNG")


@pytest.mark.parametrize("task", ["instance", "panoptic", "semantic"])
def test_pictures_of_panoptic_sets_follow_the_task(real_set: RealSet, task: Any) -> None:
    config = real_set("coco_panoptic", "coco_panoptic")
    report = check_data(config, task=task, sample=2, picture=True)
    assert report.picture is not None
    assert (report.stats.suggested_kernels is None) == (task == "semantic")


def test_a_task_that_the_format_cannot_serve_is_refused(
    coco_folder: Callable[..., DataConfig],
) -> None:
    with pytest.raises(ConfigError, match="panoptic"):
        check_data(coco_folder(), task="panoptic")


def test_shapes_have_nothing_to_check() -> None:
    report = check_data(DataConfig(format="shapes"))
    assert (report.errors, report.warnings, report.stats.splits) == ((), (), {})


@pytest.mark.parametrize("task", ["instance", "panoptic", "semantic"])
def test_other_formats_are_checked_through_their_loader(tmp_path: Path, task: Any) -> None:
    rng = np.random.default_rng(0)
    ids = np.full((40, 64), 7, dtype=np.uint16)
    ids[5:15, 5:20], ids[5:15, 30:40], ids[20:30, 5:20] = 26000, 26001, 26  # two cars, a crowd
    for split, names in (("train", "abc"), ("val", "d")):
        for kind in ("leftImg8bit", "gtFine"):
            (tmp_path / kind / split / "ulm").mkdir(parents=True)
        for name in names:
            photograph = tmp_path / "leftImg8bit" / split / "ulm" / f"{name}_leftImg8bit.png"
            pixels = rng.integers(0, 255, (40, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(photograph)
            stem = tmp_path / "gtFine" / split / "ulm" / f"{name}_gtFine"
            Image.fromarray(ids).save(f"{stem}_instanceIds.png")
            labels = np.where(ids >= 1000, ids // 1000, ids).astype(np.uint8)
            Image.fromarray(labels).save(f"{stem}_labelIds.png")
    splits = {
        split: SplitConfig(images=(f"leftImg8bit/{split}",), annotations=(f"gtFine/{split}",))
        for split in ("train", "val")
    }
    config = DataConfig(format="cityscapes", root=str(tmp_path), **splits)
    sound = check_data(config, task=task, picture=True)
    assert (sound.errors, sound.warnings) == ((), ())
    assert sound.picture is not None
    assert sound.stats.splits["train"].most_instances == (0 if task == "semantic" else 2)
    photographs = tmp_path / "leftImg8bit"
    cut(photographs / "train" / "ulm" / "a_leftImg8bit.png")
    shutil.copyfile(
        photographs / "train" / "ulm" / "b_leftImg8bit.png",
        photographs / "val" / "ulm" / "d_leftImg8bit.png",
    )
    found = check_data(config, task=task).errors
    assert [finding.code for finding in found] == ["refused-by-loader", "leaked-image"]
    assert found[0].file.endswith("a_leftImg8bit.png")
    (photographs / "train" / "ulm" / "c_leftImg8bit.png").unlink()
    (tmp_path / "gtFine" / "val" / "ulm" / "d_gtFine_labelIds.png").unlink()
    (tmp_path / "gtFine" / "val" / "ulm" / "d_gtFine_instanceIds.png").unlink()
    assert "refused-by-loader" in {f.code for f in check_data(config, task=task).errors}


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([0, 1, 48, 2**31, 10**30, "../x", "\0", "\ud800"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    value=VALUES,
    part=st.sampled_from(["images", "annotations", "categories"]),
    key=st.sampled_from(["id", "image_id", "file_name", "height", "segmentation", "area", None]),
)
def test_wrong_values_of_every_kind_become_findings(
    tmp_path: Path, value: Any, part: str, key: str | None
) -> None:
    """And what the loaders refuse has a code of its own."""
    Image.new("RGB", (64, 48)).save(tmp_path / "0.png")
    document: dict[str, Any] = {
        "images": [{"id": 1, "file_name": "0.png", "height": 48, "width": 64}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 7, "segmentation": [[8, 8, 40, 8, 40, 30]]}
        ],
        "categories": [{"id": 7, "name": "dog"}],
    }
    if key is None:
        document[part] = value
    else:
        document[part][0][key] = value
    (tmp_path / "set.json").write_text(json.dumps(document))
    split = SplitConfig(images=(".",), annotations=("set.json",))
    report = check_data(DataConfig(root=str(tmp_path), train=split, val=split))
    json.dumps(report.as_json()).encode()
    "".join(finding.file + finding.message for finding in report.errors).encode()
    unnamed = [f.message for f in report.errors if f.code == "refused-by-loader"]
    assert all("none of its" in message for message in unnamed)  # no image left to learn from


def test_processes_that_look_at_images_load_no_torch() -> None:
    script = "import sys, knet_core.data.check_masks; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_codes_are_errors_or_warnings() -> None:
    assert not CHECK_ERRORS.keys() & CHECK_WARNINGS.keys()
    assert all(code == code.lower().replace("_", "-") for code in CHECK_ERRORS | CHECK_WARNINGS)
