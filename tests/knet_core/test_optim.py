import re

import pytest
import torch
from timm.models.swin_transformer import SwinTransformerBlock

from knet_core import ConfigError, OptimConfig, build_model
from knet_core.data import Category
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


def test_a_rate_is_rescaled_from_a_step_on_beside_all_else():
    config = OptimConfig(rescale_at=(500, 60_000), rescale_by=(2.0, 0.25))
    for step, by in ((499, 1.0), (500, 2.0), (59_999, 2.0), (60_000, 0.5), (89_999, 0.5)):
        expected = lr_factor(step, PUBLISHED, LENGTH) * by
        assert lr_factor(step, config, LENGTH) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("at", "by", "problem"),
    [
        ((5, 5), (1.0, 1.0), "optim.rescale_at: must be increasing steps > 0"),
        ((0,), (1.0,), "optim.rescale_at: must be increasing steps > 0"),
        ((5,), (), "optim.rescale_by: must be a factor > 0 for each of the 1 steps"),
        ((5,), (0.0,), "optim.rescale_by: must be a factor > 0"),
    ],
)
def test_rescaling_that_means_nothing_is_refused(at, by, problem):
    with pytest.raises(ConfigError, match=re.escape(problem)):
        OptimConfig(rescale_at=at, rescale_by=by)


@pytest.fixture
def model(tiny_recipe):
    recipe = tiny_recipe()
    return build_model(recipe, [Category(i, str(i)) for i in range(3)])


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


def decays(model, config):
    groups = build_optimizer(model, config).param_groups
    rates = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    return {name: rates[id(p)] for name, p in model.named_parameters() if p.requires_grad}, groups


def test_norms_and_relative_positions_can_be_spared_the_decay():
    model = torch.nn.Module()
    model.backbone = SwinTransformerBlock(8, (7, 7), num_heads=2)
    model.head = torch.nn.Sequential(
        torch.nn.Conv2d(8, 8, 1),
        torch.nn.BatchNorm2d(8),
        torch.nn.GroupNorm(2, 8),
        torch.nn.LayerNorm(8),
    )
    config = OptimConfig(decay_norms=False, weight_decay=0.1, backbone_lr_factor=0.5)
    rates, groups = decays(model, config)
    spared = {name for name, rate in rates.items() if rate == 0}
    assert spared == {
        "backbone.norm1.weight",
        "backbone.norm1.bias",
        "backbone.norm2.weight",
        "backbone.norm2.bias",
        "backbone.attn.relative_position_bias_table",
        *(f"head.{layer}.{part}" for layer in (1, 2, 3) for part in ("weight", "bias")),
    }
    assert {rates[name] for name in rates.keys() - spared} == {0.1}
    assert set_learning_rate(torch.optim.AdamW(groups), 60_000, config, LENGTH) == 1e-5
    for group in groups:
        in_backbone = {id(p) for p in model.backbone.parameters()} >= set(map(id, group["params"]))
        assert group["peak_lr"] == (0.5e-4 if in_backbone else 1e-4)


def test_sparing_norms_changes_nothing_else(model):
    every, _ = decays(model, OptimConfig())
    some, _ = decays(model, OptimConfig(decay_norms=False))
    norms = (torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.BatchNorm2d)
    inside = {
        f"{name}.{part}"
        for name, module in model.named_modules()
        if isinstance(module, norms)
        for part in ("weight", "bias")
    }
    assert every.keys() == some.keys()
    assert all(rate == (0 if name in inside else 0.05) for name, rate in some.items())
