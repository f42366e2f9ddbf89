"""Average precision of files: COCO's demonstration, random sets, and bad input."""

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from knet_core.errors import DataError
from knet_core.scoring.instances import score_instances

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100")


def rle(mask: Any) -> dict[str, Any]:
    found = mask_api.encode(np.asfortranarray(mask))
    return {"size": found["size"], "counts": found["counts"].decode()}


def random_set(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Rectangles of all sizes, crowds, images without objects or detections, equal scores."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(20, 140, 2).tolist()
    classes = int(rng.integers(1, 4))

    def rectangle() -> Any:
        mask = np.zeros((height, width), dtype=np.uint8)
        top, left = int(rng.integers(height)), int(rng.integers(width))
        mask[
            top : top + int(rng.integers(1, height)), left : left + int(rng.integers(1, width))
        ] = 1
        return mask

    images, annotations, detections = [], [], []
    for image_id in range(1, int(rng.integers(2, 7))):
        images.append({"id": image_id, "height": height, "width": width})
        masks = [rectangle() for _ in range(rng.integers(0, 5))]
        for mask in masks:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(rng.integers(1, classes + 1)),
                    "iscrowd": int(rng.random() < 0.2),
                    "area": float(mask.sum()),
                    "bbox": mask_api.toBbox(mask_api.encode(np.asfortranarray(mask))).tolist(),
                    "segmentation": rle(mask),
                }
            )
        for _ in range(rng.integers(0, 12) if image_id > 1 else 1):
            mask = masks[rng.integers(len(masks))] if masks and rng.random() < 0.7 else rectangle()
            detections.append(
                {
                    "image_id": image_id,
                    "category_id": int(rng.integers(1, classes + 1)),
                    "score": float(rng.choice([0.2, 0.5, rng.random()])),
                    "segmentation": rle(np.roll(mask, int(rng.integers(-2, 3)), axis=0)),
                }
            )
    categories = [{"id": number, "name": str(number)} for number in range(1, classes + 1)]
    return {"images": images, "annotations": annotations, "categories": categories}, detections


def write(folder: Path, truth: Any, detections: Any) -> tuple[Path, Path]:
    (folder / "gt.json").write_text(json.dumps(truth))
    (folder / "pred.json").write_text(json.dumps(detections))
    return folder / "gt.json", folder / "pred.json"


def by_pycocotools(gt: Path, detections: list[Any], iou_type: str, capsys: Any) -> list[Any]:
    coco = COCO(str(gt))
    evaluation = COCOeval(coco, coco.loadRes(detections), iou_type)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    capsys.readouterr()
    return [value if value >= 0 else None for value in evaluation.stats[:9].tolist()]


@pytest.mark.parametrize("iou_type", ["segm", "bbox"])
@pytest.mark.parametrize("seed", range(12))
def test_scores_equal_pycocotools(tmp_path: Path, capsys: Any, iou_type: Any, seed: int) -> None:
    truth, detections = random_set(seed)
    gt, pred = write(tmp_path, truth, detections)
    expected = by_pycocotools(gt, copy.deepcopy(detections), iou_type, capsys)
    scores = score_instances(gt, pred, iou_type=iou_type)
    assert tuple(scores) == NAMES
    assert list(scores.values()) == pytest.approx(expected, abs=1e-12)


KNOWN = {
    "segm": (0.3195, 0.5623, 0.2989, 0.3874, 0.3102, 0.3269, 0.2682, 0.4154, 0.4168),
    "bbox": (0.5046, 0.6970, 0.5730),
}


@pytest.mark.parametrize("iou_type", KNOWN)
def test_cocos_demonstration_scores_as_published(real_data: Path, iou_type: Any) -> None:
    folder = real_data / "evaluators" / "cocoapi_val2014_100"
    pred = folder / f"instances_val2014_fake{iou_type}100_results.json"
    scores = score_instances(folder / "instances_val2014_100.json", pred, iou_type=iou_type)
    values = [round(value or 0.0, 4) for value in scores.values()]
    assert tuple(values[: len(KNOWN[iou_type])]) == KNOWN[iou_type]


def test_polygons_and_uncompressed_run_lengths_are_read(tmp_path: Path) -> None:
    square = {"size": [10, 10], "counts": [0, 50, 50]}
    truth = {
        "images": [{"id": 5, "height": 10, "width": 10}],
        "categories": [{"id": 3}],
        "annotations": [
            {"image_id": 5, "category_id": 3, "segmentation": [[0, 0, 5, 0, 5, 10, 0, 10]]}
        ],
    }
    detections = [{"image_id": 5, "category_id": 3, "score": 1, "segmentation": square}]
    scores = score_instances(*write(tmp_path, truth, detections))
    assert scores["AP"] == pytest.approx(1.0)
    assert scores["APl"] is None  # no object is that large


def problems(folder: Path, truth: Any, detections: Any, **options: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        score_instances(*write(folder, truth, detections), **options)
    return str(caught.value).splitlines()


def test_all_problems_of_a_prediction_file_are_named_at_once(tmp_path: Path) -> None:
    truth, detections = random_set(1)
    good = detections[0]
    size = good["segmentation"]["size"]
    bad = [
        {**good, "image_id": 99},
        {**good, "category_id": 99},
        {**good, "score": float("nan")},
        {**good, "segmentation": {"size": [1, 1], "counts": "01"}},
        {**good, "segmentation": {"size": size, "counts": "P" * 40}},
        {**good, "segmentation": {"size": size, "counts": [5]}},
        {**good, "segmentation": {"size": size, "counts": [-1, 2**40]}},
        {**good, "segmentation": [[1e300, 0, 1, 1, 5, 5]]},
        {**good, "segmentation": None},
        "no detection",
    ]
    lines = problems(tmp_path, truth, [good, *bad])
    assert len(lines) == len(bad)
    for number, line in enumerate(lines, start=1):
        assert line.startswith(f"{tmp_path / 'pred.json'}: detection {number} (image ")


def test_duplicate_ids_are_named(tmp_path: Path) -> None:
    truth, detections = random_set(1)
    (line,) = problems(tmp_path, truth, [{**d, "id": 4} for d in detections])
    assert "detection id 4: listed twice" in line
    truth["annotations"].append(truth["annotations"][0])
    truth["images"].append(truth["images"][0])
    truth["categories"].append(truth["categories"][0])
    lines = problems(tmp_path, truth, detections)
    assert [" id 1: listed twice" in line for line in lines] == [True] * 3


def test_boxes_are_checked(tmp_path: Path) -> None:
    truth, detections = random_set(1)
    (line,) = problems(tmp_path, truth, [{**detections[0], "bbox": [1, 2]}], iou_type="bbox")
    assert "bbox [1, 2]; expected x, y, width, height" in line


@pytest.mark.parametrize("content", ["", "[]", "{}", "{", "3", '{"annotations": []}'])
def test_a_prediction_file_without_detections_is_one_line(tmp_path: Path, content: str) -> None:
    gt, pred = write(tmp_path, random_set(1)[0], [])
    pred.write_text(content)
    with pytest.raises(DataError) as caught:
        score_instances(gt, pred)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(str(pred))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)
MASKS = st.fixed_dictionaries(
    {
        "size": st.sampled_from([[4, 5], [5, 4]]) | VALUES,
        "counts": st.text(alphabet=[chr(c) for c in range(48, 112)])
        | st.lists(st.integers(-2, 25) | st.integers())
        | VALUES,
    }
)
POLYGONS = st.lists(st.lists(st.floats(-9, 9) | st.floats() | st.integers(), max_size=10))
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "id": VALUES | st.integers(1, 3),
        "image_id": st.just(1) | VALUES,
        "category_id": st.just(1) | VALUES,
        "height": st.just(4) | VALUES,
        "width": st.just(5) | VALUES,
        "score": st.floats() | VALUES,
        "area": st.floats() | VALUES,
        "iscrowd": VALUES,
        "bbox": st.lists(st.floats(), max_size=5) | VALUES,
        "segmentation": MASKS | POLYGONS | VALUES,
    },
)
TRUTH = {
    "images": [{"id": 1, "height": 4, "width": 5}],
    "categories": [{"id": 1}],
    "annotations": [],
}


@settings(deadline=None)
@given(
    truth=st.just(TRUTH)
    | VALUES
    | st.fixed_dictionaries(
        {
            "images": st.just(TRUTH["images"]) | st.lists(ENTRIES | VALUES, max_size=2),
            "categories": st.just(TRUTH["categories"]) | st.lists(ENTRIES | VALUES, max_size=2),
            "annotations": st.lists(ENTRIES | VALUES, max_size=3),
        }
    ),
    detections=st.lists(ENTRIES, max_size=3) | VALUES,
    iou_type=st.sampled_from(["segm", "bbox"]),
)
def test_a_wrong_json_file_never_ends_in_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, truth: Any, detections: Any, iou_type: Any
) -> None:
    folder = tmp_path_factory.mktemp("files")
    with contextlib.suppress(DataError):
        score_instances(*write(folder, truth, detections), iou_type=iou_type)
