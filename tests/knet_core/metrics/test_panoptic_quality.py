import pickle
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from knet_core.config import DataConfig, ShapesConfig, SplitConfig
from knet_core.data import build_dataset
from knet_core.data.source import PanopticTruth, TrueSegment
from knet_core.metrics.panoptic_quality import PanopticQuality
from knet_core.structures import ImageInfo, PanopticMap, Segment

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Kind:
    isthing: bool


KINDS = [Kind(True), Kind(True), Kind(True), Kind(False), Kind(False)]


def info(image_id: int) -> ImageInfo:
    return ImageInfo(image_id=image_id, file_name="", input_size=(1, 1), original_size=(1, 1))


def found(ids: Ids, labels: dict[int, int]) -> PanopticMap:
    return PanopticMap(
        ids=torch.from_numpy(ids),
        segments=tuple(Segment(id=i, label=label, score=1.0) for i, label in labels.items()),
    )


def truth_of(ids: Ids, labels: dict[int, int], crowd: set[int]) -> PanopticTruth:
    return PanopticTruth(
        ids=ids,
        segments=tuple(
            TrueSegment(id=i, label=label, iscrowd=i in crowd) for i, label in labels.items()
        ),
    )


def by_definition(pairs: list[tuple[PanopticTruth, PanopticMap]]) -> dict[str, float]:
    """Score by loops over pixels and segments, as panopticapi's `pq_compute` does."""
    iou_sum: Counter[int] = Counter()
    hits, false, missed = Counter[int](), Counter[int](), Counter[int]()
    for truth, prediction in pairs:
        predicted = prediction.ids.numpy()
        shared = Counter(zip(truth.ids.ravel().tolist(), predicted.ravel().tolist(), strict=True))
        true_area = Counter(truth.ids.ravel().tolist())
        area = Counter(predicted.ravel().tolist())
        matched_truth, matched = set(), set()
        for one in truth.segments:
            for other in prediction.segments:
                if one.iscrowd or one.label != other.label:
                    continue
                common = shared[one.id, other.id]
                union = area[other.id] + true_area[one.id] - common - shared[0, other.id]
                if common and common / union > 0.5:
                    iou_sum[one.label] += common / union  # type: ignore[assignment]
                    hits[one.label] += 1
                    matched_truth.add(one.id)
                    matched.add(other.id)
        crowds = {s.label: s.id for s in truth.segments if s.iscrowd}
        for one in truth.segments:
            if one.id not in matched_truth and not one.iscrowd:
                missed[one.label] += 1
        for other in prediction.segments:
            if other.id in matched:
                continue
            ignored = shared[0, other.id]
            if other.label in crowds:
                ignored += shared[crowds[other.label], other.id]
            if ignored / area[other.id] <= 0.5:
                false[other.label] += 1
    scores: dict[str, float] = {}
    for suffix, kinds in (("", (True, False)), ("_th", (True,)), ("_st", (False,))):
        rows = []
        for label, kind in enumerate(KINDS):
            total = hits[label] + 0.5 * (false[label] + missed[label])
            if kind.isthing in kinds and total:
                mean = iou_sum[label] / hits[label] if hits[label] else 0.0
                rows.append((iou_sum[label] / total, mean, hits[label] / total))
        if rows:
            for name, value in zip(("PQ", "SQ", "RQ"), np.mean(rows, axis=0), strict=True):
                scores[f"val/{name}{suffix}"] = float(value)
    return scores


def random_pair(rng: np.random.Generator) -> tuple[PanopticTruth, PanopticMap]:
    """Blocks of segments with void and crowds, and a prediction that shifts and relabels them."""
    blocks = rng.integers(0, 7, (4, 5))
    ids = blocks.repeat(8, axis=0).repeat(8, axis=1).astype(np.int32)
    numbers = [int(i) for i in np.unique(ids) if i]
    labels = {i: int(rng.integers(len(KINDS))) for i in numbers}
    crowd = {i for i in numbers if rng.random() < 0.25}
    spread = ids.astype(np.int32) * 70001  # up to the largest id that fits into three bytes
    truth = truth_of(spread, {i * 70001: k for i, k in labels.items()}, {i * 70001 for i in crowd})
    moved = np.roll(ids, int(rng.integers(-3, 4)), axis=1).copy()
    moved[rng.random(moved.shape) < 0.1] = 0
    moved[:, :6] = 9
    guesses = {
        int(i): labels.get(int(i), 0) if rng.random() < 0.8 else int(rng.integers(len(KINDS)))
        for i in np.unique(moved)
        if i
    }
    if rng.random() < 0.4:
        guesses[0] = 0  # the published map's first segment may have the id of void
    return truth, found(moved, guesses)


def scored(pairs: list[tuple[PanopticTruth, PanopticMap]]) -> PanopticQuality:
    metric = PanopticQuality(lambda image: pairs[image][0], KINDS)
    for number, (_, prediction) in enumerate(pairs):
        metric.add(info(number), prediction)
    return metric


def test_scores_equal_the_definition() -> None:
    rng = np.random.default_rng(0)
    pairs = [random_pair(rng) for _ in range(60)]
    for chosen in (pairs, pairs[:1], pairs[7:11]):
        mine, expected = scored(chosen).compute(), by_definition(chosen)
        assert mine == pytest.approx(expected, abs=1e-12)
    assert 0.2 < scored(pairs).compute()["val/PQ"] < 0.8


def test_one_good_match_one_miss_and_one_spurious() -> None:
    ids = np.zeros((1, 40), dtype=np.int32)
    ids[0, :10], ids[0, 10:20] = 1, 2
    predicted = np.zeros((1, 40), dtype=np.int32)
    predicted[0, :8], predicted[0, 15:20] = 5, 6
    truth = truth_of(ids, {1: 0, 2: 3}, set())
    scores = scored([(truth, found(predicted, {5: 0, 6: 1}))]).compute()
    # Class 0 is found with IoU 0.8, class 1 is spurious, class 3 is missed.
    assert scores["val/PQ"] == pytest.approx(0.8 / 3)
    assert scores["val/PQ_th"] == pytest.approx(0.8 / 2)
    assert scores["val/RQ"] == pytest.approx(1 / 3)
    assert scores["val/PQ_st"] == 0.0


def test_void_counts_for_nothing_and_hides_spurious_segments() -> None:
    ids = np.zeros((1, 40), dtype=np.int32)
    ids[0, :10] = 1
    predicted = np.zeros((1, 40), dtype=np.int32)
    predicted[0, :20], predicted[0, 20:] = 5, 6  # half of 5 and all of 6 lie on void
    truth = truth_of(ids, {1: 0}, set())
    scores = scored([(truth, found(predicted, {5: 0, 6: 1}))]).compute()
    assert scores["val/PQ"] == 1.0


def test_a_crowd_hides_segments_of_its_own_class_only() -> None:
    ids = np.ones((1, 40), dtype=np.int32)
    ids[0, 30:] = 2
    predicted = np.full((1, 40), 7, dtype=np.int32)
    predicted[0, :12], predicted[0, 12:24], predicted[0, 24:30] = 4, 5, 6
    truth = truth_of(ids, {1: 0, 2: 3}, {1})
    scores = scored([(truth, found(predicted, {4: 0, 5: 0, 6: 1, 7: 3}))]).compute()
    assert scores["val/PQ"] == pytest.approx(0.5)  # class 3 found, class 1 spurious
    assert scores["val/PQ_st"] == 1.0


def test_the_published_maps_first_segment_owns_void() -> None:
    ids = np.zeros((1, 40), dtype=np.int32)
    ids[0, :10], ids[0, 10:30] = 1, 2
    predicted = np.zeros((1, 40), dtype=np.int32)
    predicted[0, 10:30] = 1003
    truth = truth_of(ids, {1: 0, 2: 3}, set())
    person = scored([(truth, found(predicted, {0: 0, 1003: 3}))]).compute()
    nobody = scored([(truth, found(predicted, {1003: 3}))]).compute()
    assert person["val/PQ"] == 1.0
    assert nobody["val/PQ"] == 0.5


def test_nothing_to_score_gives_no_score() -> None:
    assert scored([]).compute() == {}


def test_workers_merge_to_what_one_finds_and_send_little() -> None:
    rng = np.random.default_rng(1)
    pairs = [random_pair(rng) for _ in range(9)]
    parts = [PanopticQuality(lambda image: pairs[image][0], KINDS) for _ in range(3)]
    for number, (_, prediction) in enumerate(pairs):
        parts[number % 3].add(info(number), prediction)
    states = [pickle.dumps(part.state()) for part in parts]
    assert max(map(len, states)) < 600
    parts[0].merge(pickle.loads(state) for state in states)
    assert parts[0].compute() == scored(pairs).compute()  # to the bit


SIZES: dict[str, Any] = {"short_edge": (64, 64), "long_edge": 128}


@pytest.mark.parametrize("name", ["shapes", "coco_panoptic"])
def test_ground_truth_as_predictions_scores_one(name: str, request: Any) -> None:
    if name == "shapes":
        shapes = ShapesConfig(num_val=6, size=64)
        config = DataConfig(format="shapes", shapes=shapes, **SIZES)
    else:
        root = request.getfixturevalue("real_data") / "coco_panoptic"
        val = SplitConfig(images=("val2017",), annotations=("annotations/panoptic_val2017.json",))
        config = DataConfig(format="coco_panoptic", root=str(root), val=val, **SIZES)
    dataset = build_dataset(config, "val", seed=0, task="panoptic")
    metric = PanopticQuality(dataset.panoptic, dataset.categories)
    for index in range(len(dataset)):
        prediction = dataset.truth(index)
        assert isinstance(prediction, PanopticMap)
        metric.add(info(index), prediction)
    scores = metric.compute()
    assert set(scores) == {f"val/{n}{k}" for n in ("PQ", "SQ", "RQ") for k in ("", "_th", "_st")}
    assert all(value == 1.0 for value in scores.values())


COLOURS = [(0, 0, 0), (0, 0, 255), (255, 0, 0), (0, 255, 0), (255, 0, 255), (0, 255, 255),
           (255, 255, 0)]  # fmt: skip
GREYS = {
    "team": {47: 1, 97: 1, 133: 1, 150: 1, 174: 1, 215: 1, 244: 1, 255: 1, 198: 2, 0: 0},
    "bird": {92: 5, 176: 3, 255: 4, 0: 0},
    "cat": {255: 6, 0: 0},
}


def known_pair(folder: Path, name: str) -> tuple[PanopticTruth, PanopticMap]:
    """Read one of deeplab2's test images; class 0 is ignored on both sides."""
    suffix = "gt_instance" if name == "team" else "gt"
    grey = np.array(Image.open(folder / f"{name}_{suffix}.png").convert("L"), dtype=np.int32)
    classes = GREYS[name]
    assert set(np.unique(grey)) <= set(classes)
    true_ids = np.where(np.isin(grey, [v for v, c in classes.items() if c]), grey, 0)
    labels = {int(v): classes[int(v)] - 1 for v in np.unique(true_ids) if v}
    rgb = np.array(Image.open(folder / f"{name}_pred_class.png").convert("RGB"))
    kind = np.zeros(grey.shape, dtype=np.int32)
    for number, colour in enumerate(COLOURS):
        kind[(rgb == colour).all(-1)] = number
    instance = np.zeros_like(kind)
    path = folder / f"{name}_pred_instance.png"
    if path.exists():
        instance = np.array(Image.open(path).convert("L"), dtype=np.int32)
    ids = np.where(kind > 0, kind * 256 + instance, 0).astype(np.int32)
    guesses = {int(i): int(i) // 256 - 1 for i in np.unique(ids) if i}
    return truth_of(true_ids.astype(np.int32), labels, set()), found(ids, guesses)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("team",), (0.62156284, 0.64664984, 0.9666667)),
        (("team", "bird", "cat"), (0.76855499, 0.7769174, 0.98888892)),
    ],
)
def test_deeplab2s_images_score_as_published(
    real_data: Path, names: tuple[str, ...], expected: tuple[float, float, float]
) -> None:
    folder = real_data / "evaluators" / "deeplab2_pq"
    pairs = [known_pair(folder, name) for name in names]
    metric = PanopticQuality(lambda image: pairs[image][0], [Kind(True)] * 6)
    for number, (_, prediction) in enumerate(pairs):
        metric.add(info(number), prediction)
    scores = metric.compute()
    assert [scores[f"val/{name}"] for name in ("PQ", "SQ", "RQ")] == pytest.approx(
        expected, abs=1e-7
    )
