import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as mask_api

from knet_core.config import DataConfig, ShapesConfig, SplitConfig
from knet_core.data import build_dataset
from knet_core.data.dataset import SegmentationDataset
from knet_core.metrics import mask_ap
from knet_core.metrics.mask_ap import MaskAP, average_precision
from knet_core.structures import ImageInfo, Instances

# pycocotools 2.0.11 decodes by a numpy protocol that numpy 2 deprecates; only tests decode by it.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPES = DataConfig(
    format="shapes",
    shapes=ShapesConfig(num_train=1, num_val=12, size=64),
    short_edge=(64, 64),
    long_edge=64,
)


@dataclass(frozen=True)
class Named:
    id: int


@pytest.fixture(scope="module")
def dataset() -> SegmentationDataset:
    return build_dataset(SHAPES, "val", seed=0)


def fill(metric: MaskAP, dataset: SegmentationDataset, rank: int = 0, world: int = 1) -> MaskAP:
    for index in range(rank, len(dataset), world):
        metric.add(dataset.load(index, epoch=0).info, dataset.truth(index))
    return metric


def new(dataset: SegmentationDataset) -> MaskAP:
    return MaskAP(dataset.ground_truth(), dataset.categories)


def test_ground_truth_as_predictions_scores_one(dataset: SegmentationDataset) -> None:
    scores = fill(new(dataset), dataset).compute()
    assert scores["val/AP"] == scores["val/AP50"] == scores["val/AP75"] == pytest.approx(1.0)
    assert scores["val/APs"] == pytest.approx(1.0)
    assert "val/APl" not in scores  # no object is that large


def test_ground_truth_of_real_photographs_scores_one(real_data: Path) -> None:
    config = DataConfig(root=str(real_data / "coco_mini"), short_edge=(64, 64), long_edge=128)
    dataset = build_dataset(config, "val", seed=0)
    # Masks that are empty at the stored size cannot be found; COCO has none here.
    assert fill(new(dataset), dataset).compute()["val/AP"] == pytest.approx(1.0)


def test_things_of_panoptic_files_are_the_instances_made_of_them(real_data: Path) -> None:
    root = str(real_data / "coco_panoptic")
    names = {
        "coco": "annotations/instances_val2017_from_panoptic.json",
        "coco_panoptic": "annotations/panoptic_val2017.json",
    }
    instances, panoptic = (
        build_dataset(
            DataConfig(
                format=kind,
                root=root,
                val=SplitConfig(images=("val2017",), annotations=(names[kind],)),
                short_edge=(64, 64),
                long_edge=128,
            ),
            "val",
            seed=0,
        )
        for kind in ("coco", "coco_panoptic")
    )
    assert [c.name for c in instances.categories] == [c.name for c in panoptic.categories]
    for truth, found in ((instances, panoptic), (panoptic, instances)):
        assert fill(new(truth), found).compute()["val/AP"] == pytest.approx(1.0)


def test_nothing_found_scores_zero(dataset: SegmentationDataset) -> None:
    assert new(dataset).compute()["val/AP"] == 0.0


def test_an_image_without_detections_counts(dataset: SegmentationDataset) -> None:
    metric = new(dataset)
    empty = Instances(
        scores=torch.zeros(0),
        labels=torch.zeros(0, dtype=torch.int64),
        masks=torch.zeros(0, 64, 64, dtype=torch.bool),
    )
    for index in range(len(dataset)):
        found = dataset.truth(index) if index else empty
        metric.add(dataset.load(index, epoch=0).info, found)
    assert 0 < metric.compute()["val/AP"] < 1


def test_workers_merge_to_what_one_finds(dataset: SegmentationDataset) -> None:
    rng = torch.Generator().manual_seed(0)

    def noisy(metric: MaskAP, indices: range) -> MaskAP:
        for index in indices:
            truth = dataset.truth(index)
            rng.manual_seed(index)
            scores = torch.rand(len(truth.labels), generator=rng)
            masks = truth.masks & (torch.rand(truth.masks.shape, generator=rng) > 0.3)
            found = Instances(scores=scores, labels=truth.labels, masks=masks)
            metric.add(dataset.load(index, epoch=0).info, found)
        return metric

    alone = noisy(new(dataset), range(12))
    parts = [noisy(new(dataset), range(rank, 12, 3)) for rank in range(3)]
    states = [pickle.loads(pickle.dumps(part.state())) for part in parts]
    parts[0].merge(states)
    assert parts[0].compute() == alone.compute()
    assert 0 < alone.compute()["val/AP"] < 1


def test_computing_twice_gives_the_same_and_prints_nothing(
    dataset: SegmentationDataset, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = dataset.ground_truth()
    before = json.dumps(truth)
    metric = fill(MaskAP(truth, dataset.categories), dataset)
    assert metric.compute() == metric.compute()
    assert json.dumps(truth) == before
    assert capsys.readouterr().out == ""


def test_cocos_demonstration_scores_as_published(real_data: Path) -> None:
    folder = real_data / "evaluators" / "cocoapi_val2014_100"
    truth: dict[str, Any] = json.loads((folder / "instances_val2014_100.json").read_text())
    name = "instances_val2014_fakesegm100_results.json"
    detections = json.loads((folder / name).read_text())
    ids = sorted(category["id"] for category in truth["categories"])
    metric = MaskAP(truth, [Named(number) for number in ids])
    for image in truth["images"]:
        found = [d for d in detections if d["image_id"] == image["id"]]
        size = (image["height"], image["width"])
        masks = [mask_api.decode(d["segmentation"]) for d in found]
        stacked = np.array(masks, dtype=np.bool_).reshape(-1, *size)
        metric.add(
            ImageInfo(image_id=image["id"], file_name="", input_size=size, original_size=size),
            Instances(
                scores=torch.tensor([d["score"] for d in found], dtype=torch.float64),
                labels=torch.tensor([ids.index(d["category_id"]) for d in found]).long(),
                masks=torch.from_numpy(stacked),
            ),
        )
    scores = {key: round(value, 4) for key, value in metric.compute().items()}
    assert scores == {
        "val/AP": 0.3195,
        "val/AP50": 0.5623,
        "val/AP75": 0.2989,
        "val/APs": 0.3874,
        "val/APm": 0.3102,
        "val/APl": 0.3269,
    }


def random_objects(seed: int, count: int) -> tuple[dict[str, Any], dict[int, list[Any]]]:
    """Masks of all sizes in images of one size, and detections near them by category."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(4, 150, 2).tolist()
    num_categories = int(rng.integers(1, 5))
    truth: dict[str, Any] = {
        "images": [{"id": n, "height": height, "width": width} for n in range(1, count + 1)],
        "categories": [{"id": 3 * n, "name": str(n)} for n in range(1, num_categories + 1)],
        "annotations": [],
    }
    found: dict[int, list[Any]] = {category["id"]: [] for category in truth["categories"]}

    def entry(image: int, mask: Any) -> dict[str, Any]:
        rle = mask_api.encode(np.asfortranarray(mask))
        return {
            "image_id": image,
            "category_id": 3 * int(rng.integers(1, num_categories + 1)),
            "area": float(mask.sum()),
            "bbox": mask_api.toBbox(rle).tolist(),
            "segmentation": rle,
        }

    def blob() -> Any:
        mask = np.zeros((height, width), dtype=np.uint8)
        top, left = int(rng.integers(height)), int(rng.integers(width))
        mask[top : top + int(rng.integers(height)), left : left + int(rng.integers(width))] = 1
        return mask  # maybe empty

    for image in range(1, count + 1):
        masks = [blob() for _ in range(rng.integers(0, 6))]
        for mask in masks:
            number, crowd = len(truth["annotations"]) + 1, int(rng.random() < 0.2)
            truth["annotations"].append({**entry(image, mask), "id": number, "iscrowd": crowd})
        for _ in range(rng.integers(0, 130 if rng.random() < 0.1 else 12)):
            near = masks[rng.integers(len(masks))] if masks and rng.random() < 0.7 else blob()
            moved = entry(image, np.roll(near, int(rng.integers(-2, 3)), axis=0))
            score = float(rng.choice([0.1, 0.5, rng.random()]))  # ties
            found[moved["category_id"]].append({**moved, "iscrowd": 0, "score": score})
    return truth, found


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 6),
    iou_type=st.sampled_from(["segm", "bbox"]),
)
def test_faster_coco_eval_gives_the_numbers_of_pycocotools(
    seed: int, count: int, iou_type: Literal["segm", "bbox"]
) -> None:
    truth, found = random_objects(seed, count)
    one, other = (
        average_precision(truth, lambda key: found[key], iou_type=iou_type, engine=engine)
        for engine in ("faster-coco-eval", "pycocotools")
    )
    assert one == pytest.approx(other, abs=1e-12)


def test_categories_in_portions_and_processes_change_no_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sets = (random_objects(seed, 30) for seed in range(99))
    truth, found = next(one for one in sets if len(one[0]["categories"]) > 2)
    whole = average_precision(truth, lambda key: found[key])
    monkeypatch.setattr(mask_ap, "MOST_AT_ONCE", 2)
    assert average_precision(truth, lambda key: found[key]) == whole
    assert average_precision(truth, lambda key: found[key], workers=2) == whole
    assert 0 < (whole["AP"] or 0) < 1


def test_a_worker_sends_run_lengths_and_no_masks(dataset: SegmentationDataset) -> None:
    metric = fill(new(dataset), dataset)
    state = metric.state()
    assert len(state.images) == len(state.ends) > 12
    assert len(pickle.dumps(state)) < 100 * len(state.images) + 1000 + len(state.runs)
