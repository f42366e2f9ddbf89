import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from knet_core.config import DataConfig, SplitConfig
from knet_core.data import build_dataset
from knet_core.metrics.mean_iou import MeanIoU
from knet_core.structures import ImageInfo, SemanticMap

Maps = list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]


def info(image_id: int) -> ImageInfo:
    return ImageInfo(image_id=image_id, file_name="", input_size=(1, 1), original_size=(1, 1))


def scored(pairs: Maps, num_classes: int) -> MeanIoU:
    metric = MeanIoU(lambda image: pairs[image][0], num_classes)
    for number, (_, labels) in enumerate(pairs):
        metric.add(info(number), SemanticMap(labels=torch.from_numpy(labels)))
    return metric


def by_definition(pairs: Maps, num_classes: int) -> dict[str, float]:
    """Score by sets of pixels, class by class."""
    true: list[set[tuple[int, int]]] = [set() for _ in range(num_classes)]
    predicted: list[set[tuple[int, int]]] = [set() for _ in range(num_classes)]
    for image, (truth, labels) in enumerate(pairs):
        pixels = zip(truth.ravel().tolist(), labels.ravel().tolist(), strict=True)
        for pixel, (one, other) in enumerate(pixels):
            if one < num_classes:
                true[one].add((image, pixel))
                predicted[other].add((image, pixel))
    sets = list(zip(true, predicted, strict=True))
    ious = [len(a & b) / len(a | b) for a, b in sets if a | b]
    accuracies = [len(a & b) / len(a) for a, b in sets if a]
    right, every = sum(len(a & b) for a, b in sets), sum(map(len, true))
    return {
        "val/mIoU": float(np.mean(ious)),
        "val/mAcc": float(np.mean(accuracies)),
        "val/aAcc": right / every,
    }


def random_maps(rng: np.random.Generator, count: int) -> Maps:
    pairs: Maps = []
    for _ in range(count):
        truth = rng.choice(np.array([0, 1, 2, 3, 7, 255], dtype=np.uint8), (6, 9))
        labels = rng.integers(0, 6, (6, 9), dtype=np.uint8)
        pairs.append((truth, np.where(rng.random((6, 9)) < 0.5, np.minimum(truth, 6), labels)))
    return pairs


def test_scores_equal_the_definition() -> None:
    pairs = random_maps(np.random.default_rng(0), 5)
    # Of 7 classes, 4 and 5 occur in predictions only, 6 in pixels that do not count only.
    assert scored(pairs, 7).compute() == pytest.approx(by_definition(pairs, 7), abs=1e-12)


def test_every_number_of_classes_that_a_byte_holds() -> None:
    rng = np.random.default_rng(0)
    maps = rng.integers(0, 254, (2, 40, 40), dtype=np.uint8)
    pairs: Maps = [(maps[0], np.where(rng.random((40, 40)) < 0.5, maps[0], maps[1]))]
    assert scored(pairs, 254).compute() == pytest.approx(by_definition(pairs, 254), abs=1e-12)


def test_without_a_labelled_pixel_there_is_no_score() -> None:
    nothing = np.full((3, 3), 255, dtype=np.uint8)
    assert scored([(nothing, np.zeros((3, 3), dtype=np.uint8))], 4).compute() == {}
    assert scored([], 4).compute() == {}


def test_workers_merge_to_what_one_finds() -> None:
    pairs = random_maps(np.random.default_rng(1), 7)
    parts = [scored(pairs[:0], 7) for _ in range(3)]
    for number, (truth, labels) in enumerate(pairs):
        part = scored([(truth, labels)], 7)
        parts[number % 3].merge([parts[number % 3].state(), part.state()])
    states = [pickle.loads(pickle.dumps(part.state())) for part in parts]
    parts[0].merge(states)
    assert parts[0].compute() == scored(pairs, 7).compute()


@pytest.mark.parametrize(("name", "classes"), [("ade20k", 150), ("camvid", 11)])
def test_real_label_maps(real_data: Path, name: str, classes: int) -> None:
    config = DataConfig(
        format="ade20k",
        root=str(real_data / name),
        val=SplitConfig(images=("images/validation",), annotations=("annotations/validation",)),
        classes=tuple(map(str, range(classes))),
    )
    dataset = build_dataset(config, "val", seed=0, task="semantic")
    whole = MeanIoU(dataset.semantic, classes)
    for index in range(len(dataset)):
        truth = dataset.truth(index)
        assert isinstance(truth, SemanticMap)
        whole.add(info(index), truth)
    assert whole.compute() == {"val/mIoU": 1.0, "val/mAcc": 1.0, "val/aAcc": 1.0}
    small = [dataset.semantic(index)[::8, ::8] for index in range(4)]
    pairs: Maps = [(m, np.where(m < classes, np.roll(m, 2, axis=1), 0) % classes) for m in small]
    assert scored(pairs, classes).compute() == pytest.approx(
        by_definition(pairs, classes), abs=1e-12
    )
