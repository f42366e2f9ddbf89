"""The semantic losses against KNET_SPEC 6.5, pixel by pixel in float64."""

import pytest
import torch
from torch.nn import functional as F

from knet_core import LossConfig
from knet_core.semantic_criterion import semantic_criterion
from knet_core.structures import IGNORE, KNetOutput, StageOutput, Targets

WEIGHTS = LossConfig(ce=0.7)
CLASSES = 4


def random_output(batch, size=(32, 64), *, stride=8, updates=2, auxiliary=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    height, width = size

    def maps(stride):
        shape = (batch, CLASSES, height // stride, width // stride)
        return (torch.randn(*shape, generator=g) * 3).requires_grad_()

    stages = tuple(
        StageOutput(masks=maps(stride), class_logits=None, kernels=torch.zeros(batch, CLASSES, 2))
        for _ in range(updates + 1)
    )
    semantic = maps(16) if auxiliary else None
    return KNetOutput(stages=stages, semantic=semantic, padded_size=size)


def random_target(height, width, *, void=0.2, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (height, width), generator=g, dtype=torch.uint8)
    return Targets(
        labels=torch.zeros(0, dtype=torch.int64),
        masks=torch.zeros(0, height, width, dtype=torch.uint8),
        semantic=labels.where(torch.rand(height, width, generator=g) >= void, IGNORE),
    )


def cross_entropy(logits, targets, size):
    """Sum over labelled pixels of the images, divided by all pixels of the padded batch."""
    logits = F.interpolate(logits.double(), size=size, mode="bilinear", align_corners=False)
    total = 0 * logits.sum()
    for image, target in enumerate(targets):
        for y, x in (target.semantic != IGNORE).nonzero().tolist():
            powers = logits[image, :, y, x].exp()
            total = total - (powers[int(target.semantic[y, x])] / powers.sum()).log()
    return total / (len(targets) * size[0] * size[1])


@pytest.mark.parametrize("stride", [4, 8])
@pytest.mark.parametrize("sizes", [[(32, 64)], [(27, 61), (32, 33)]])
def test_every_term_and_gradient_follows_the_definition(sizes, stride):
    output = random_output(len(sizes), stride=stride, updates=1)
    targets = [random_target(*size, seed=index) for index, size in enumerate(sizes)]
    terms = semantic_criterion(output, targets, WEIGHTS)
    expected = {"seg": 0.4 * cross_entropy(output.semantic, targets, (32, 64))}
    for index, stage in enumerate(output.stages):
        expected[f"stage{index}/ce"] = 0.7 * cross_entropy(stage.masks, targets, (32, 64))
    assert terms.named().keys() == expected.keys()
    for name, value in terms.named().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-7, msg=name)
    leaves = [output.semantic, *(stage.masks for stage in output.stages)]
    found = torch.autograd.grad(terms.total(), leaves)
    by_definition = torch.autograd.grad(sum(expected.values()), leaves)
    for one, other in zip(found, by_definition, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_without_an_auxiliary_classifier_the_term_is_absent():
    output = random_output(1, auxiliary=False)
    terms = semantic_criterion(output, [random_target(32, 64)], WEIGHTS)
    assert terms.seg is None
    assert set(terms.named()) == {"stage0/ce", "stage1/ce", "stage2/ce"}


def test_an_image_of_void_has_no_loss_and_a_finite_gradient():
    output = random_output(1)
    total = semantic_criterion(output, [random_target(32, 64, void=1.1)], WEIGHTS).total()
    total.backward()
    assert total.item() == 0
    assert (output.stages[0].masks.grad == 0).all()
    assert (output.semantic.grad == 0).all()


def test_padding_an_image_only_adds_to_the_number_of_pixels():
    target = random_target(32, 32)
    small = random_output(1, (32, 32), auxiliary=False)
    # The neighbour is wider, so the first image is padded; its logits go on as at its border.
    maps = [F.pad(stage.masks, (0, 4, 0, 0), mode="replicate") for stage in small.stages]
    wide = KNetOutput(
        stages=tuple(
            StageOutput(masks=m.expand(2, -1, -1, -1), class_logits=None, kernels=m) for m in maps
        ),
        semantic=None,
        padded_size=(32, 64),
    )
    alone = semantic_criterion(small, [target], WEIGHTS).total()
    padded = semantic_criterion(wide, [target, random_target(32, 64, void=1.1)], WEIGHTS).total()
    torch.testing.assert_close(padded * 4, alone, rtol=1e-5, atol=0)
