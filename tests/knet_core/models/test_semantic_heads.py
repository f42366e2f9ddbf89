"""Dense heads against KNET_SPEC 6.3, in float64."""

from typing import get_args

import pytest
import torch
from torch.nn import functional as F

from knet_core import BackboneConfig, ConfigError, ModelConfig, Recipe, build_model
from knet_core.config import SemanticConfig, SemanticHead
from knet_core.data import Category
from knet_core.models.semantic_heads import HEADS, build_semantic_head

WIDTHS = (4, 6, 8, 10)


def features(batch=2, size=(24, 40), dilated=False):
    g = torch.Generator().manual_seed(0)
    strides = (1, 2, 2, 2) if dilated else (1, 2, 4, 8)
    return [
        torch.randn(batch, width, size[0] // s, size[1] // s, generator=g, dtype=torch.float64)
        for width, s in zip(WIDTHS, strides, strict=True)
    ]


def build(name, channels=5):
    torch.manual_seed(0)
    head = HEADS[name](WIDTHS, channels).double()
    for module in head.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.weight)
            torch.nn.init.normal_(module.bias)
            torch.nn.init.normal_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)
    return head.eval()


def cbr(x, unit, dilation=1):
    """Convolve tap by tap on the zero-padded map, normalise by stored statistics, cut at zero."""
    conv, norm = unit[0], unit[1]
    k = conv.kernel_size[0]
    margin = dilation * (k // 2)
    padded = F.pad(x, (margin,) * 4)
    h, w = x.shape[2:]
    y = x.new_zeros(len(x), conv.out_channels, h, w)
    for i in range(k):
        for j in range(k):
            window = padded[:, :, i * dilation : i * dilation + h, j * dilation : j * dilation + w]
            y += torch.einsum("oc,bchw->bohw", conv.weight[:, :, i, j], window)
    scale = norm.weight / (norm.running_var + 1e-5).sqrt()
    return (
        (y - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
    ).relu()


def average(x, fields):
    """Average over fields whose borders are rounded outwards, as adaptive pooling does."""
    h, w = x.shape[2:]
    rows = []
    for i in range(fields):
        top, bottom = i * h // fields, -(-(i + 1) * h // fields)
        row = []
        for j in range(fields):
            left, right = j * w // fields, -(-(j + 1) * w // fields)
            row.append(x[:, :, top:bottom, left:right].mean((2, 3)))
        rows.append(torch.stack(row, -1))
    return torch.stack(rows, -2)


def weights_of_resize(source, target):
    """Return (target, source) bilinear weights without aligned corners."""
    matrix = torch.zeros(target, source, dtype=torch.float64)
    for i in range(target):
        place = min(max((i + 0.5) * source / target - 0.5, 0), source - 1)
        low = min(int(place), source - 1)
        high = min(low + 1, source - 1)
        matrix[i, low] += 1 - (place - low)
        matrix[i, high] += place - low
    return matrix


def resize(x, like):
    rows = weights_of_resize(x.shape[2], like.shape[2])
    columns = weights_of_resize(x.shape[3], like.shape[3])
    return torch.einsum("ih,bchw,jw->bcij", rows, x, columns)


def pyramid_pooling(head, c5):
    pooled = [
        resize(cbr(average(c5, k), pool), c5)
        for k, pool in zip((1, 2, 3, 6), head.pools, strict=True)
    ]
    return cbr(torch.cat([c5, *pooled], 1), head.bottleneck)


def fcn(head, maps):
    y = cbr(cbr(maps[3], head.convs[0]), head.convs[1])
    return cbr(torch.cat([maps[3], y], 1), head.bottleneck)


def pspnet(head, maps):
    return pyramid_pooling(head, maps[3])


def deeplabv3(head, maps):
    c5 = maps[3]
    pooled = resize(cbr(c5.mean((2, 3), keepdim=True), head.image_pool), c5)
    branches = [
        cbr(c5, branch, dilation)
        for branch, dilation in zip(head.branches, (1, 12, 24, 36), strict=True)
    ]
    return cbr(torch.cat([pooled, *branches], 1), head.bottleneck)


def upernet(head, maps):
    top = pyramid_pooling(head, maps[3])
    p4 = cbr(maps[2], head.laterals[2]) + resize(top, maps[2])
    p3 = cbr(maps[1], head.laterals[1]) + resize(p4, maps[1])
    p2 = cbr(maps[0], head.laterals[0]) + resize(p3, maps[0])
    levels = [cbr(p, out) for p, out in zip((p2, p3, p4), head.outputs, strict=True)]
    levels = [levels[0], *(resize(level, p2) for level in (*levels[1:], top))]
    return cbr(torch.cat(levels, 1), head.fusion)


REFERENCES = {"fcn": fcn, "pspnet": pspnet, "deeplabv3": deeplabv3, "upernet": upernet}


def test_every_name_of_the_configuration_has_a_head():
    assert set(get_args(SemanticHead)) == set(HEADS) == set(REFERENCES)


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_a_head_follows_the_specification(name):
    maps = features(dilated=name != "upernet", size=(52, 88) if name == "deeplabv3" else (24, 40))
    head = build(name)
    expected = REFERENCES[name](head, maps)
    torch.testing.assert_close(head(maps), expected, rtol=1e-10, atol=1e-10)
    assert expected.shape[2:] == maps[0 if name == "upernet" else 3].shape[2:]


@pytest.mark.parametrize("name", sorted(REFERENCES))
def test_a_head_leaves_the_features_as_they_are(name):
    maps = features()
    before = [feature.clone() for feature in maps]
    HEADS[name](WIDTHS, 5).double()(maps)
    for feature, kept in zip(maps, before, strict=True):
        assert torch.equal(feature, kept)


@pytest.mark.parametrize("name", ["pspnet", "deeplabv3", "upernet"])
def test_one_image_alone_in_training_is_refused_in_one_line(name):
    head = HEADS[name](WIDTHS, 5).double()
    with pytest.raises(ConfigError, match=r"train\.micro_batch.* got 1 image") as error:
        head(features(batch=1))
    assert "\n" not in str(error.value)
    head.eval()(features(batch=1))


def test_kernels_and_masks_are_those_of_the_classifier():
    config = ModelConfig(task="semantic", channels=32, semantic=SemanticConfig(head="fcn"))
    part = build_semantic_head(config, WIDTHS, 7).double().eval()
    maps = features()
    static = part(maps)
    weight = part.classifier.conv.weight[:, :, 0, 0]
    fused = part.head(maps)
    assert torch.equal(static.stage.kernels[1], weight)
    assert static.stage.kernels.requires_grad
    expected = torch.einsum("nc,bchw->bnhw", weight, fused)
    expected = expected + part.classifier.conv.bias[:, None, None]
    torch.testing.assert_close(static.stage.masks, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(static.features, fused)
    auxiliary = part.auxiliary[1].conv(cbr(maps[2], part.auxiliary[0]))
    torch.testing.assert_close(static.semantic, auxiliary, rtol=1e-10, atol=1e-10)


def test_dropout_spares_features_and_kernels():
    config = ModelConfig(
        task="semantic",
        channels=32,
        semantic=SemanticConfig(head="fcn", dropout=0.9, auxiliary=False),
    )
    part = build_semantic_head(config, WIDTHS, 7).double()
    maps = features()
    first, second = part(maps), part(maps)
    assert torch.equal(first.features, second.features)
    assert torch.equal(first.stage.kernels, second.stage.kernels)
    assert not torch.equal(first.stage.masks, second.stage.masks)
    assert first.semantic is None


R50C = BackboneConfig(name="resnet50c", pretrained=False, frozen_stages=0)
SWIN_T = BackboneConfig(
    name="swin_tiny_patch4_window7_224", pretrained=False, frozen_stages=0, output_norm=True
)
SWIN_L = BackboneConfig(
    name="swin_large_patch4_window7_224", pretrained=False, frozen_stages=0, output_norm=True
)


@pytest.mark.parametrize(
    ("backbone", "channels", "total"),
    [  # KNET_SPEC 9.5, UPerNet; the other heads are in tests/sweeps/test_recipes.py
        (R50C, 256, 45_660_300),
        (SWIN_T, 256, 43_632_614),
        (SWIN_L, 256, 214_722_752),
        (R50C, 512, 79_728_012),
        (SWIN_T, 512, 73_153_766),
        (SWIN_L, 512, 246_971_840),
    ],
)
def test_upernet_has_as_many_parameters_as_published(backbone, channels, total):
    config = ModelConfig(
        task="semantic", backbone=backbone, channels=channels, update_channels=256, grouping="soft"
    )
    with torch.device("meta"):
        model = build_model(Recipe(model=config), [Category(i, str(i)) for i in range(150)])
    assert sum(p.numel() for p in model.parameters()) == total
