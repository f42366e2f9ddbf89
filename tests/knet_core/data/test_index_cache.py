import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knet_core.config import DataConfig
from knet_core.data import coco_annotations, coco_index, index_cache, panoptic_index
from knet_core.data.coco_index import CocoIndex, read_index
from knet_core.data.panoptic_index import map_folder, read_panoptic_index
from knet_core.data.paths import find_split
from knet_core.errors import DataError

Folder = Callable[..., DataConfig]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the index of files of any size, below the test's own folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index_cache, "_WORTH", 0)
    return tmp_path / "cache"


def edit(document: dict[str, Any], root: Path) -> None:
    crowd = {"size": [48, 64], "counts": [48 * 60, 48 * 4]}
    document["annotations"].append(
        {"id": 9, "image_id": 10, "category_id": 3, "iscrowd": 1, "segmentation": crowd, "area": 4}
    )


def same(one: CocoIndex, two: CocoIndex) -> bool:
    for name in CocoIndex.__dataclass_fields__:
        a, b = getattr(one, name), getattr(two, name)
        if not (
            np.array_equal(a, b, equal_nan=True)
            if isinstance(a, np.ndarray) and name == "areas"
            else np.array_equal(a, b)
            if isinstance(a, np.ndarray)
            else a == b
        ):
            return False
    return True


@pytest.fixture
def refuse_parsing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("parsed again")

    return lambda: monkeypatch.setattr(coco_index, "parse", refuse)


def test_a_second_start_parses_nothing_and_finds_the_same(
    coco_folder: Folder, cache: Path, refuse_parsing: Callable[[], None], tmp_path: Path
) -> None:
    files = find_split(coco_folder(edit), "val")
    first = read_index(files)
    shutil.copytree(cache, tmp_path / "kept")
    shutil.rmtree(cache)
    cache.write_text("in the way")
    parsed = read_index(files)
    cache.unlink()
    (tmp_path / "kept").rename(cache)
    refuse_parsing()
    kept = read_index(files)
    assert same(first, parsed)
    assert same(parsed, kept)
    assert not kept.points.flags.owndata  # mapped, so shared by all processes
    assert kept.rle(3, 48, 64) == parsed.rle(3, 48, 64)


def test_a_changed_file_is_parsed_and_takes_the_place_of_the_old(
    coco_folder: Folder, cache: Path
) -> None:
    files = find_split(coco_folder(edit), "val")
    assert len(read_index(files).order) == 4
    document = json.loads(files.annotations.read_text())
    document["annotations"].pop()
    files.annotations.write_text(json.dumps(document))
    assert len(read_index(files).order) == 3
    assert len(list(cache.glob("knet/annotations/*/*"))) == 1


def test_a_missing_image_is_found_without_parsing(
    coco_folder: Folder, cache: Path, refuse_parsing: Callable[[], None]
) -> None:
    files = find_split(coco_folder(), "val")
    read_index(files)
    refuse_parsing()
    (files.images / "1.jpg").unlink()
    with pytest.raises(DataError, match=r"instances_val\.json: image 11: no image file .*1\.jpg"):
        read_index(files)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def pickled(path: Path) -> None:
    np.save(path, np.array([{}]), allow_pickle=True)


def shortened(path: Path) -> None:
    np.save(path, np.load(path)[:-1])


def text(path: Path) -> None:
    path.write_text("no array")


@pytest.mark.parametrize("spoil", [Path.unlink, cut, pickled, shortened, text])
@pytest.mark.parametrize("name", ["points", "point_kinds", "first", "sizes", "text", "run_first"])
def test_a_damaged_entry_is_parsed_anew(
    coco_folder: Folder, cache: Path, spoil: Callable[[Path], None], name: str
) -> None:
    files = find_split(coco_folder(edit), "val")
    parsed = read_index(files)
    shown = [parsed.rle(annotation, 48, 64) for annotation in range(4)]
    spoil(next(cache.glob(f"knet/annotations/*/*/{name}.npy")))
    again = read_index(files)
    assert [again.rle(annotation, 48, 64) for annotation in range(4)] == shown


def test_a_faulty_file_is_never_kept(coco_folder: Folder, cache: Path) -> None:
    def spoil(document: dict[str, Any], root: Path) -> None:
        document["annotations"][0]["image_id"] = 99

    with pytest.raises(DataError):
        read_index(find_split(coco_folder(spoil), "val"))
    assert not cache.exists()


def test_small_files_are_not_kept(
    coco_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    read_index(find_split(coco_folder(), "val"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("numbers", "width"),
    [((12.34, 0), 2), ((48.5, -0.25), 4), ((700, 0), 4), ((12.345, 0), 8), ((12.34, 5e-324), 8)],
)
def test_coordinates_are_those_of_the_file_to_the_last_bit(
    coco_folder: Folder, monkeypatch: pytest.MonkeyPatch, numbers: tuple[float, float], width: int
) -> None:
    monkeypatch.setattr(coco_annotations, "_BLOCK", 8)
    rng = np.random.default_rng(0)
    polygons = rng.uniform(0, 48, (5, 10)).round(2)
    polygons[3, 2:4] = numbers

    def edit(document: dict[str, Any], root: Path) -> None:
        document["images"][1] |= {"height": 480, "width": 800}
        document["annotations"][1]["segmentation"] = polygons.tolist()

    index = read_index(find_split(coco_folder(edit), "val"))
    assert index.polygons(1) == polygons.tolist()
    widths = np.diff(index.point_first[index.polygon_first[1] : index.polygon_first[2] + 1]) / 10
    assert widths.tolist() == [2, 2, 2, width, 2]  # bytes a number


def test_a_panoptic_file_is_kept_too_and_its_images_are_looked_up_again(
    panoptic_folder: Folder, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = find_split(panoptic_folder(), "val")
    parsed = read_panoptic_index(files)
    monkeypatch.setattr(panoptic_index, "parse", None)
    kept = read_panoptic_index(files)
    assert (kept.categories, kept.map_names) == (parsed.categories, parsed.map_names)
    for name in ("image_ids", "sizes", "first", "ids", "labels", "crowd"):
        assert np.array_equal(getattr(kept, name), getattr(parsed, name)), name
    assert not kept.ids.flags.owndata  # mapped, so shared by all processes
    (map_folder(files) / kept.map_names[0]).unlink()
    with pytest.raises(DataError, match="no segments"):
        read_panoptic_index(files)
