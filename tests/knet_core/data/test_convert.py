import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_api

from knet_core.config import DataConfig, SplitConfig
from knet_core.data import build_dataset
from knet_core.data.convert import coco_from_index_masks, coco_from_via, write_coco
from knet_core.errors import DataError

# pycocotools 2.0.11 decodes by a numpy protocol that numpy 2 deprecates; only tests decode by it.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def region(shape: dict[str, Any], **attributes: str) -> dict[str, Any]:
    return {"shape_attributes": shape, "region_attributes": attributes}


POLYGON = {"name": "polygon", "all_points_x": [4, 20, 20, 4], "all_points_y": [2, 2, 10, 10]}


@pytest.fixture
def via(tmp_path: Path) -> Path:
    """Write two images of 40 x 36, and VIA's file with a polygon on the first."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 36)).save(tmp_path / name)
    document = {
        "a.png123": {"filename": "a.png", "size": 123, "regions": {"0": region(POLYGON)}},
        "b.png123": {"filename": "b.png", "size": 123, "regions": []},
    }
    path = tmp_path / "via_region_data.json"
    path.write_text(json.dumps(document))
    return path


def with_region(path: Path, found: Any) -> Path:
    document = json.loads(path.read_text())
    document["a.png123"]["regions"] = [found]
    path.write_text(json.dumps(document))
    return path


def test_polygons_stay_polygons_and_images_without_regions_stay(via: Path) -> None:
    document = coco_from_via(via, name="box")
    assert [image["file_name"] for image in document["images"]] == ["a.png", "b.png"]
    assert document["categories"] == [{"id": 1, "name": "box"}]
    (annotation,) = document["annotations"]
    assert annotation["segmentation"] == [[4.0, 2.0, 20.0, 2.0, 20.0, 10.0, 4.0, 10.0]]
    assert (annotation["area"], annotation["bbox"]) == (16 * 8, [4.0, 2.0, 16.0, 8.0])


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ({"name": "rect", "x": 3, "y": 4, "width": 10, "height": 5}, 50),
        ({"name": "circle", "cx": 20, "cy": 15, "r": 10}, np.pi * 100),
        ({"name": "ellipse", "cx": 20, "cy": 15, "rx": 12, "ry": 6, "theta": 0.5}, np.pi * 72),
    ],
)
def test_other_shapes_become_polygons_of_their_area(
    via: Path, shape: dict[str, Any], area: float
) -> None:
    (annotation,) = coco_from_via(with_region(via, region(shape)))["annotations"]
    assert annotation["area"] == pytest.approx(area, rel=0.03)  # whole pixels


def test_classes_come_from_the_named_attribute(via: Path) -> None:
    document = coco_from_via(with_region(via, region(POLYGON, kind="cat")), class_attribute="kind")
    assert document["categories"] == [{"id": 1, "name": "cat"}]
    with pytest.raises(DataError, match=r"image 'a\.png', region 0: region_attributes hold no"):
        coco_from_via(via, class_attribute="colour")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"name": "point", "cx": 3, "cy": 4}, r"region 0: shape 'point' has no area"),
        ({"name": "polygon", "all_points_x": [1, 2], "all_points_y": [1]}, r"as many x as y"),
        ({"name": "circle", "cx": 3, "cy": 4, "r": -1}, r"expected numbers cx, cy, r"),
        ({"name": ["rect"]}, r"has no area"),
        (7, r"shape None has no area"),
    ],
)
def test_a_region_that_is_no_area_is_one_line(via: Path, shape: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        coco_from_via(with_region(via, region(shape)))
    assert "\n" not in str(caught.value)
    assert "via_region_data.json: image 'a.png'" in str(caught.value)


@pytest.mark.parametrize("name", ["../a.png", "/etc/hostname", "link.png", "absent.png"])
def test_nothing_beside_the_folder_is_read(via: Path, name: str, tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to("/etc/hostname")
    via.write_text(json.dumps({"0": {"filename": name, "regions": {}}}))
    with pytest.raises(DataError, match=r"image .*: no such file in .*, or a link out of it"):
        coco_from_via(via)


def test_every_number_of_a_mask_becomes_one_object(tmp_path: Path) -> None:
    ids = np.zeros((30, 40), dtype=np.uint16)
    ids[2:9, 3:20], ids[15:, 30:], ids[20:22, :5] = 700, 3, 700
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "a.jpg")
    Image.fromarray(ids).save(tmp_path / "masks" / "a.png")
    document = coco_from_index_masks(tmp_path / "images", tmp_path / "masks", name="cell")
    assert document["images"] == [{"id": 1, "file_name": "a.jpg", "height": 30, "width": 40}]
    masks = [mask_api.decode(a["segmentation"]) for a in document["annotations"]]
    assert np.array_equal(masks, [ids == 3, ids == 700])
    assert [a["area"] for a in document["annotations"]] == [(ids == 3).sum(), (ids == 700).sum()]


def test_masks_and_images_belong_together(tmp_path: Path) -> None:
    for folder, name, mode, size in (
        ("images", "a.png", "RGB", (40, 30)),
        ("masks", "a.png", "I;16", (30, 40)),
    ):
        (tmp_path / folder).mkdir()
        Image.new(mode, size).save(tmp_path / folder / name)
    folders = tmp_path / "images", tmp_path / "masks"
    with pytest.raises(DataError, match=r"image a: mask of 30 x 40 pixels, expected .* 40 x 30"):
        coco_from_index_masks(*folders)
    Image.new("RGB", (40, 30)).save(folders[1] / "a.png")
    with pytest.raises(DataError, match=r"a\.png: pixels of mode RGB; expected one whole number"):
        coco_from_index_masks(*folders)
    (folders[1] / "a.png").rename(folders[1] / "b.png")
    with pytest.raises(DataError, match=r"image a: in .*images but not in .*masks") as caught:
        coco_from_index_masks(*folders)
    assert len(str(caught.value).splitlines()) == 2


def test_what_was_converted_loads_as_a_data_set(via: Path, tmp_path: Path) -> None:
    out = tmp_path / "annotations" / "all.json"
    write_coco(coco_from_via(via), out)
    with pytest.raises(DataError, match=r"all\.json: exists already"):
        write_coco({}, out)
    split = SplitConfig(images=(".",), annotations=("annotations/all.json",))
    dataset = build_dataset(DataConfig(root=str(tmp_path), train=split), "train", seed=0)
    assert len(dataset) == 1
    assert [path.name for path in out.parent.iterdir()] == ["all.json"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_real_via_polygons_become_the_known_coco_file(real_data: Path, split: str) -> None:
    folder = real_data / "balloon"
    known = json.loads((folder / "annotations" / f"instances_{split}.json").read_text())
    found = coco_from_via(folder / split / "via_region_data.json")
    assert by_image(found) == by_image(known)


@pytest.mark.parametrize("split", ["train", "val"])
def test_real_index_masks_become_the_known_coco_file(real_data: Path, split: str) -> None:
    folder = real_data / "nuclei"
    known = json.loads((folder / "annotations" / f"instances_{split}.json").read_text())
    found = coco_from_index_masks(folder / "images" / split, folder / "masks" / split)
    assert by_image(found) == by_image(known)
    areas = [sorted(a["area"] for a in document["annotations"]) for document in (found, known)]
    assert areas[0] == areas[1]


def by_image(document: dict[str, Any]) -> dict[str, list[str]]:
    """Return what every image's objects look like, whatever their numbers and order."""
    names = {image["id"]: image["file_name"] for image in document["images"]}
    found: dict[str, list[str]] = {name: [] for name in names.values()}
    for annotation in document["annotations"]:
        found[names[annotation["image_id"]]].append(json.dumps(annotation["segmentation"]))
    return {name: sorted(objects) for name, objects in found.items()}
