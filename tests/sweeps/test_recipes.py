"""Every shipped recipe: what it parses to, how large its model is, and that it trains a step."""

import dataclasses
from functools import cache
from pathlib import Path

import pytest
import torch

from knet_core import BackboneConfig, Targets, build_model
from knet_core.data import Category
from knet_platform.config import load_recipe

RECIPES = Path(__file__).parents[2] / "sweeps" / "recipes"
LAPTOP = RECIPES.parent / "scales" / "laptop.yaml"

# Total and trainable parameters, KNET_SPEC 9.5. The baselines are their K-Net models less three
# updates of 4,403,968 (512 wide, updated in halves of 256).
PARAMETERS = {
    "knet_r50_instance_1x": (37_482_368, 37_257_024),
    "knet_r50_instance_ms3x": (37_482_368, 37_257_024),
    "knet_r50_n256_instance_ms3x": (37_522_304, 37_296_960),
    "knet_r101_instance_ms3x": (56_474_496, 56_249_152),
    "knet_r101_n256_instance_ms3x": (56_474_496 + 39_936, 56_249_152 + 39_936),
    "knet_r101dcn_instance_ms3x": (57_760_668, 57_535_324),
    "knet_r50_panoptic_1x": (37_536_852, 37_311_508),
    "knet_r50_panoptic_ms3x": (37_536_852, 37_311_508),
    "knet_r101_panoptic_ms3x": (56_528_980, 56_303_636),
    "knet_r101dcn_panoptic_ms3x": (57_815_152, 57_589_808),
    "knet_swinl_panoptic_ms3x": (208_781_224, 208_781_224),
    "knet_fcn_r50_ade20k": (62_810_508, 62_810_508),
    "knet_pspnet_r50_ade20k": (62_288_268, 62_288_268),
    "knet_deeplabv3_r50_ade20k": (81_425_804, 81_425_804),
    "knet_upernet_r50_ade20k": (45_660_300, 45_660_300),
    "knet_upernet_swint_ade20k": (43_632_614, 43_632_614),
    "knet_upernet_swinl_ade20k_512": (214_722_752, 214_722_752),
    "knet_upernet_swinl_ade20k_640": (214_722_752, 214_722_752),
    "fcn_r50_ade20k": (62_810_508 - 3 * 4_403_968,) * 2,
    "pspnet_r50_ade20k": (62_288_268 - 3 * 4_403_968,) * 2,
    "deeplabv3_r50_ade20k": (81_425_804 - 3 * 4_403_968,) * 2,
    "upernet_r50_ade20k": (79_728_012 - 3 * 4_403_968,) * 2,
    "upernet_swinl_ade20k_512": (246_971_840 - 3 * 4_403_968,) * 2,
}
NUM_CLASSES = {"instance": (80, 0), "panoptic": (80, 53), "semantic": (150, 0)}
FORMATS = {"instance": "coco", "panoptic": "coco_panoptic", "semantic": "ade20k"}
every_recipe = pytest.mark.parametrize("name", sorted(PARAMETERS))


@cache
def load(name):
    return load_recipe(RECIPES / f"{name}.yaml")


def categories(task):
    things, stuff = NUM_CLASSES[task]
    return [Category(i, str(i), isthing=i < things) for i in range(things + stuff)]


def test_every_recipe_is_listed_here():
    assert sorted(file.stem for file in RECIPES.iterdir()) == sorted(PARAMETERS)


@every_recipe
def test_a_recipe_has_as_many_parameters_as_published(name):
    recipe = load(name)
    assert recipe.model.backbone.pretrained
    assert recipe.data.format == FORMATS[recipe.model.task]
    backbone = dataclasses.replace(recipe.model.backbone, pretrained=False)
    recipe = dataclasses.replace(
        recipe, model=dataclasses.replace(recipe.model, backbone=backbone)
    )
    with torch.device("meta"):
        model = build_model(recipe, categories(recipe.model.task))
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (total, trainable) == PARAMETERS[name]


@every_recipe
def test_a_recipe_says_its_parameters_in_its_header(name):
    comment = (RECIPES / f"{name}.yaml").read_text().split("\nbase:")[0].split("\ndata:")[0]
    total, trainable = (f"{number / 1e6:.2f} M" for number in PARAMETERS[name])
    words = comment.replace("\n# ", " ")
    assert total in words
    assert trainable in words


def tiny(model):
    """Keep a recipe's switches, and take everything else as small as it goes."""
    backbone = BackboneConfig(
        name="test_resnet",
        pretrained=False,
        frozen_stages=model.backbone.frozen_stages,
        norm_eval=model.backbone.norm_eval,
        output_stride=model.backbone.output_stride,
        deformable=model.backbone.deformable,
        output_norm=model.backbone.output_norm,
    )
    halves = model.update_channels is not None and model.update_channels < model.channels
    return dataclasses.replace(
        model,
        backbone=backbone,
        channels=64,
        update_channels=32 if halves else None,
        num_kernels=6,
        num_heads=4,
        ffn_channels=32,
    )


@every_recipe
def test_a_recipe_trains_a_step_at_a_tiny_size(name):
    torch.manual_seed(0)
    recipe = load(name)
    recipe = dataclasses.replace(recipe, model=tiny(recipe.model))
    task = recipe.model.task
    things, stuff = (2, 2) if task == "panoptic" else (4, 0)
    classes = [Category(i, str(i), isthing=i < things) for i in range(things + stuff)]
    model = build_model(recipe, classes).train()
    semantic = torch.randint(things + stuff, (64, 64), dtype=torch.uint8)
    masks = torch.stack([semantic == 0, semantic == 1]).to(torch.uint8)
    labels = torch.tensor([0, 1])
    target = Targets(
        labels=labels[:0] if task == "semantic" else labels,
        masks=masks[:0] if task == "semantic" else masks,
        semantic=None if task == "instance" else semantic,
    )
    output = model(torch.randn(2, 3, 64, 64))
    assert len(output.stages) == recipe.model.stages + 1
    model.criterion(output, [target, target]).total().backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_longer_schedules_decay_at_the_published_epochs():
    recipe = load("knet_r50_instance_ms3x")
    assert [at * recipe.train.epochs for at in recipe.optim.decay_at] == pytest.approx([27, 33])
    assert recipe.data.short_edge == (640, 800)


@every_recipe
def test_recipes_synchronise_batch_normalisation_where_it_was_published(name):
    """The semantic ones; the others keep the backbone's stored statistics."""
    recipe = load(name)
    assert recipe.train.sync_batch_norm == (recipe.model.task == "semantic")
    assert recipe.model.backbone.norm_eval != recipe.train.sync_batch_norm
    laptop = load_recipe(RECIPES / f"{name}.yaml", scale=LAPTOP)
    assert not laptop.train.sync_batch_norm


@pytest.mark.parametrize("name", [name for name in sorted(PARAMETERS) if "ade20k" in name])
def test_semantic_recipes_keep_to_the_published_schedule(name):
    recipe = load(name)
    steps = [at * recipe.train.iterations for at in recipe.optim.decay_at]
    assert steps == pytest.approx([60_000, 72_000])
    assert recipe.optim.lr == (6e-5 if "swin" in name else 1e-4)
    assert recipe.optim.weight_decay == 5e-4
    assert recipe.optim.backbone_lr_factor == 1
    assert recipe.optim.decay_norms == ("swin" not in name)
    assert recipe.data.crop == (640 if "640" in name else 512)
    assert recipe.data.format == "ade20k"
