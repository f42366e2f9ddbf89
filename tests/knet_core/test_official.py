"""Published checkpoints: read without running their code, every key placed or named."""

import dataclasses
import json
import os
import pickle
import re

import numpy as np
import pytest
import timm
import torch
from timm.models.swin_transformer import PatchMerging, get_relative_position_index
from torch.nn import functional as F

from knet_core import (
    BackboneConfig,
    CheckpointError,
    ConfigError,
    ModelConfig,
    Recipe,
    build_dataset,
    fit,
    import_official,
    load_model,
    load_recipe,
    read_state,
)
from knet_core.data.source import Category
from knet_core.models.knet import build_model
from knet_core.official import PublishedFile, fit_weights, left_out
from knet_core.official_config import category_ids, infer, published_recipe
from knet_core.official_names import constants, name_here, to_timm_merging, window_index

DETECTION = {"stages": 3, "channels": 256, "num_kernels": 100, "grouping": "hard"}
SEMANTIC = {"stages": 3, "task": "semantic", "grouping": "soft"}
WIDE = {**SEMANTIC, "channels": 512, "update_channels": 256}
SWIN_L = "swin_large_patch4_window7_224"
LISTINGS = {
    "instance_r50": ({**DETECTION, "task": "instance"}, "resnet50", 37_257_024),
    "instance_r101": ({**DETECTION, "task": "instance"}, "resnet101", 56_249_152),
    "panoptic_r50": ({**DETECTION, "task": "panoptic"}, "resnet50", 37_311_508),
    "panoptic_r101": ({**DETECTION, "task": "panoptic"}, "resnet101", 56_303_636),
    "panoptic_r101dcn": ({**DETECTION, "task": "panoptic"}, "resnet101", 57_589_808),
    "panoptic_swinl": ({**DETECTION, "task": "panoptic"}, SWIN_L, 208_781_224),
    "seg_fcn_r50": (WIDE, "resnet50c", 62_810_508),
    "seg_psp_r50": (WIDE, "resnet50c", 62_288_268),
    "seg_dlv3_r50": (WIDE, "resnet50c", 81_425_804),
    "seg_uper_r50": ({**SEMANTIC, "channels": 256}, "resnet50c", 45_660_300),
    "seg_uper_swint": ({**SEMANTIC, "channels": 256}, "swin_tiny_patch4_window7_224", 43_632_614),
    "seg_uper_swinl": ({**SEMANTIC, "channels": 256}, SWIN_L, 214_722_752),
}
"""What follows from each listing: switches of the model, backbone, trainable parameters (9.5)."""

HEADS = {"fcn": "fcn", "psp": "pspnet", "dlv3": "deeplabv3", "uper": "upernet"}


@pytest.fixture
def listing(real_data):
    """Return a function that reads a listing: (total parameters, {key: (kind, shape)})."""

    def read(name):
        file = real_data.parent / "specs" / "checkpoint_keys" / f"{name}.txt"
        if not file.is_file():
            pytest.skip(f"no listing {file}")
        header, *lines = file.read_text().splitlines()
        entries = {}
        for line in lines:
            kind, key, shape = re.fullmatch(r"([PB]) (\S+) \((.*)\)", line).groups()
            entries[key] = (kind, tuple(int(side) for side in re.findall(r"\d+", shape)))
        return int(re.search(r"([\d,]+) parameters", header)[1].replace(",", "")), entries

    return read


def on_meta(model_config, num_things, num_classes):
    kinds = [Category(i, str(i), i < num_things) for i in range(num_classes)]
    with torch.device("meta"):
        return build_model(published_recipe(model_config), kinds)


@pytest.mark.parametrize("name", LISTINGS)
def test_every_key_of_a_published_model_finds_its_place(listing, name):
    total, entries = listing(name)
    switches, backbone, num_trainable = LISTINGS[name]
    shapes = {key: shape for key, (_, shape) in entries.items()}
    published = infer(shapes, name)
    for switch, value in switches.items():
        assert getattr(published.model, switch) == value, switch
    assert published.model.backbone.name == backbone
    assert published.model.backbone.deformable == name.endswith("dcn")
    assert published.model.backbone.output_norm == ("swin" in name)
    dilated = name in ("seg_fcn_r50", "seg_psp_r50", "seg_dlv3_r50")
    assert published.model.backbone.output_stride == (8 if dilated else 32)
    if name.startswith("seg"):
        assert published.model.semantic.head == HEADS[name.split("_")[1]]
        assert (published.num_classes, published.model.semantic.auxiliary) == (150, True)
    else:
        classes = {"instance": (80, 80), "panoptic": (133, 80)}[published.model.task]
        assert (published.num_classes, published.num_things) == classes
        assert published.model.positional_encoding
        assert not published.model.coordinates

    model = on_meta(published.model, published.num_things, published.num_classes)
    weights = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    fitted = fit_weights(model, weights, name)
    assert fitted.keys() == model.state_dict().keys()
    assert len(fitted) + len(constants(shapes)) == len(entries)
    parameters = dict(model.named_parameters())
    assert {name_here(key) for key, (kind, _) in entries.items() if kind == "P"} == set(parameters)
    assert sum(p.numel() for p in parameters.values()) == total
    assert sum(p.numel() for p in parameters.values() if p.requires_grad) == num_trainable


@pytest.mark.parametrize("name", ["instance_r50", "seg_uper_r50"])
def test_widths_and_counts_follow_from_the_shapes(listing, name):
    """256 kernels and coordinates; the later port's UPerNet of 512 channels."""
    _, entries = listing(name)
    shapes = {key: shape for key, (_, shape) in entries.items()}
    if name == "instance_r50":
        shapes["rpn_head.init_kernels.weight"] = (256, 256, 1, 1)
        key = "rpn_head.localization_fpn.convs_all_levels.3.conv0.conv.weight"
        shapes[key] = (256, 258, 3, 3)
        shapes = {key: shape for key, shape in shapes.items() if ".mask_head.2." not in key}
        model = infer(shapes, name).model
        assert (model.num_kernels, model.coordinates, model.stages) == (256, True, 2)
        return
    # Twice as wide, but for the backbone, the updater and the auxiliary head.
    wide_out, wide_in = {256: 512, 768: 1536}, {256: 512, 1024: 2048, 3072: 4096}
    for key, shape in shapes.items():
        if key.startswith("decode_head.") and "kernel_update_conv" not in key:
            out, inputs = shape[:1], shape[1:2]
            if "lateral_convs" not in key:
                inputs = tuple(wide_in.get(side, side) for side in inputs)
            out = tuple(wide_out.get(side, side) for side in out)
            shapes[key] = (*out, *inputs, *shape[2:])
    published = infer(shapes, name)
    assert (published.model.channels, published.model.update_channels) == (512, 256)
    model = on_meta(published.model, 150, 150)
    fit_weights(model, {k: torch.empty(s, device="meta") for k, s in shapes.items()}, name)
    assert sum(p.numel() for p in model.parameters()) == 79_728_012


def test_patch_merging_reads_the_same_pixels_in_timms_order():
    """mmdetection's Swin unfolds (channel, window); the weights must meet the same values."""
    generator = torch.Generator().manual_seed(0)
    norm, shift = (torch.randn(4 * 6, generator=generator) for _ in range(2))
    reduction = torch.randn(12, 4 * 6, generator=generator)
    features = torch.randn(2, 6, 8, 10, generator=generator)
    unfolded = F.unfold(features, 2, stride=2).transpose(1, 2)
    theirs = F.layer_norm(unfolded, (24,), norm, shift) @ reduction.T

    merging = PatchMerging(6, 12)
    prefix = "backbone.stages.0.downsample"
    merging.load_state_dict(
        {
            "norm.weight": to_timm_merging(f"{prefix}.norm.weight", norm),
            "norm.bias": to_timm_merging(f"{prefix}.norm.bias", shift),
            "reduction.weight": to_timm_merging(f"{prefix}.reduction.weight", reduction),
        }
    )
    ours = merging(features.permute(0, 2, 3, 1)).flatten(1, 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_swin_authors_own_names_lead_to_the_same_places():
    pairs = {
        "patch_embed.proj.weight": "patch_embed.projection.weight",
        "layers.1.blocks.1.attn.qkv.bias": "stages.1.blocks.1.attn.w_msa.qkv.bias",
        "layers.0.blocks.0.attn.relative_position_bias_table": (
            "stages.0.blocks.0.attn.w_msa.relative_position_bias_table"
        ),
        "layers.2.blocks.7.mlp.fc1.weight": "stages.2.blocks.7.ffn.layers.0.0.weight",
        "layers.2.blocks.7.mlp.fc2.weight": "stages.2.blocks.7.ffn.layers.1.weight",
        "layers.0.downsample.norm.bias": "stages.0.downsample.norm.bias",
    }
    for theirs, mmdetections in pairs.items():
        here = name_here(f"backbone.{theirs}")
        assert here is not None
        assert here == name_here(f"backbone.{mmdetections}")
    merged = torch.randn(4, 8)
    assert torch.equal(
        to_timm_merging("backbone.layers.0.downsample.reduction.weight", merged), merged
    )
    trunk = timm.create_model("swin_tiny_patch4_window7_224", features_only=True)
    assert name_here("backbone.layers.0.downsample.norm.bias") in {
        f"backbone.trunk.{name}" for name in trunk.state_dict()
    }


def test_the_index_of_a_window_is_timms():
    assert torch.equal(window_index(7), get_relative_position_index(7, 7))


# ---- Whole files, with a tiny model that only a recipe can describe.


@pytest.fixture
def recipe():
    backbone = BackboneConfig(name="test_resnet", pretrained=False, frozen_stages=0)
    model = ModelConfig(
        backbone=backbone, channels=32, num_kernels=10, stages=2, num_heads=4, ffn_channels=64
    )
    return Recipe(model=model)


@pytest.fixture
def write(tmp_path, published_weights):
    """Return a function that writes a published file, after changes, and gives its path."""

    def write(change=lambda weights: None, **entries):
        change(published_weights)
        content = {"meta": {}, "state_dict": published_weights, **entries}
        torch.save(content, tmp_path / "published.pth")
        return tmp_path / "published.pth"

    return write


def refusal(file, out, recipe=None, **options):
    """Return the one line that an import ends in."""
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        import_official(file, out, recipe, **options)
    assert len(str(caught.value).splitlines()) == 1
    assert not out.exists()
    return str(caught.value)


def test_an_import_is_a_checkpoint_that_predicts(write, recipe, tmp_path):
    imported = import_official(write(), tmp_path / "out", recipe)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {
        *("model.safetensors", "trainer.pt", "state.json", "recipe.yaml", "manifest.json")
    }
    written = load_recipe(tmp_path / "out")
    assert (written.compat, written.model.backbone.pretrained) == ("published", False)
    assert written.model == recipe.model
    state = read_state(tmp_path / "out")
    assert (state.step, state.metrics, state.evaluations) == (0, {}, ())
    assert state.num_parameters == imported.num_trainable == imported.num_parameters
    model = load_model(tmp_path / "out")
    assert sum(p.numel() for p in model.parameters()) == imported.num_parameters
    assert imported.num_keys == len(model.state_dict())
    output = model(torch.zeros(1, 3, 64, 64))
    assert output.stages[-1].class_logits.shape == (1, 10, 2)
    assert output.stages[-1].masks.isfinite().all()


def test_a_bare_state_dict_is_enough(published_weights, recipe, tmp_path):
    torch.save(published_weights, tmp_path / "bare.pth")
    assert import_official(tmp_path / "bare.pth", tmp_path / "out", recipe).num_keys > 100


def test_classes_are_named_by_the_recipe_or_the_file_or_numbered(write, recipe, tmp_path):
    named = write(meta={"CLASSES": [" cat", "dog"], "epoch": 12})
    imported = import_official(named, tmp_path / "named", recipe)
    assert [category.name for category in imported.categories] == ["cat", "dog"]
    assert imported.notes == ()
    odd = write(meta={"CLASSES": ("cat", "dog", "cow")})
    imported = import_official(odd, tmp_path / "odd", recipe)
    assert [category.name for category in imported.categories] == ["class_0", "class_1"]
    assert "3 names for 2 classes" in imported.notes[0]
    short = dataclasses.replace(recipe.data, classes=("one",))
    line = refusal(odd, tmp_path / "short", dataclasses.replace(recipe, data=short))
    assert line.startswith("data.classes: the recipe has 1 names")
    data = dataclasses.replace(recipe.data, classes=("one", "two"))
    imported = import_official(odd, tmp_path / "given", dataclasses.replace(recipe, data=data))
    assert [category.name for category in imported.categories] == ["one", "two"]


def test_things_come_first_and_stuff_follows(write, recipe, tmp_path):
    panoptic = dataclasses.replace(recipe.model, task="panoptic")
    imported = import_official(
        write(), tmp_path / "out", dataclasses.replace(recipe, model=panoptic), things=1
    )
    assert [category.isthing for category in imported.categories] == [True, False]
    assert load_model(tmp_path / "out")(torch.zeros(1, 3, 64, 64)).stages[0].masks.shape[1] == 11


@pytest.mark.parametrize("num_classes", [80, 133])
def test_ids_of_cocos_classes_are_cocos_own(real_data, num_classes):
    """Result files of an import name categories as the official server does."""
    path = real_data / "coco_panoptic" / "annotations" / "panoptic_val2017.json"
    categories = json.loads(path.read_text())["categories"]
    expected = [c["id"] for c in categories if c["isthing"] or num_classes == 133]
    assert list(category_ids(80, num_classes)) == expected
    assert category_ids(1, 3) == (1, 2, 3)


def test_what_is_left_out_is_said(write, recipe, tmp_path):
    file = write(optimizer={"state": {}, "param_groups": []}, ema=1)
    (_, note) = import_official(file, tmp_path / "out", recipe).notes
    assert "optimizer, ema" in note


def test_an_index_that_no_window_implies_is_told():
    """It decides where Swin's position biases go, and stays out of the import."""
    key = "backbone.stages.0.blocks.0.attn.w_msa.relative_position_index"
    table = "backbone.stages.0.blocks.0.attn.w_msa.relative_position_bias_table"
    assert constants({key: 0, table: 0}) == [key]
    assert constants({key: 0}) == []
    weights = {key: window_index(7), table: torch.zeros(169, 3)}
    content = PublishedFile(weights=weights, class_names=None, other=())
    assert len(list(left_out(content))) == 1
    weights[key] = weights[key].flip(0)
    assert key in list(left_out(content))[1]


@pytest.mark.parametrize("core", [b"numpy._core", b"numpy.core"])
def test_numbers_of_either_numpy_are_read(recipe, published_weights, tmp_path, core):
    """And files of the format before zip archives."""
    meta = {"best": np.float64(0.5), "seed": np.int64(3), "PALETTE": np.zeros((2, 3), np.uint8)}
    file = tmp_path / "old.pth"
    content = {"meta": meta, "state_dict": published_weights}
    torch.save(content, file, _use_new_zipfile_serialization=False)
    file.write_bytes(file.read_bytes().replace(b"numpy._core", core))
    import_official(file, tmp_path / "out", recipe)


class Harmful:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_no_code_of_a_file_runs_and_the_refused_name_is_told(write, recipe, tmp_path):
    file = write(meta={"hook": Harmful(tmp_path / "harm")})
    line = refusal(file, tmp_path / "out", recipe)
    assert "mkdir" in line
    assert str(file) in line
    assert not (tmp_path / "harm").exists()


def test_a_pickle_that_torch_did_not_write_is_one_line(tmp_path, recwarn):
    file = tmp_path / "plain.pth"
    file.write_bytes(pickle.dumps({"state_dict": Harmful(tmp_path / "harm")}, protocol=4))
    assert str(file) in refusal(file, tmp_path / "out")
    assert not (tmp_path / "harm").exists()
    assert not recwarn.list


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_cut_short_is_one_line(tmp_path, zipped):
    """Wherever it ends, in either of torch's formats."""
    file = tmp_path / "published.pth"
    weights = {f"{index}.weight": torch.zeros(9) for index in range(20)}
    torch.save({"state_dict": weights}, file, _use_new_zipfile_serialization=zipped)
    content = file.read_bytes()
    for length in range(0, len(content), 97):
        file.write_bytes(content[:length])
        assert str(file) in refusal(file, tmp_path / "out")
    assert "cut short or damaged" in refusal(file, tmp_path / "out")


def test_a_missing_file_is_one_line(recipe, tmp_path):
    assert "cannot read" in refusal(tmp_path / "none.pth", tmp_path / "out", recipe)


def test_other_content_is_one_line(recipe, tmp_path):
    file = tmp_path / "other.pth"
    torch.save({"state_dict": {"fc.weight": torch.zeros(2, 2)}}, file)
    assert "no published K-Net" in refusal(file, tmp_path / "out")
    torch.save([1, 2], file)
    assert "list" in refusal(file, tmp_path / "out")
    torch.save({"state_dict": {"fc.weight": 3}}, file)
    assert "fc.weight" in refusal(file, tmp_path / "out")


def test_weights_that_are_no_numbers_are_named(write, recipe, tmp_path):
    def spoil(weights):
        weights["neck.fpn_convs.0.conv.bias"].view(-1)[0] = float("nan")

    line = refusal(write(spoil), tmp_path / "out", recipe)
    assert "NaN or infinity in neck.fpn_convs.0.conv.bias;" in line


def test_keys_without_a_place_missing_and_misshapen_are_named(write, recipe, tmp_path):
    def spoil(weights):
        weights["roi_head.bbox_head.fc.weight"] = torch.zeros(1)
        del weights["neck.fpn_convs.0.conv.bias"]
        weights["roi_head.mask_head.1.fc_mask.weight"] = torch.zeros(16, 32)

    line = refusal(write(spoil), tmp_path / "out", recipe)
    assert "roi_head.bbox_head.fc.weight" in line
    assert "static.fpn.outputs.0.bias is missing" in line
    assert "roi_head.mask_head.1.fc_mask.weight is (16, 32)" in line


def test_a_recipe_of_another_model_is_refused_by_key_and_value(write, recipe, tmp_path):
    other = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, num_kernels=12))
    line = refusal(write(), tmp_path / "out", other)
    assert "model.num_kernels" in line
    assert "12" in line
    assert "(10, 32, 1, 1)" in line


def test_an_unknown_backbone_or_split_of_classes_asks_for_help(write, tmp_path):
    file = write()
    assert "--things" in refusal(file, tmp_path / "out")
    assert "--recipe" in refusal(file, tmp_path / "out", things=2)
    assert "expected 1 to 2" in refusal(file, tmp_path / "out", things=3)


def test_nothing_is_overwritten(write, recipe, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(CheckpointError, match="exists"):
        import_official(write(), tmp_path / "out", recipe)
    assert (tmp_path / "out" / "mine").exists()


def test_a_run_does_not_resume_from_an_import(write, tiny_recipe, tmp_path):
    """Everything else agrees, so only the missing optimizer stops it."""
    backbone = BackboneConfig(name="test_resnet", pretrained=False, frozen_stages=0)
    recipe = tiny_recipe(model={"ffn_channels": 64, "backbone": backbone})
    recipe = dataclasses.replace(recipe, compat="published")
    names = [category.name for category in build_dataset(recipe.data, "train", seed=0).categories]

    def widen(weights):
        for key, weight in weights.items():
            if "conv_seg" in key or "fc_cls" in key:
                weights[key] = weight[:1].repeat(len(names), *[1] * (weight.dim() - 1))

    file = write(widen, meta={"CLASSES": names})
    import_official(file, tmp_path / "out", recipe)
    with pytest.raises(CheckpointError, match=r"imported from published\.pth"):
        fit(recipe, output_dir=tmp_path / "run", resume_from=tmp_path / "out")
