import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from knet_core import (
    ConfigError,
    DataError,
    EvalConfig,
    Instances,
    build_dataset,
    build_model,
)
from knet_core.evaluation import evaluate, measure_fps, stage_picture
from knet_core.structures import PanopticMap, SemanticMap

CPU = torch.device("cpu")


class Oracle(torch.nn.Module):
    """Knows the ground truth of a data set by image id; its static stage finds nothing."""

    def __init__(self, dataset):
        super().__init__()
        self.num_classes = dataset.num_classes
        self.updates = [None, None]
        self.was_training = []
        self.truth = {
            dataset.load(i, epoch=0).info.image_id: dataset.truth(i) for i in range(len(dataset))
        }

    def forward(self, images):
        self.was_training.append(self.training)
        return SimpleNamespace(stages=[None] * 3)

    def postprocess(self, output, infos, *, stage=-1):
        found = [self.truth[info.image_id] for info in infos]
        return [nothing_like(truth) for truth in found] if stage == 0 else found


def nothing_like(truth):
    if isinstance(truth, Instances):
        return Instances(scores=truth.scores[:0], labels=truth.labels[:0], masks=truth.masks[:0])
    if isinstance(truth, PanopticMap):
        return PanopticMap(ids=torch.zeros_like(truth.ids), segments=())
    return SemanticMap(labels=torch.zeros_like(truth.labels))


@pytest.fixture
def dataset(tiny_recipe):
    return build_dataset(tiny_recipe().data, "val", seed=0)


TASKS = {
    "instance": ("val/AP", {"val/AP50", "val/AP75", "val/APs"}),
    "panoptic": ("val/PQ", {"val/PQ_th", "val/PQ_st", "val/SQ", "val/RQ"}),
    "semantic": ("val/mIoU", {"val/mAcc", "val/aAcc"}),
}


@pytest.mark.parametrize("task", TASKS)
def test_each_task_has_its_metric_and_the_truth_scores_one(tiny_recipe, task):
    dataset = build_dataset(tiny_recipe().data, "val", seed=0, task=task)
    metrics, picture = evaluate(Oracle(dataset), dataset, EvalConfig(probe_images=1), device=CPU)
    name, others = TASKS[task]
    assert metrics[name] == pytest.approx(1.0)
    assert others < set(metrics)
    assert Image.open(io.BytesIO(picture)).width > 640


@pytest.mark.parametrize("task", TASKS)
def test_every_stage_is_scored_in_one_pass(tiny_recipe, task):
    dataset = build_dataset(tiny_recipe().data, "val", seed=0, task=task)
    oracle, config = Oracle(dataset), EvalConfig(probe_images=0, batch_size=2)
    metrics, _ = evaluate(oracle, dataset, config, device=CPU, per_stage=True)
    name = TASKS[task][0].removeprefix("val/")
    assert metrics[f"val/stage0/{name}"] < 0.3
    assert metrics[f"val/stage1/{name}"] == metrics[f"val/stage2/{name}"] == metrics[f"val/{name}"]
    assert metrics[f"val/{name}"] == pytest.approx(1.0)
    assert "val/stage3/" not in "".join(metrics)
    assert len(oracle.was_training) == 2  # three images, two at a time


def test_stages_are_not_averaged_over_views(dataset):
    with pytest.raises(ConfigError, match=r"leave out eval\.flip"):
        evaluate(Oracle(dataset), dataset, EvalConfig(flip=True), device=CPU, per_stage=True)


@pytest.mark.parametrize("task", TASKS)
def test_a_model_of_each_task_is_evaluated(tiny_recipe, task):
    recipe = tiny_recipe(model={"task": task})
    dataset = build_dataset(recipe.data, "val", seed=0, task=task)
    model = build_model(recipe, dataset.categories)
    metrics, picture = evaluate(model, dataset, recipe.eval, device=CPU, per_stage=True)
    name = TASKS[task][0].removeprefix("val/")
    assert 0.0 <= metrics[f"val/{name}"] == metrics[f"val/stage2/{name}"] < 0.5
    assert picture.startswith(b"\x89PNG")


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_ground_truth_itself_scores_one(dataset, batch_size):
    oracle = Oracle(dataset).train()
    metrics, _ = evaluate(oracle, dataset, EvalConfig(batch_size=batch_size), device=CPU)
    assert metrics["val/AP"] == pytest.approx(1.0)
    assert metrics["val/AP50"] == pytest.approx(1.0)
    assert oracle.training
    assert not any(oracle.was_training)


def test_wrong_masks_score_nothing(dataset):
    oracle = Oracle(dataset)
    oracle.truth = {
        key: Instances(scores=i.scores, labels=i.labels, masks=~i.masks)
        for key, i in oracle.truth.items()
    }
    metrics, _ = evaluate(oracle, dataset, EvalConfig(), device=CPU)
    assert metrics["val/AP"] < 0.05


def test_the_picture_shows_truth_beside_prediction(dataset):
    _, one = evaluate(Oracle(dataset), dataset, EvalConfig(probe_images=1), device=CPU)
    _, all_of_them = evaluate(Oracle(dataset), dataset, EvalConfig(probe_images=99), device=CPU)
    one, all_of_them = (Image.open(io.BytesIO(png)) for png in (one, all_of_them))
    assert one.format == "PNG"
    assert one.width > 1.9 * one.height
    assert all_of_them.height > 2.5 * one.height  # three images


def test_no_picture_where_none_is_wanted(dataset):
    assert evaluate(Oracle(dataset), dataset, EvalConfig(probe_images=0), device=CPU)[1] is None


@pytest.mark.parametrize("task", TASKS)
def test_the_picture_of_stages_shows_truth_and_every_update_in_a_row(tiny_recipe, task):
    dataset = build_dataset(tiny_recipe().data, "val", seed=0, task=task)
    oracle = Oracle(dataset)
    sheet = np.asarray(Image.open(io.BytesIO(stage_picture(oracle, dataset, 1, device=CPU))))
    gap = 4
    width = (sheet.shape[1] - 5 * gap) // 4
    starts = [gap + place * (width + gap) for place in range(4)]
    truth, static, first, second = (sheet[:, start : start + width] for start in starts)
    assert (truth == first).all()
    assert (first == second).all()
    assert (static != truth).mean() > 0.02
    assert oracle.was_training == [False]


def test_a_model_of_other_classes_is_refused(dataset):
    oracle = Oracle(dataset)
    oracle.num_classes += 1
    with pytest.raises(DataError, match="categories, the model predicts"):
        evaluate(oracle, dataset, EvalConfig(), device=CPU)


def test_speed_is_measured_in_evaluation_mode_without_random_numbers(dataset, tiny_recipe):
    recipe = tiny_recipe()
    model = build_model(recipe, dataset.categories)
    model.train()
    before = torch.get_rng_state()
    assert measure_fps(model, dataset, 2, device=CPU) > 0
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


WORKERS = Path(__file__).with_name("score_workers.py")


def test_two_workers_score_every_image_once_and_the_same_to_the_bit(tmp_path):
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKERS), str(tmp_path), "5"]  # two have three images and two
    subprocess.run(command, env=environment, check=True, timeout=200)
    alone, *workers = (
        json.loads((tmp_path / f"worker{name}.json").read_text())
        for name in ("0_of_1", "0_of_2", "1_of_2")
    )
    for task, (name, _) in TASKS.items():
        assert 0.05 < alone[task]["metrics"][name] < 0.95
        for worker in workers:
            assert worker[task]["metrics"] == alone[task]["metrics"]
        seen = [worker[task]["seen"] for worker in workers]
        assert [len(images) for images in seen] == [3, 2]
        assert sorted(seen[0] + seen[1]) == sorted(alone[task]["seen"])
        assert len({*seen[0], *seen[1]}) == 5


def test_predictions_are_handed_over_and_scores_may_be_left_out(dataset):
    seen = {}
    oracle = Oracle(dataset)
    metrics, _ = evaluate(
        oracle,
        dataset,
        EvalConfig(probe_images=0),
        device=CPU,
        scored=False,
        on_prediction=lambda info, found: seen.update({info.image_id: found}),
    )
    assert metrics == {}
    assert seen == oracle.truth
