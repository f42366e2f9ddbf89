import pytest
import torch

from knet_core import EvalConfig, LossConfig, OptimConfig, build_model
from knet_core.optim import build_optimizer, lr_factor, set_learning_rate

PUBLISHED = OptimConfig()
LENGTH = 90_000  # 12 epochs


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 0.001),
        (500, 1 - 0.5 * 0.999),
        (999, 1 - 0.001 * 0.999),
        (1000, 1.0),
        (59_999, 1.0),
        (60_000, 0.1),  # epoch 8 of 12
        (82_499, 0.1),
        (82_500, 0.01),  # epoch 11 of 12
        (89_999, 0.01),
    ],
)
def test_learning_rate_follows_the_published_schedule(step, factor):
    assert lr_factor(step, PUBLISHED, LENGTH) == pytest.approx(factor, rel=1e-12)


def test_without_warm_up_the_first_step_has_the_full_rate():
    assert lr_factor(0, OptimConfig(warmup_iterations=0), 10) == 1.0


def test_a_run_shorter_than_the_warm_up_still_decays():
    config = OptimConfig(warmup_iterations=100, warmup_factor=0.5)
    assert lr_factor(9, config, 10) == pytest.approx((1 - 0.91 * 0.5) * 0.01)


@pytest.fixture
def model(tiny_recipe):
    recipe = tiny_recipe()
    return build_model(recipe.model, LossConfig(), EvalConfig(), num_classes=3)


def test_every_parameter_that_trains_is_in_one_group_and_decays(model):
    optimizer = build_optimizer(model, PUBLISHED)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    expected = {id(p) for p in model.parameters() if p.requires_grad}
    assert len(grouped) == len(expected)
    assert {id(p) for p in grouped} == expected
    assert len(expected) < len(list(model.parameters())), "the frozen stage must be left out"
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.05}


def test_the_backbone_learns_at_a_quarter_of_the_rate(model):
    optimizer = build_optimizer(model, PUBLISHED)
    assert set_learning_rate(optimizer, 60_000, PUBLISHED, LENGTH) == pytest.approx(1e-5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = 0.25e-5 if name.startswith("backbone.") else 1e-5
            assert rates[id(parameter)] == pytest.approx(expected)


def test_a_backbone_that_does_not_train_is_no_group():
    model = torch.nn.Module()
    model.head = torch.nn.Linear(2, 2)
    assert len(build_optimizer(model, PUBLISHED).param_groups) == 1
