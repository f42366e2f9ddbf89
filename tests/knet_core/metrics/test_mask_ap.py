import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_api

from knet_core.config import DataConfig, ShapesConfig, SplitConfig
from knet_core.data import build_dataset
from knet_core.data.dataset import SegmentationDataset
from knet_core.metrics.mask_ap import MaskAP
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
