"""What a recipe's task decides beside the network."""

import dataclasses

import pytest
import torch

from knet_core import LossConfig, build_dataset, build_model
from knet_core.data import collate
from knet_core.tasks import build_task


def rank_terms(recipe):
    """Return the names of the rank losses of one batch."""
    dataset = build_dataset(recipe.data, "train", seed=0, task=recipe.model.task)
    torch.manual_seed(0)
    model = build_model(recipe, dataset.categories)
    batch = collate([dataset.load(index, epoch=0) for index in range(2)])
    terms = model.criterion(model(batch.images), batch.targets).named()
    return {name for name in terms if name.endswith("rank")}


@pytest.mark.parametrize(
    ("task", "rank", "expected"),
    [
        ("instance", None, set()),
        ("instance", 0.1, {"stage0/rank", "stage1/rank", "stage2/rank"}),
        ("panoptic", None, {"stage0/rank", "stage1/rank", "stage2/rank"}),
        ("panoptic", 0.0, set()),
    ],
)
def test_the_rank_loss_is_as_published_unless_it_is_set(tiny_recipe, task, rank, expected):
    recipe = tiny_recipe(loss={"rank": rank}, model={"task": task})
    assert rank_terms(recipe) == expected


def test_an_unset_rank_loss_has_the_published_weight(tiny_recipe):
    recipe = tiny_recipe(model={"task": "panoptic"})
    assert build_task(recipe, num_things=6).loss == dataclasses.replace(LossConfig(), rank=0.1)
