"""Trunks and their variants against naive definitions and against timm itself."""

import logging
import math
from functools import partial

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformerBlock, SwinTransformerStage
from torch import nn
from torch.nn import functional as F

from knet_core import BackboneConfig, ConfigError
from knet_core.models.backbones import Backbone
from knet_core.models.deformable import DeformableConv
from knet_core.models.swin import ShiftedWindowStage

SWIN_T = "swin_tiny_patch4_window7_224"


def config(name="test_resnet", **values):
    return BackboneConfig(**{"name": name, "pretrained": False, "frozen_stages": 0, **values})


# Deformable convolution


def naive_deformable(x, weight, offsets, stride, padding, dilation):
    """Sample every tap bilinearly, zero outside; offsets are (dy, dx) per tap, row by row."""
    batch, _, height, width = x.shape
    out_h, out_w = offsets.shape[2:]
    y = x.new_zeros(batch, weight.shape[0], out_h, out_w)

    def at(b, row, column):
        inside = 0 <= row < height and 0 <= column < width
        return x[b, :, row, column] if inside else x.new_zeros(x.shape[1])

    for b in range(batch):
        for i in range(out_h):
            for j in range(out_w):
                for tap in range(9):
                    row = i * stride - padding + tap // 3 * dilation
                    column = j * stride - padding + tap % 3 * dilation
                    row += offsets[b, 2 * tap, i, j].item()
                    column += offsets[b, 2 * tap + 1, i, j].item()
                    top, left = math.floor(row), math.floor(column)
                    value = x.new_zeros(x.shape[1])
                    for r, share_r in ((top, 1 - (row - top)), (top + 1, row - top)):
                        for c, share_c in ((left, 1 - (column - left)), (left + 1, column - left)):
                            value = value + share_r * share_c * at(b, r, c)
                    y[b, :, i, j] += weight[:, :, tap // 3, tap % 3] @ value
    return y


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_deformable_convolution_samples_where_its_offsets_point(stride, dilation):
    torch.manual_seed(0)
    plain = nn.Conv2d(
        3, 4, 3, stride=stride, padding=dilation, dilation=dilation, bias=False
    ).double()
    conv = DeformableConv(plain).double()
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(conv(x), plain(x), rtol=1e-10, atol=1e-10)  # no offsets yet
    nn.init.normal_(conv.conv_offset.weight, std=0.3)
    nn.init.normal_(conv.conv_offset.bias, std=0.7)
    offsets = F.conv2d(
        x,
        conv.conv_offset.weight,
        conv.conv_offset.bias,
        stride=stride,
        padding=dilation,
        dilation=dilation,
    )
    expected = naive_deformable(x, plain.weight, offsets, stride, dilation, dilation)
    torch.testing.assert_close(conv(x), expected, rtol=1e-9, atol=1e-9)


def test_deformable_resnet_starts_as_the_plain_one_in_the_last_three_stages():
    torch.manual_seed(0)
    plain = Backbone(config("resnet26")).eval()
    torch.manual_seed(0)
    deformable = Backbone(config("resnet26", deformable=True)).eval()
    names = {name for name, m in deformable.named_modules() if isinstance(m, DeformableConv)}
    assert names == {f"trunk.layer{s}.{b}.conv2" for s in (2, 3, 4) for b in (0, 1)}
    state = deformable.state_dict()
    assert state["trunk.layer2.0.conv2.conv_offset.weight"].shape == (18, 128, 3, 3)
    assert state["trunk.layer2.0.conv2.conv_offset.bias"].shape == (18,)
    assert set(plain.state_dict()) < set(state)
    deformable.load_state_dict(plain.state_dict(), strict=False)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for ours, theirs in zip(deformable(images), plain(images), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_deformable_convolutions_learn_their_offsets():
    backbone = Backbone(config("test_resnet", deformable=True))
    nn.init.ones_(backbone.trunk.layer3[0].bn3.weight)  # timm starts residuals at zero
    sum(feature.square().sum() for feature in backbone(torch.randn(2, 3, 64, 64))).backward()
    (conv,) = (m for m in backbone.modules() if isinstance(m, DeformableConv))
    assert conv.conv_offset.weight.grad.abs().sum() > 0
    assert conv.weight.grad.abs().sum() > 0


def test_deformable_convolutions_run_under_autocast():
    torch.manual_seed(0)
    backbone = Backbone(config(deformable=True)).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = backbone(images)
        with torch.autocast("cpu", torch.bfloat16):
            maps = backbone(images)
    for m, full in zip(maps, expected, strict=True):
        assert m.isfinite().all()
        torch.testing.assert_close(m.float(), full, rtol=0.05, atol=0.05)  # 8 bits of mantissa


def test_a_model_without_bottlenecks_cannot_be_made_deformable():
    with pytest.raises(ConfigError, match=r"model\.backbone\.deformable: 'resnet10t'"):
        Backbone(config("resnet10t", deformable=True))


# Output stride


@pytest.mark.parametrize("name", ["resnet50c", "test_resnet"])
def test_output_stride_8_keeps_the_last_maps_fine(name):
    with torch.device("meta"):
        backbone = Backbone(config(name, output_stride=8))
        shapes = [tuple(m.shape[2:]) for m in backbone(torch.empty(1, 3, 64, 96))]
    assert shapes == [(16, 24), (8, 12), (8, 12), (8, 12)]


def test_a_dilated_stage_begins_with_half_its_dilation():
    with torch.device("meta"):
        trunk = Backbone(config("resnet50c", output_stride=8)).trunk
    dilations = {
        stage: [block.conv2.dilation[0] for block in trunk[stage]]
        for stage in ("layer2", "layer3", "layer4")
    }
    assert dilations == {"layer2": [1] * 4, "layer3": [1] + [2] * 5, "layer4": [2, 4, 4]}
    strides = [trunk[f"layer{s}"][0].conv2.stride[0] for s in (1, 2, 3, 4)]
    assert strides == [1, 2, 1, 1]


# Swin


def naive_block(block, x, window, shift):
    """Pad, then roll; attend place by place to the places of one window and one region."""
    x0, x = x, block.norm1(x)
    batch, height, width, dim = x.shape
    rows, columns = (math.ceil(size / window) * window for size in (height, width))
    padded = x.new_zeros(batch, rows, columns, dim)
    padded[:, :height, :width] = x
    out = torch.zeros_like(padded)
    heads = block.attn.num_heads
    qkv = padded @ block.attn.qkv.weight.T + block.attn.qkv.bias
    q, k, v = qkv.unflatten(-1, (3, heads, dim // heads)).unbind(3)
    table = block.attn.relative_position_bias_table

    def region(place, size):
        return 0 if place < size - window else 1 if place < size - shift else 2

    groups = {}
    for i in range(rows):  # of the rolled grid
        for j in range(columns):
            key = (i // window, j // window)
            if shift:
                key += (region(i, rows), region(j, columns))
            groups.setdefault(key, []).append((i, j))
    for places in groups.values():
        i, j = torch.tensor(places).T
        source = ((i + shift) % rows, (j + shift) % columns)
        down = i[:, None] - i[None, :] + window - 1
        right = j[:, None] - j[None, :] + window - 1
        bias = table[down * (2 * window - 1) + right].permute(2, 0, 1)
        qs, ks, vs = (t[:, source[0], source[1]].transpose(1, 2) for t in (q, k, v))
        attention = (qs @ ks.transpose(2, 3) * (dim // heads) ** -0.5 + bias).softmax(-1)
        result = (attention @ vs).transpose(1, 2).flatten(2)
        out[:, source[0], source[1]] = result @ block.attn.proj.weight.T + block.attn.proj.bias
    x = x0 + out[:, :height, :width]
    return x + block.mlp(block.norm2(x))


def swin_stage(dim=8, window=7):
    torch.manual_seed(0)
    stage = SwinTransformerStage(
        dim=dim,
        out_dim=dim,
        input_resolution=(14, 14),
        depth=2,
        downsample=False,
        num_heads=2,
        window_size=window,
        always_partition=True,
        dynamic_mask=True,
    )
    for parameter in stage.parameters():
        nn.init.normal_(parameter, std=0.4)
    return stage.double().eval()


@pytest.mark.parametrize("size", [(14, 21), (16, 10), (3, 7), (7, 7), (20, 1)])
def test_windows_are_cut_from_the_padded_and_then_rolled_map(size):
    stage = swin_stage()
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    expected = naive_block(stage.blocks[1], naive_block(stage.blocks[0], x, 7, 0), 7, 3)
    # Places apart get -100 before the softmax, which leaves shares of about exp(-100).
    torch.testing.assert_close(ShiftedWindowStage(stage)(x), expected, rtol=1e-9, atol=1e-9)


def test_shifted_windows_are_timms_where_nothing_is_padded_and_only_there():
    stage = swin_stage()
    ours = ShiftedWindowStage(stage)
    fitting, other = (
        torch.randn(1, *size, 8, dtype=torch.float64) for size in ((14, 21), (16, 10))
    )
    torch.testing.assert_close(ours(fitting), stage(fitting), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(ours(other), stage(other), rtol=1e-3, atol=1e-3)


def test_swin_tiny_equals_timms_at_its_own_size_before_the_last_stage():
    torch.manual_seed(0)
    backbone = Backbone(config(SWIN_T)).eval()
    theirs = timm.create_model(SWIN_T, features_only=True, pretrained=False).eval()
    theirs.load_state_dict(backbone.trunk.state_dict())
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        ours, expected = backbone(images), [m.permute(0, 3, 1, 2) for m in theirs(images)]
    # In the last, 7x7 map timm shifts no windows; the published code does.
    for mine, other in zip(ours[:3], expected[:3], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    assert [tuple(m.shape) for m in ours] == [
        (1, 96, 56, 56),
        (1, 192, 28, 28),
        (1, 384, 14, 14),
        (1, 768, 7, 7),
    ]


def test_swin_takes_any_size_and_normalises_its_outputs():
    torch.manual_seed(0)
    backbone = Backbone(config(SWIN_T, output_norm=True, drop_path=0.3)).eval()
    images = torch.randn(1, 3, 70, 99)
    with torch.no_grad():
        maps, raw = backbone(images), backbone.trunk(images)
    assert [tuple(m.shape[2:]) for m in maps] == [(18, 25), (9, 13), (5, 7), (3, 4)]
    for m, r in zip(maps, raw, strict=True):
        r = r.permute(0, 3, 1, 2)
        centred = r - r.mean(1, keepdim=True)
        expected = centred / (r.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        torch.testing.assert_close(m, expected, rtol=1e-4, atol=1e-4)


def test_swin_drops_paths_as_told_and_not_as_timm_would():
    with torch.device("meta"):
        none, some = (Backbone(config(SWIN_T, drop_path=rate)) for rate in (0.0, 0.3))
    rates = [
        block.drop_path1.drop_prob if hasattr(block.drop_path1, "drop_prob") else 0.0
        for block in some.modules()
        if isinstance(block, SwinTransformerBlock)
    ]
    assert rates == pytest.approx([0.3 * i / 11 for i in range(12)])
    assert not any(type(m).__name__ == "DropPath" for m in none.modules())


def test_frozen_stages_of_a_swin_do_not_train():
    with torch.device("meta"):
        trunk = Backbone(config(SWIN_T, frozen_stages=2)).trunk
    frozen = {name: not any(p.requires_grad for p in m.parameters()) for name, m in trunk.items()}
    assert frozen == {
        "patch_embed": True,
        "layers_0": True,
        "layers_1": True,
        "layers_2": False,
        "layers_3": False,
    }


def test_a_deep_stem_is_frozen_whole_and_keeps_its_statistics():
    with torch.device("meta"):
        trunk = Backbone(config("resnet50c", frozen_stages=1)).train().trunk
    assert not any(
        p.requires_grad for name in ("conv1", "bn1", "layer1") for p in trunk[name].parameters()
    )
    assert all(p.requires_grad for p in trunk["layer2"].parameters())
    assert not any(m.training for m in trunk.modules() if isinstance(m, nn.BatchNorm2d))


def test_output_norms_of_a_convolutional_trunk_act_on_channels():
    torch.manual_seed(0)
    backbone = Backbone(config(output_norm=True)).eval()
    maps = backbone(torch.randn(1, 3, 64, 64))
    for m in maps:
        torch.testing.assert_close(m.mean(1), torch.zeros_like(m[:, 0]), rtol=0, atol=1e-5)


def test_a_hierarchical_model_of_another_family_serves_too():
    backbone = Backbone(config("test_convnext")).eval()
    maps = backbone(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (width, 64 // s, 96 // s)
        for width, s in zip(backbone.channels, (4, 8, 16, 32), strict=True)
    ]


# Weights from a file


def save(model, file, wrap=None, **more):
    weights = {**model.state_dict(), **more}
    torch.save(weights if wrap is None else {wrap: weights}, file)
    return file


@pytest.mark.parametrize("deformable", [False, True])
def test_a_classifiers_weights_load_and_its_last_layer_is_left_over(tmp_path, deformable):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", pretrained=False)
    file = save(model, tmp_path / "weights.pth")
    backbone = Backbone(config(checkpoint=str(file), deformable=deformable))
    for name, weight in model.state_dict().items():
        if not name.startswith("fc."):
            assert torch.equal(backbone.trunk.state_dict()[name], weight)


def test_offsets_of_a_file_load_too(tmp_path):
    torch.manual_seed(0)
    source = Backbone(config(deformable=True)).trunk
    nn.init.normal_(source.layer3[0].conv2.conv_offset.weight)
    file = save(source, tmp_path / "weights.pth")
    trunk = Backbone(config(checkpoint=str(file), deformable=True)).trunk
    loaded = trunk.layer3[0].conv2.conv_offset.weight
    assert torch.equal(loaded, source.layer3[0].conv2.conv_offset.weight)


@pytest.mark.parametrize("merging_first", [False, True], ids=["timm", "authors"])
def test_weights_of_a_swin_classifier_load(tmp_path, merging_first):
    torch.manual_seed(0)
    model = timm.create_model(SWIN_T, pretrained=False)
    weights = model.state_dict()
    if merging_first:  # the authors' file: a merging layer belongs to the stage before it
        weights = {
            name.replace(f"layers.{name[7]}.", f"layers.{int(name[7]) - 1}.")
            if ".downsample." in name
            else name: weight
            for name, weight in weights.items()
        }
        weights["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
    torch.save({"model": weights}, tmp_path / "swin.pth")
    backbone = Backbone(config(SWIN_T, checkpoint=str(tmp_path / "swin.pth")))
    expected = model.state_dict()
    for name, weight in backbone.trunk.state_dict().items():
        assert torch.equal(weight, expected[name.replace("layers_", "layers.")]), name


def test_a_file_of_another_model_is_one_line(tmp_path):
    weights = timm.create_model("test_resnet", pretrained=False).state_dict()
    torch.save({k: v for k, v in weights.items() if "layer4" not in k}, tmp_path / "part.pth")
    torch.save({**weights, "conv1.0.weight": torch.zeros(1)}, tmp_path / "shape.pth")
    torch.save([1], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("no weights")
    torch.save(weights, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:-1000])
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 99)
    for name, message in (
        ("part.pth", r"lacks \d+ of the backbone's weights, first 'layer4"),
        ("shape.pth", r"another model: .*conv1\.0\.weight"),
        ("list.pth", "holds a list"),
        ("text.pth", "text.pth is cut short, damaged or holds more than weights; expected"),
        ("cut.pth", "cut.pth is cut short"),
        ("cut.safetensors", "cut.safetensors is cut short"),
        ("absent.pth", r"cannot read .*absent\.pth \(No such file or directory\)"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            Backbone(config(checkpoint=str(tmp_path / name)))
        assert str(error.value).startswith("model.backbone.checkpoint: ")
        assert "weights_only" not in str(error.value)  # torch's advice to run the file's code
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "resnet500"}, r"model\.backbone\.name: timm cannot build 'resnet500'"),
        ({"name": "vit_tiny_patch16_224"}, "strides"),
        ({"name": SWIN_T, "output_stride": 8}, r"model\.backbone\.output_stride: "),
        ({"name": "swinv2_tiny_window8_256"}, "images of one size only"),
    ],
)
def test_an_impossible_backbone_is_one_line(values, message):
    with pytest.raises(ConfigError, match=message) as error, torch.device("meta"):
        Backbone(config(**values))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "values"),
    [("test_resnet", {"deformable": True}), (SWIN_T, {"output_norm": True})],
    ids=["deformable", "swin"],
)
def test_timms_own_weights_arrive_in_a_converted_model(tmp_path, monkeypatch, name, values):
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False)
    file = save(model, tmp_path / "timm.pth")
    # The published file is read from the disk; everything else is timm's own way.
    create = partial(timm.create_model, pretrained_cfg_overlay={"file": str(file)})
    monkeypatch.setattr(timm, "create_model", create)
    loaded = Backbone(config(name, pretrained=True, **values)).trunk.state_dict()
    expected = {key.replace("layers.", "layers_"): w for key, w in model.state_dict().items()}
    offsets = {key for key in loaded if ".conv_offset." in key}
    assert bool(offsets) == values.get("deformable", False)
    for key in loaded.keys() - offsets:
        assert torch.equal(loaded[key], expected[key]), key


def test_weights_that_cannot_be_fetched_are_one_line(monkeypatch, caplog):
    """And not another line of the hub's client for each time that it tried."""

    def create_model(*args, **options):
        logging.getLogger("huggingface_hub").warning("Retrying in 1s [Retry 1/5].")
        raise OSError("cannot reach the hub\nand much more")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(ConfigError, match=r"no weights for .* \(cannot reach") as error:
        Backbone(config("test_resnet", pretrained=True))
    assert "\n" not in str(error.value)
    assert not caplog.records
