import copy
import platform
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from knet_core import BackboneConfig, ModelConfig, Recipe, build_model, prepare_for_inference
from knet_core.inference import _fold_batch_norms
from knet_core.models.kernel_head import PyramidKernels

pytestmark = pytest.mark.usefixtures("one_thread")
MEGABYTE = 2**20


@dataclass
class Kind:
    isthing: bool


def tiny_model(task="panoptic", backbone="test_resnet", **switches):
    """Statistics and scales are random, so that folding has something to fold."""
    torch.manual_seed(0)
    config = ModelConfig(
        task=task,
        backbone=BackboneConfig(name=backbone, pretrained=False),
        channels=32,
        num_kernels=6,
        num_heads=4,
        ffn_channels=32,
        stages=2,
        **switches,
    )
    things = {"panoptic": 4, "instance": 7, "semantic": 0}[task]
    model = build_model(Recipe(model=config), [Kind(i < things) for i in range(7)])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias)
    return model.eval()


def prediction(output):
    tensors = []
    for stage in output.stages:
        tensors += [stage.masks, stage.kernels]
        tensors += [] if stage.class_logits is None else [stage.class_logits]
    return tensors


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("task", ["instance", "panoptic", "semantic"])
@pytest.mark.parametrize("backbone", ["test_resnet", "resnet10t", "resnet26"])
@torch.no_grad()
def test_the_prepared_model_predicts_the_same(task, backbone, channels_last):
    """In float64, where no mask lies within rounding of the cut that makes groups."""
    switches = {"semantic_head": "fcn"} if task == "semantic" else {}
    model = tiny_model(task, backbone, **with_semantic(switches)).double()
    ready = prepare_for_inference(model, channels_last=channels_last)
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    expected, found = model(images), ready(images)
    for ours, theirs in zip(prediction(found), prediction(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    if task == "semantic":
        assert expected.semantic is not None
        assert found.semantic is None
    else:
        torch.testing.assert_close(found.semantic, expected.semantic, rtol=1e-9, atol=1e-9)


def with_semantic(switches):
    from knet_core.config import SemanticConfig

    head = switches.pop("semantic_head", None)
    return switches if head is None else {"semantic": SemanticConfig(head=head)}


@torch.no_grad()
def test_in_float32_static_masks_differ_by_less_than_1e_5():
    model = tiny_model(backbone="resnet26")
    images = torch.randn(1, 3, 128, 96)
    expected = model(images).stages[0].masks
    found = prepare_for_inference(model)(images).stages[0].masks
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("backbone", ["test_resnet", "resnet10t", "resnet26"])
def test_no_batch_normalisation_is_left(backbone):
    ready = prepare_for_inference(tiny_model(backbone=backbone))
    assert not [m for m in ready.modules() if isinstance(m, nn.BatchNorm2d)]


def test_the_original_stays_as_it_is():
    model = tiny_model().train()
    before = copy.deepcopy(model.state_dict())
    ready = prepare_for_inference(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert model.training
    assert not ready.training
    assert any(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in ready.parameters())


def test_weights_lie_as_asked():
    for channels_last in (True, False):
        static = prepare_for_inference(tiny_model(), channels_last=channels_last).static
        assert isinstance(static, PyramidKernels)
        weight = static.fpn.outputs[1].weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last


class Awkward(nn.Module):
    """A convolution read by two normalisations, and one that runs twice."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Conv2d(3, 3, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(2))
        self.twice = nn.Conv2d(3, 3, 1)
        self.after = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(2))
        self.plain = nn.Conv2d(3, 3, 1)
        self.plain_norm = nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.shared(x)
        x = self.norms[0](x) * self.norms[1](x)
        for norm in self.after:
            x = norm(self.twice(x))
        return self.plain_norm(self.plain(x))


@torch.no_grad()
def test_only_a_convolution_with_one_reader_is_folded():
    torch.manual_seed(0)
    model = Awkward().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean)
    images = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    expected = model(images)
    _fold_batch_norms(model)
    torch.testing.assert_close(model(images), expected)
    assert isinstance(model.plain_norm, nn.Identity)
    left = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert left == [*model.norms, *model.after]


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other C libraries have no such knob"
)
def test_freed_memory_stays_in_the_process_when_asked():
    code = f"""
import pathlib, torch
from knet_core import keep_freed_memory

def use():
    torch.zeros({256 * MEGABYTE}, dtype=torch.uint8).add_(1)
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    print(next(line.split()[1] for line in lines if line.startswith("VmRSS")))

use()
keep_freed_memory()
use()
"""
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    resident = [1024 * int(line) for line in printed.splitlines()]
    assert resident[1] - resident[0] > 200 * MEGABYTE
