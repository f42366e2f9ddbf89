"""The network compiles whole, and a recipe that asks for it trains the same."""

from dataclasses import dataclass, fields

import pytest
import torch

from knet_core import build_dataset, build_model
from knet_core.data import collate
from knet_core.models.kernel_update import KernelUpdateHead
from knet_core.structures import StageOutput
from knet_core.trainer import Trainer

CPU = torch.device("cpu")


@dataclass
class Kind:
    isthing: bool


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(module):
    """Without a code generator: what is tested is that there is one graph, and what it says."""
    return torch.compile(module, fullgraph=True, backend="eager")


def assert_same_stage(found, expected):
    for item in fields(expected):
        ours, theirs = getattr(found, item.name), getattr(expected, item.name)
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"adaptive_update": False},
        {"interaction": False},
        {"grouping": "soft"},
        {"task": "semantic"},
        {"task": "semantic", "grouping": "soft", "update_channels": 16},
    ],
)
def test_an_update_head_is_one_graph(tiny_recipe, switches):
    torch.manual_seed(0)
    config = tiny_recipe(model=switches).model
    head = KernelUpdateHead(config, 0 if config.task == "semantic" else 5)
    features = torch.randn(2, 32, 8, 12)
    previous = StageOutput(
        masks=torch.randn(2, 10, 8, 12), class_logits=None, kernels=torch.randn(2, 10, 32)
    )
    assert_same_stage(compiled(head)(features, previous), head(features, previous))


@pytest.mark.parametrize("task", ["instance", "panoptic", "semantic"])
def test_the_whole_network_is_one_graph(tiny_recipe, task):
    torch.manual_seed(0)
    recipe = tiny_recipe(model={"task": task})
    kinds = [Kind(task != "semantic"), Kind(task == "instance"), Kind(task == "instance")]
    model = build_model(recipe, kinds).eval()
    images = torch.randn(2, 3, 64, 96)
    found, expected = compiled(model)(images), model(images)
    assert len(found.stages) == len(expected.stages)
    for ours, theirs in zip(found.stages, expected.stages, strict=True):
        assert_same_stage(ours, theirs)
    torch.testing.assert_close(found.semantic, expected.semantic)


@pytest.fixture
def step(tiny_recipe, tmp_path):
    """Do one step of a recipe's training and return its losses."""

    def run(**train):
        recipe = tiny_recipe(**train)
        dataset = build_dataset(recipe.data, "train", seed=0)
        batch = collate([dataset.load(index, epoch=0) for index in range(2)])
        torch.manual_seed(0)
        model = build_model(recipe, dataset.categories).train()
        trainer = Trainer(model, recipe, num_iterations=10, device=CPU, output_dir=tmp_path)
        return {name: value.item() for name, value in trainer.step(5, [batch]).losses.items()}

    return run


def test_a_recipe_can_ask_for_compilation(step, monkeypatch):
    calls = []
    expected = step()
    original = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda module: calls.append(module) or original(module, backend="eager"),
    )
    assert step(compile=True) == pytest.approx(expected, rel=1e-5)
    assert len(calls) == 1


def test_bf16_trains_on_a_cpu_close_to_fp32(step):
    exact, rough = step(), step(precision="bf16")
    assert rough != exact
    assert rough == pytest.approx(exact, rel=0.1, abs=0.01)


def test_fp16_falls_back_to_fp32_on_a_cpu(step):
    assert step(precision="fp16") == step()
