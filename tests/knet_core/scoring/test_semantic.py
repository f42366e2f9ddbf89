"""Mean IoU of label PNGs: mmsegmentation's rules by sets of pixels, and bad input."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from knet_core.errors import ConfigError, DataError
from knet_core.scoring.semantic import score_semantic

CLASSES = 6


def save(folder: Path, name: str, labels: Any) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels).save(folder / name)


def by_definition(pairs: list[Any], ignore: int, *, reduce: bool) -> dict[str, Any]:
    """Score by sets of pixels as `intersect_and_union` of mmsegmentation counts them."""
    true: list[set[Any]] = [set() for _ in range(CLASSES)]
    found: list[set[Any]] = [set() for _ in range(CLASSES)]
    labelled = right = 0
    for image, (truth, labels) in enumerate(pairs):
        for pixel, (one, other) in enumerate(zip(truth.flat, labels.flat, strict=True)):
            label = int(one)
            if reduce:
                label = 255 if label in (0, 255) else label - 1
            if label == ignore:
                continue
            labelled += 1
            right += label == other
            true[label].add((image, pixel))
            if other < CLASSES:
                found[other].add((image, pixel))
    sets = list(zip(true, found, strict=True))
    each = [len(a & b) / len(a | b) if a | b else None for a, b in sets]
    return {
        "mIoU": float(np.mean([value for value in each if value is not None])),
        "aAcc": right / labelled,
        "mAcc": float(np.mean([len(a & b) / len(a) for a, b in sets if a])),
        "per_class": each,
    }


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("gt", "pred"):
        (tmp_path / name).mkdir()
    return tmp_path / "gt", tmp_path / "pred"


def random_pairs(
    folders: tuple[Path, Path], values: list[int], count: int = 4, nothing: int = 255
) -> list[Any]:
    rng = np.random.default_rng(0)
    pairs = []
    for number in range(count):
        truth = rng.choice(np.array(values, dtype=np.uint8), (7, 9))
        # Class 4 is never predicted; 255 is no class, and 5 is one.
        labels = rng.choice(np.array([0, 1, 2, 3, nothing], dtype=np.uint8), (7, 9))
        pairs.append((truth, np.where(rng.random((7, 9)) < 0.5, truth % 4, labels)))
        for folder, pixels in zip(folders, pairs[-1], strict=True):
            save(folder, f"town/{number}.png", pixels)
    return pairs


@pytest.mark.parametrize(
    ("values", "ignore", "reduce"),
    [([0, 1, 2, 255], 255, False), ([0, 1, 3, 4], 0, False), ([0, 1, 4, 5, 255], 255, True)],
)
def test_scores_equal_the_definition(
    folders: tuple[Path, Path], values: list[int], ignore: int, reduce: bool
) -> None:
    pairs = random_pairs(folders, values, nothing=5 if ignore == 0 else 255)
    scores = score_semantic(
        *folders, num_classes=CLASSES, ignore_index=ignore, reduce_zero_label=reduce, workers=1
    )
    expected = by_definition(pairs, ignore, reduce=reduce)
    assert scores["per_class"] == pytest.approx(expected.pop("per_class"))
    assert {k: scores[k] for k in expected} == pytest.approx(expected)


def test_processes_share_the_images_and_change_no_bit(folders: tuple[Path, Path]) -> None:
    random_pairs(folders, [0, 1, 2, 255], count=20)
    alone, shared = (
        score_semantic(*folders, num_classes=CLASSES, workers=workers) for workers in (1, 2)
    )
    assert alone == shared


def test_predictions_may_hold_label_plus_one(folders: tuple[Path, Path]) -> None:
    truth = np.array([[0, 1, 2, 6, 255]], dtype=np.uint8)
    save(folders[0], "a.png", truth)
    save(folders[1], "a.png", np.array([[3, 1, 2, 5, 1]], dtype=np.uint8))
    options = {"num_classes": CLASSES, "reduce_zero_label": True, "workers": 1}
    scores = score_semantic(*folders, pred_from_one=True, **options)
    assert scores["aAcc"] == pytest.approx(2 / 3)
    assert scores["per_class"] == [1.0, 1.0, None, None, 0.0, 0.0]


def test_sixteen_bit_maps_and_many_classes_are_read(folders: tuple[Path, Path]) -> None:
    save(folders[0], "a.png", np.array([[0, 300, 499, 65535]], dtype=np.uint16))
    save(folders[1], "a.png", np.array([[0, 300, 300, 3]], dtype=np.uint16))
    scores = score_semantic(*folders, num_classes=500, ignore_index=65535, workers=1)
    assert (scores["per_class"][300], scores["per_class"][499]) == (0.5, 0.0)
    assert scores["aAcc"] == pytest.approx(2 / 3)


def test_real_label_maps_score_one_against_themselves(real_data: Path) -> None:
    folder = real_data / "ade20k" / "annotations" / "validation"
    options = {"num_classes": 150, "reduce_zero_label": True, "pred_from_one": True}
    scores = score_semantic(folder, folder, **options)
    assert scores["mIoU"] == scores["aAcc"] == scores["mAcc"] == 1.0
    assert len(scores["per_class"]) == 150


def problems(folders: tuple[Path, Path], **options: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        score_semantic(*folders, **{"num_classes": CLASSES, "workers": 1, **options})
    return str(caught.value).splitlines()


def test_names_must_be_the_same_on_both_sides(folders: tuple[Path, Path]) -> None:
    random_pairs(folders, [0, 1])
    (folders[1] / "town" / "3.png").rename(folders[1] / "other.png")
    other, missing = problems(folders)
    assert "image other: other.png is not in" in other
    assert "image town/3: no prediction town/3.png" in missing


def test_values_and_sizes_are_checked_image_by_image(folders: tuple[Path, Path]) -> None:
    random_pairs(folders, [0, 1])
    save(folders[0], "town/0.png", np.full((7, 9), 77, dtype=np.uint8))
    save(folders[1], "town/1.png", np.full((7, 9), 6, dtype=np.uint8))
    save(folders[1], "town/2.png", np.zeros((2, 2), dtype=np.uint8))
    save(folders[1], "town/3.png", np.zeros((7, 9, 3), dtype=np.uint8))
    lines = problems(folders)
    assert "gt/town/0.png: holds value 77; expected 0 to 5" in lines[0]
    assert "pred/town/1.png: holds value 6; expected 0 to 5" in lines[1]
    assert "pred/town/2.png: 2 x 2 pixels, expected 9 x 7" in lines[2]
    assert "pred/town/3.png: pixels of mode RGB" in lines[3]


def test_links_that_lead_out_are_not_followed(folders: tuple[Path, Path]) -> None:
    random_pairs(folders, [0, 1])
    secret = folders[0].parent / "secret.png"
    (folders[1] / "town" / "0.png").rename(secret)
    (folders[1] / "town" / "0.png").symlink_to(secret)
    (line,) = problems(folders)
    assert "image town/0: file_name 'town/0.png' is a link that leads out" in line


def test_nothing_to_score_is_said(folders: tuple[Path, Path]) -> None:
    assert "no PNG" in problems(folders)[0]
    save(folders[0], "a.png", np.full((2, 2), 255, dtype=np.uint8))
    save(folders[1], "a.png", np.zeros((2, 2), dtype=np.uint8))
    assert "no labelled pixel" in problems(folders)[0]
    with pytest.raises(ConfigError, match="num_classes: 0"):
        score_semantic(*folders, num_classes=0)
