"""A batch in pieces is the same step as in one, which smaller micro-batches are not."""

import pytest
import torch

from knet_core import build_dataset, build_model
from knet_core.data import collate
from knet_core.pieces import is_separable
from knet_core.trainer import Trainer


@pytest.fixture
def step(tiny_recipe, tmp_path):
    """Do one step on four images and return the losses and every gradient's effect."""
    recipe = tiny_recipe()
    dataset = build_dataset(recipe.data, "train", seed=0)
    samples = [dataset.load(index, epoch=0) for index in range(4)]

    def run(images_at_once=None, micro_batch=4):
        torch.manual_seed(0)
        model = build_model(recipe, dataset.categories)
        model.double().train()
        trainer = Trainer(
            model,
            recipe,
            num_iterations=4,
            device=torch.device("cpu"),
            output_dir=tmp_path,
            images_at_once=images_at_once,
        )
        parts = [samples[start : start + micro_batch] for start in range(0, 4, micro_batch)]
        batches = [collate(part) for part in parts]
        for batch in batches:
            object.__setattr__(batch, "images", batch.images.double())
        result = trainer.step(0, batches)
        return result.losses, result.grad_norm, model.state_dict()

    return run


@pytest.mark.parametrize("images_at_once", [1, 2, 3, 4])
def test_pieces_change_nothing_but_the_order_of_sums(step, images_at_once):
    losses, norm, weights = step()
    in_pieces, norm_in_pieces, weights_in_pieces = step(images_at_once)
    for name, value in losses.items():
        assert in_pieces[name].item() == pytest.approx(value.item(), rel=1e-5), name
    assert norm_in_pieces.item() == pytest.approx(norm.item(), rel=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(weights_in_pieces[name], value, rtol=1e-5, atol=1e-8)


def test_smaller_micro_batches_are_another_step(step):
    """Why memory is not saved by accumulation: losses are means over a micro-batch's objects."""
    norm, accumulated = step()[1], step(micro_batch=1)[1]
    assert accumulated.item() != pytest.approx(norm.item(), rel=1e-3)


def test_batch_statistics_bind_images_together():
    norm = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    assert not is_separable(norm.train())
    assert is_separable(norm.eval())
    assert is_separable(torch.nn.Sequential(torch.nn.GroupNorm(1, 3)))
