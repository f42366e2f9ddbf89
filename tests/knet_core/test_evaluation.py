import io

import pytest
import torch
from PIL import Image

from knet_core import (
    DataError,
    EvalConfig,
    Instances,
    build_dataset,
    build_model,
)
from knet_core.evaluation import evaluate, measure_fps

CPU = torch.device("cpu")


class Oracle(torch.nn.Module):
    """Knows the ground truth of a data set by image id."""

    def __init__(self, dataset):
        super().__init__()
        self.num_classes = dataset.num_classes
        self.was_training = []
        self.truth = {
            dataset.load(i, epoch=0).info.image_id: dataset.instances(i)
            for i in range(len(dataset))
        }

    def forward(self, images):
        self.was_training.append(self.training)
        return images

    def postprocess(self, output, infos):
        return [self.truth[info.image_id] for info in infos]


@pytest.fixture
def dataset(tiny_recipe):
    return build_dataset(tiny_recipe().data, "val", seed=0)


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


def test_a_model_of_other_classes_is_refused(dataset):
    oracle = Oracle(dataset)
    oracle.num_classes += 1
    with pytest.raises(DataError, match="categories, the model predicts"):
        evaluate(oracle, dataset, EvalConfig(), device=CPU)


def test_speed_is_measured_in_evaluation_mode_without_random_numbers(dataset, tiny_recipe):
    recipe = tiny_recipe()
    model = build_model(recipe.model, recipe.loss, recipe.eval, num_classes=dataset.num_classes)
    model.train()
    before = torch.get_rng_state()
    assert measure_fps(model, dataset, 2, device=CPU) > 0
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
