"""Every shipped sweep: what it compares, the paper's numbers, and that each arm trains a step."""

import json
import os
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch

from knet_core import build_dataset, build_model, make_shapes
from knet_core.data import collate
from knet_platform.cli.main import main
from knet_platform.config import load_recipe, read_yaml
from knet_platform.planning import load_sweep
from knet_platform.report import build_report
from knet_platform.storage import Store
from knet_platform.sweep_file import Resources

ROOT = Path(__file__).parents[2]
SWEEPS = ROOT / "sweeps"
SHAPES = [f"data={SWEEPS}/data/shapes.yaml"]
SCALES = sorted(file.stem for file in (SWEEPS / "scales").iterdir())

# The tables of K-Net (arXiv:2106.14855), line by line: arm, then the columns.
TABLES = {
    "head": """
        val/AP val/AP50 val/AP75
        neither 10.0 18.2 9.6
        update 22.6 37.3 23.5
        interaction 31.2 52.0 32.4
        both 34.1 55.3 35.7
        """,
    "positional": """
        val/AP val/AP50 val/AP75
        neither 30.9 51.7 31.6
        coordinates 34.0 55.4 35.6
        encoding 34.1 55.3 35.7
        both 34.0 55.1 35.8
        """,
    "stages": """
        val/AP val/AP50 val/AP75 bench/fps
        1 21.8 37.3 22.1 24.0
        2 32.1 52.3 33.5 22.7
        3 34.1 55.3 35.7 21.2
        4 34.5 56.5 35.7 20.1
        5 34.5 56.5 35.9 18.9
        """,
    "kernels": """
        val/AP val/AP50 val/AP75 bench/fps
        50 32.7 53.7 34.1 21.6
        64 33.6 54.8 35.1 21.6
        100 34.1 55.3 35.7 21.2
        128 34.3 55.6 35.8 20.7
        256 34.7 56.1 36.3 19.8
        300 34.9 - - -
        512 34.9 - - -
        768 34.9 - - -
        """,
    "semantic_stages": """
        val/mIoU
        0 36.7
        1 42.7
        2 43.0
        3 43.3
        4 43.8
        5 44.1
        6 43.1
        7 42.6
        """,
    "semantic_methods": """
        val/mIoU
        FCN 36.7
        FCN+K-Net 43.3
        PSPNet 42.6
        PSPNet+K-Net 43.9
        DeepLabV3 43.5
        DeepLabV3+K-Net 44.6
        UPerNet 42.4
        UPerNet+K-Net 43.6
        UPerNet-Swin-L 50.6
        UPerNet-Swin-L+K-Net 52
        """,
    "backbones_panoptic": """
        val/PQ val/PQ_th val/PQ_st
        R50 47.1 51.7 40.3
        R101 49.6 55.1 41.4
        R101-DCN 48.3 54.0 39.7
        Swin-L 54.6 60.2 46.0
        """,
    "backbones_instance": """
        val/AP val/AP50 val/AP75 val/APs val/APm val/APl bench/fps
        R50 37.8 60.3 39.9 16.9 41.2 57.5 21.2
        R50-N256 38.6 60.9 41.0 19.1 42.0 57.7 19.8
        R101 - - - - - - 16.2
        R101-N256 - - - - - - 15.5
        """,
}
WITHOUT_NUMBERS = ["panoptic_design", "search_lr"]
every_sweep = pytest.mark.parametrize("name", sorted([*TABLES, *WITHOUT_NUMBERS]))

# Whole recipes that arms stand for, and what arms set on their sweep's recipe.
RECIPES = {
    "semantic_methods": {
        "FCN": "fcn_r50_ade20k",
        "FCN+K-Net": "knet_fcn_r50_ade20k",
        "PSPNet": "pspnet_r50_ade20k",
        "PSPNet+K-Net": "knet_pspnet_r50_ade20k",
        "DeepLabV3": "deeplabv3_r50_ade20k",
        "DeepLabV3+K-Net": "knet_deeplabv3_r50_ade20k",
        "UPerNet": "upernet_r50_ade20k",
        "UPerNet+K-Net": "knet_upernet_r50_ade20k",
        "UPerNet-Swin-L": "upernet_swinl_ade20k_512",
        "UPerNet-Swin-L+K-Net": "knet_upernet_swinl_ade20k_512",
    },
    "backbones_panoptic": {
        "R50": "knet_r50_panoptic_ms3x",
        "R101": "knet_r101_panoptic_ms3x",
        "R101-DCN": "knet_r101dcn_panoptic_ms3x",
        "Swin-L": "knet_swinl_panoptic_ms3x",
    },
    "backbones_instance": {
        "R50": "knet_r50_instance_ms3x",
        "R50-N256": "knet_r50_n256_instance_ms3x",
        "R101": "knet_r101_instance_ms3x",
        "R101-N256": "knet_r101_n256_instance_ms3x",
    },
    "kernels": {"100": "knet_r50_instance_1x"},
    "stages": {"3": "knet_r50_instance_1x"},
    "head": {"both": "knet_r50_instance_1x"},
    "positional": {"encoding": "knet_r50_instance_1x"},
    "panoptic_design": {"published": "knet_r50_panoptic_1x"},
    "search_lr": {"published": "knet_r50_instance_1x"},
    "semantic_stages": {"0": "fcn_r50_ade20k", "3": "knet_fcn_r50_ade20k"},
}


def file_of(name):
    return SWEEPS / f"{name}.yaml"


@cache
def load_full(name):
    """The sweep as published, but for its data: the recipes' own sets are not at hand."""
    return load_sweep(file_of(name), overrides=SHAPES)


@cache
def load_at_laptop_scale(path):
    """The recipes of its arms, on the set of `at_hand`."""
    return {trial.arm: trial.recipe for trial in load_sweep(path, scale="laptop", seeds=1).trials}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_shapes(folder / "shapes", num_train=2, num_val=2, size=96)
    return folder


@pytest.fixture
def at_hand(shapes, tmp_path, monkeypatch):
    """Only the synthetic set, as `knet data make-shapes` writes it, and an empty store."""
    monkeypatch.setenv("KNET_DATA", str(shapes))
    monkeypatch.setenv("KNET_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("KNET_STORAGE", raising=False)


def test_every_sweep_is_listed_here():
    assert sorted(file.stem for file in SWEEPS.glob("*.yaml")) == sorted(
        [*TABLES, *WITHOUT_NUMBERS]
    )


@every_sweep
def test_a_sweep_can_be_executed(name):
    assert file_of(name).read_text().startswith("#!/usr/bin/env -S knet run\n# ")
    assert os.access(file_of(name), os.X_OK)


def test_git_keeps_sweeps_executable():
    listed = subprocess.run(
        ["git", "ls-files", "--stage", "sweeps/*.yaml"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    top = [line for line in listed if line.partition("\t")[2].count("/") == 1]
    assert all(line.startswith("100755") for line in top)


@every_sweep
def test_a_sweep_as_published_resolves_to_distinct_arms_with_the_published_resources(name):
    sweep = load_full(name)
    assert sweep.name == name
    assert len({trial.hash for trial in sweep.trials}) == len(sweep.arms) == len(sweep.trials)
    assert sweep.resources == Resources(workers=8, gpus_per_worker=1)
    recipes = {trial.arm: trial.recipe for trial in sweep.trials}
    assert {arm for arm in recipes if recipes[arm].train.batch_size != 16} <= {"Swin-L"}
    assert all(recipe.model.backbone.pretrained for recipe in recipes.values())


@every_sweep
def test_an_arm_as_published_is_the_recipe_it_stands_for(name):
    recipes = {trial.arm: trial.recipe for trial in load_full(name).trials}
    expected = {
        arm: load_recipe(SWEEPS / "recipes" / f"{recipe}.yaml", overrides=SHAPES)
        for arm, recipe in RECIPES[name].items()
    }
    assert {arm: recipes[arm] for arm in expected} == expected


@pytest.mark.parametrize(
    "arms",
    [
        {
            "stages": "3",
            "kernels": "100",
            "head": "both",
            "positional": "encoding",
            "search_lr": "published",
        },
        {"semantic_stages": "0", "semantic_methods": "FCN"},
        {"semantic_stages": "3", "semantic_methods": "FCN+K-Net"},
    ],
)
def test_a_run_that_several_sweeps_share_is_one_trial(arms):
    trials = [trial for name, arm in arms.items() for trial in load_full(name).trials
              if trial.arm == arm]  # fmt: skip
    assert len(trials) == len(arms)
    assert len({trial.hash for trial in trials}) == 1


@pytest.mark.parametrize("name", sorted(TABLES))
def test_the_numbers_are_the_papers(name):
    columns, *lines = TABLES[name].strip().splitlines()
    rows = {
        arm: tuple(None if value == "-" else float(value) for value in values)
        for arm, *values in map(str.split, lines)
    }
    sweep = load_full(name)
    assert sweep.arms == tuple(rows)
    assert sweep.paper.rows == rows
    assert list(sweep.paper.columns) == columns.split()
    assert sweep.metric.name == columns.split()[0]


@pytest.mark.parametrize("name", WITHOUT_NUMBERS)
def test_what_the_paper_gives_no_numbers_for_has_none(name):
    assert load_full(name).paper is None


@pytest.mark.parametrize("scale", SCALES)
@every_sweep
def test_a_sweep_is_planned_at_every_scale_with_the_synthetic_set_alone(
    name, scale, at_hand, capsys
):
    assert main(["plan", str(file_of(name)), "--scale", scale, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    sweep = load_sweep(file_of(name), scale=scale)
    assert len({trial.hash for trial in sweep.trials}) == len(sweep.trials)
    planned = [(trial["arm"], trial["seed"]) for trial in plan["trials"]]
    assert sorted(planned) == sorted((arm, seed) for arm in sweep.arms for seed in (0, 1))


@pytest.mark.parametrize(
    ("name", "axis"), [("semantic_methods", "arm"), ("backbones_panoptic", "arm"),
                       ("kernels", "num_kernels")]
)  # fmt: skip
def test_a_report_names_what_arms_vary_unless_they_are_whole_recipes(name, axis, tmp_path):
    for scale in (None, "laptop"):
        sweep = load_sweep(file_of(name), scale=scale, overrides=SHAPES)
        assert build_report(sweep, Store(str(tmp_path)), scale=scale).axis == axis


def arms_of(path):
    return [pytest.param(path, arm, id=f"{path.stem}-{arm}") for arm in read_yaml(path)["arms"]]


@pytest.mark.parametrize(
    ("path", "arm"), [case for path in sorted(SWEEPS.glob("*.yaml")) for case in arms_of(path)]
)
def test_an_arm_at_laptop_scale_is_small_and_trains_a_step(path, arm, at_hand):
    recipe = load_at_laptop_scale(path)[arm]
    torch.manual_seed(0)
    dataset = build_dataset(recipe.data, "train", seed=0, task=recipe.model.task)
    model = build_model(recipe, dataset.categories).train()
    assert sum(parameter.numel() for parameter in model.parameters()) < 15e6
    batch = collate([dataset.load(index, epoch=0) for index in range(2)])
    loss = model.criterion(model(batch.images), batch.targets).total()
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient is not None for gradient in gradients)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert sum(gradient.abs().sum() for gradient in gradients) > 0
