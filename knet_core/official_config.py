"""The configuration of a published model, read from the names and shapes of its weights.

What shapes leave open is set to what was published (KNET_SPEC 1, 6): positional encoding, eight
attention heads, hard groups for instances and panoptic maps, soft ones for classes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from knet_core.config import (
    BackboneConfig,
    DataConfig,
    ModelConfig,
    Recipe,
    SemanticConfig,
    SemanticHead,
    Task,
)
from knet_core.errors import CheckpointError, ConfigError

Shapes = Mapping[str, tuple[int, ...]]

COCO_THINGS = 80
COCO_PANOPTIC_CLASSES = 133
_COCO_THING_GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
"""Ids from 1 to 90 that COCO's 80 things leave out."""
_COCO_STUFF_IDS = (
    *(92, 93, 95, 100, 107, 109, 112, 118, 119, 122, 125, 128, 130, 133, 138, 141, 144, 145),
    *(147, 148, 149, 151, 154, 155, 156, 159, 161, 166, 168, 171, 175, 176, 177, 178, 180, 181),
    *range(184, 201),
)

_RESNETS: Mapping[tuple[int, ...], str] = {(3, 4, 6, 3): "resnet50", (3, 4, 23, 3): "resnet101"}
"""Blocks of each stage, and timm's name."""
_SWINS: Mapping[tuple[int, tuple[int, ...], int], str] = {
    (96, (2, 2, 6, 2), 7): "swin_tiny_patch4_window7_224",
    (96, (2, 2, 18, 2), 7): "swin_small_patch4_window7_224",
    (128, (2, 2, 18, 2), 7): "swin_base_patch4_window7_224",
    (192, (2, 2, 18, 2), 7): "swin_large_patch4_window7_224",
    (192, (2, 2, 18, 2), 12): "swin_large_patch4_window12_384",
}
"""Width, blocks of each stage and window, and timm's name."""

_STATIC = "rpn_head.init_kernels.weight"
_CLASSIFIERS = ("rpn_head.conv_seg.weight", "decode_head.kernel_generate_head.conv_seg.weight")
_UPDATES = ("roi_head.mask_head", "decode_head.kernel_update_head")
_COARSEST = "rpn_head.localization_fpn.convs_all_levels.3.conv0.conv.weight"
_SECOND_BRANCH = "rpn_head.localization_fpn.aux_convs.0.conv.weight"
_OFFSETS = "backbone.layer2.0.conv2.conv_offset.weight"
_OUTPUT_NORM = "backbone.norm3.weight"
_AUXILIARY = "auxiliary_head.conv_seg.weight"
_BACKBONE_MARKS = {"backbone.deformable": _OFFSETS, "backbone.output_norm": _OUTPUT_NORM}
_HEADS: tuple[tuple[str, SemanticHead], ...] = (
    ("fpn_bottleneck", "upernet"),  # before psp_modules, which it has too
    ("psp_modules.0.1", "pspnet"),
    ("aspp_modules.0", "deeplabv3"),
    ("conv_cat", "fcn"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What is known of a published model before it is built."""

    model: ModelConfig
    num_classes: int
    num_things: int
    """Classes that come first and are countable; none in the semantic task."""
    evidence: Mapping[str, str]
    """By key below `model`, the weight whose shape or presence decides it."""


def infer(
    shapes: Shapes, source: str, *, given: ModelConfig | None = None, things: int | None = None
) -> Published:
    """Return the model that weights of these names and shapes belong to.

    Args:
        shapes: By published key.
        source: The file, for messages.
        given: A recipe's model, for what names and shapes leave open.
        things: Countable classes, where neither `given` nor COCO's numbers tell.

    Raises:
        CheckpointError: The keys are not K-Net's, or leave the task or the backbone open.
    """
    classifier = next((key for key in _CLASSIFIERS if key in shapes), None)
    if classifier is None or (classifier == _CLASSIFIERS[0] and _STATIC not in shapes):
        some = ", ".join([*list(shapes)[:2], "..."])
        raise CheckpointError(
            f"{source}: no published K-Net: found {len(shapes)} weights ({some}), expected "
            f"{_STATIC} and {_CLASSIFIERS[0]}, or {_CLASSIFIERS[1]}; use a file that the K-Net "
            f"or the mmsegmentation repository links"
        )
    num_classes, channels = shapes[classifier][:2]
    semantic = classifier == _CLASSIFIERS[1]
    num_things = 0
    if semantic and things is not None:
        raise CheckpointError(f"{source}: --things {things}: a semantic model; leave it out")
    if not semantic:
        num_things = _num_things(num_classes, given, things, f"{source}: {classifier}")
    detection: Task = "panoptic" if num_things < num_classes else "instance"
    values: dict[str, Any] = {"task": "semantic" if semantic else detection, "channels": channels}
    evidence = {"task": classifier, "channels": classifier, **_BACKBONE_MARKS}

    def decide(key: str, value: object, weight: str) -> None:
        values[key] = value
        evidence[key] = weight

    prefix = _UPDATES[semantic]
    first = f"{prefix}.0"
    decide("stages", _count(shapes, prefix), f"{prefix}.*")
    if gate := shapes.get(f"{first}.kernel_update_conv.input_gate.weight"):
        width = None if gate[0] == channels else gate[0]
        decide("update_channels", width, f"{first}.kernel_update_conv.input_gate.weight")
    if hidden := shapes.get(f"{first}.ffn.layers.0.0.weight"):
        decide("ffn_channels", hidden[0], f"{first}.ffn.layers.0.0.weight")
    if values["stages"]:
        for key, weight in (
            ("adaptive_update", f"{first}.kernel_update_conv.dynamic_layer.weight"),
            ("interaction", f"{first}.attention.attn.in_proj_weight"),
        ):
            decide(key, weight in shapes, weight)
    if semantic:
        head, part = _head(shapes, source)
        values["grouping"] = "soft"
        values["semantic"] = SemanticConfig(head=head, auxiliary=_AUXILIARY in shapes)
        evidence |= {"semantic.head": part, "semantic.auxiliary": _AUXILIARY}
    else:
        decide("num_kernels", shapes[_STATIC][0], _STATIC)
        decide("feature_branches", 2 if _SECOND_BRANCH in shapes else 1, _SECOND_BRANCH)
        coarsest = shapes.get(_COARSEST, (channels, channels))
        decide("coordinates", coarsest[1] == channels + 2, _COARSEST)
    name = None if given is None else given.backbone.name
    values["backbone"] = _backbone(shapes, source, name, values.get("semantic"))
    try:
        model = ModelConfig(**values)
    except ConfigError as error:
        raise CheckpointError(f"{source}: {'; '.join(error.problems)}") from error
    return Published(
        model=model, num_classes=num_classes, num_things=num_things, evidence=evidence
    )


def category_ids(num_things: int, num_classes: int) -> tuple[int, ...]:
    """Return the ids of a model's classes in result files: COCO's own, else 1, 2, ..."""
    if num_things == COCO_THINGS and num_classes in (COCO_THINGS, COCO_PANOPTIC_CLASSES):
        things = (number for number in range(1, 91) if number not in _COCO_THING_GAPS)
        return (*things, *_COCO_STUFF_IDS)[:num_classes]
    return tuple(range(1, num_classes + 1))


def published_recipe(model: ModelConfig) -> Recipe:
    """Return the recipe of an imported model: `compat: published`, and its data set's format."""
    if model.task == "semantic":
        data = DataConfig(
            format="ade20k", root="ade/ADEChallengeData2016", short_edge=(512, 512), long_edge=2048
        )
    elif model.task == "panoptic":
        data = DataConfig(format="coco_panoptic")
    else:
        data = DataConfig()
    return Recipe(model=model, data=data, compat="published")


def disagreements(
    published: Published, given: ModelConfig, source: str, shapes: Shapes
) -> list[str]:
    """Return one line for every key that a recipe sets against what the weights say."""
    problems = []
    for key, weight in published.evidence.items():
        theirs, ours = attrgetter(key)(published.model), attrgetter(key)(given)
        if key == "update_channels":
            theirs, ours = theirs or published.model.channels, ours or given.channels
        if theirs != ours:
            shape = f" {shapes[weight]}" if weight in shapes else ""
            problems.append(
                f"model.{key}: the recipe says {ours}, {source} has {theirs} ({weight}{shape}); "
                f"set it to {theirs}"
            )
    return problems


def _num_things(
    num_classes: int, given: ModelConfig | None, things: int | None, where: str
) -> int:
    if things is not None:
        if 1 <= things <= num_classes:
            return things
        raise CheckpointError(
            f"{where} has {num_classes} classes, --things is {things}; expected 1 to {num_classes}"
        )
    if given is not None and given.task == "instance":
        return num_classes
    if num_classes in (COCO_THINGS, COCO_PANOPTIC_CLASSES):
        return COCO_THINGS
    raise CheckpointError(
        f"{where} has {num_classes} classes, expected COCO's {COCO_THINGS} (instance) or "
        f"{COCO_PANOPTIC_CLASSES} (panoptic); say with --things how many of them are things"
    )


def _head(shapes: Shapes, source: str) -> tuple[SemanticHead, str]:
    """Return the kind of a semantic model's dense part, and the weight that tells."""
    prefix = "decode_head.kernel_generate_head"
    for part, head in _HEADS:
        weight = f"{prefix}.{part}.conv.weight"
        if weight in shapes:
            return head, weight
    parts = ", ".join(f"{part} ({head})" for part, head in _HEADS)
    raise CheckpointError(f"{source}: {prefix} is of no known kind; expected one with {parts}")


def _backbone(
    shapes: Shapes, source: str, given: str | None, semantic: SemanticConfig | None
) -> BackboneConfig:
    swin = any(key.startswith("backbone.patch_embed.") for key in shapes)
    name = given or (_swin_name(shapes) if swin else _resnet_name(shapes))
    if name is None:
        raise CheckpointError(
            f"{source}: backbone of no known size; name its timm model in a recipe "
            f"(model.backbone.name) and give it with --recipe"
        )
    dense = semantic is not None and semantic.head != "upernet"
    fixed = semantic is None and not swin
    return BackboneConfig(
        name=name,
        pretrained=False,
        frozen_stages=1 if fixed else 0,
        norm_eval=fixed,
        output_stride=8 if dense and not swin else 32,
        deformable=_OFFSETS in shapes,
        output_norm=_OUTPUT_NORM in shapes,
        drop_path=(0.2 if semantic is None else 0.3) if swin else 0.0,
    )


def _resnet_name(shapes: Shapes) -> str | None:
    blocks = tuple(_count(shapes, f"backbone.layer{stage}") for stage in range(1, 5))
    name = _RESNETS.get(blocks)
    deep_stem = "backbone.stem.0.weight" in shapes
    return f"{name}c" if name and deep_stem else name


def _swin_name(shapes: Shapes) -> str | None:
    stages = "stages" if any(key.startswith("backbone.stages.") for key in shapes) else "layers"
    blocks = tuple(_count(shapes, f"backbone.{stages}.{stage}.blocks") for stage in range(4))
    tables = [shape for key, shape in shapes.items() if key.endswith("position_bias_table")]
    norms = shapes.get("backbone.patch_embed.norm.weight")
    if not tables or norms is None:
        return None
    return _SWINS.get((norms[0], blocks, window_of(tables[0])))


def window_of(table: Sequence[int]) -> int:
    """Return the window of a Swin whose bias table has this shape: (2w - 1)**2 rows."""
    return (math.isqrt(table[0]) + 1) // 2


def _count(shapes: Shapes, prefix: str) -> int:
    """Return how many numbered children a module has."""
    return len(
        {key[len(prefix) + 1 :].split(".")[0] for key in shapes if key.startswith(f"{prefix}.")}
    )
