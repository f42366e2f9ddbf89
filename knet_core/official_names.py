"""What the published checkpoints call each weight, and what it is called here (KNET_SPEC 9).

One table per part of the network. A row pairs a pattern of published module names with the module
here; the tensor's own last name (`weight`, `running_mean`, ...) stays. No row, no import: a key
that nothing matches is reported, never dropped.
"""

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

Rows = tuple[tuple[str, str], ...]

SWIN_TABLE = "relative_position_bias_table"
SWIN_INDEX = "relative_position_index"
"""Last name of a constant that published files repeat per block; the window size implies it."""

_MERGED_QUADRANTS = [0, 2, 1, 3]
"""A 2x2 window in row-major order, read as timm does: (0,0), (1,0), (0,1), (1,1)."""


def _unit(published: str, here: str) -> Rows:
    """Pair a convolution with its norm: `conv`, and `bn` or `gn`, are `0` and `1` here."""
    return ((rf"{published}\.conv", rf"{here}.0"), (rf"{published}\.[bg]n", rf"{here}.1"))


_RESNET: Rows = (
    (r"backbone\.stem\.([0-6])", r"backbone.trunk.conv1.\1"),
    (r"backbone\.stem\.7", r"backbone.trunk.bn1"),
    (r"backbone\.(conv1|bn1|layer[1-4]\.\d+\..+)", r"backbone.trunk.\1"),
)

# Two spellings: mmdetection's (`stages`, `w_msa`, `ffn`) and that of the Swin authors (`layers`).
_SWIN: Rows = (
    (r"backbone\.patch_embed\.proj(?:ection)?", r"backbone.trunk.patch_embed.proj"),
    (r"backbone\.patch_embed\.norm", r"backbone.trunk.patch_embed.norm"),
    (
        r"backbone\.(?:stages|layers)\.(\d)\.blocks\.(\d+)\.(norm[12])",
        r"backbone.trunk.layers_\1.blocks.\2.\3",
    ),
    (
        r"backbone\.(?:stages|layers)\.(\d)\.blocks\.(\d+)\.attn(?:\.w_msa)?((?:\.qkv|\.proj)?)",
        r"backbone.trunk.layers_\1.blocks.\2.attn\3",
    ),
    (
        r"backbone\.stages\.(\d)\.blocks\.(\d+)\.ffn\.layers\.0\.0",
        r"backbone.trunk.layers_\1.blocks.\2.mlp.fc1",
    ),
    (
        r"backbone\.stages\.(\d)\.blocks\.(\d+)\.ffn\.layers\.1",
        r"backbone.trunk.layers_\1.blocks.\2.mlp.fc2",
    ),
    (
        r"backbone\.layers\.(\d)\.blocks\.(\d+)\.mlp\.(fc[12])",
        r"backbone.trunk.layers_\1.blocks.\2.mlp.\3",
    ),
    *(
        (
            rf"backbone\.(?:stages|layers)\.{stage}\.downsample\.(norm|reduction)",
            rf"backbone.trunk.layers_{stage + 1}.downsample.\1",
        )
        for stage in range(3)
    ),
    (r"backbone\.norm([0-3])", r"backbone.output_norms.\1"),
)

_SEMANTIC_FPN = r"rpn_head\.localization_fpn"
_LEVELS = ("0.0 0", "1.0 1", "2.0 2.0", "2.1 2.2", "3.0 3.0", "3.1 3.2", "3.2 3.4")
"""Published level and convolution, and its place here, where upsamplings count too."""

_DETECTION: Rows = (
    (r"neck\.lateral_convs\.([0-3])\.conv", r"static.fpn.laterals.\1"),
    (r"neck\.fpn_convs\.([0-3])\.conv", r"static.fpn.outputs.\1"),
    *(
        row
        for level, place in (names.split() for names in _LEVELS)
        for row in _unit(
            rf"{_SEMANTIC_FPN}\.convs_all_levels\.{level.replace('.', '[.]conv')}",
            f"static.semantic_fpn.levels.{place}",
        )
    ),
    *_unit(rf"{_SEMANTIC_FPN}\.conv_pred", "static.semantic_fpn.branches.0.0"),
    *_unit(r"rpn_head\.loc_convs\.0", "static.semantic_fpn.branches.0.1"),
    *_unit(rf"{_SEMANTIC_FPN}\.aux_convs\.0", "static.semantic_fpn.branches.1.0"),
    *_unit(r"rpn_head\.seg_convs\.0", "static.semantic_fpn.branches.1.1"),
    (r"rpn_head\.init_kernels", "static.kernels.instance"),
    (r"rpn_head\.conv_seg", "static.kernels.semantic"),
)

_GENERATE = r"decode_head\.kernel_generate_head"
_SEMANTIC: Rows = (
    (rf"{_GENERATE}\.conv_seg", "static.classifier.conv"),
    *_unit(rf"{_GENERATE}\.convs\.([01])", r"static.head.convs.\1"),
    *_unit(rf"{_GENERATE}\.conv_cat", "static.head.bottleneck"),
    *_unit(rf"{_GENERATE}\.psp_modules\.([0-3])\.1", r"static.head.pools.\1"),
    *_unit(rf"{_GENERATE}\.bottleneck", "static.head.bottleneck"),
    *_unit(rf"{_GENERATE}\.image_pool\.1", "static.head.image_pool"),
    *_unit(rf"{_GENERATE}\.aspp_modules\.([0-3])", r"static.head.branches.\1"),
    *_unit(rf"{_GENERATE}\.lateral_convs\.([0-2])", r"static.head.laterals.\1"),
    *_unit(rf"{_GENERATE}\.fpn_convs\.([0-2])", r"static.head.outputs.\1"),
    *_unit(rf"{_GENERATE}\.fpn_bottleneck", "static.head.fusion"),
    *_unit(r"auxiliary_head\.convs\.0", "static.auxiliary.0"),
    (r"auxiliary_head\.conv_seg", "static.auxiliary.1.conv"),
)

_UPDATE_NAMES = {
    "feat_transform.conv": "feature_transform",
    "kernel_update_conv.dynamic_layer": "update.group_projection",
    "kernel_update_conv.input_layer": "update.kernel_projection",
    "kernel_update_conv.update_gate": "update.group_gate.0",
    "kernel_update_conv.norm_in": "update.group_gate.1",
    "kernel_update_conv.input_gate": "update.kernel_gate.0",
    "kernel_update_conv.input_norm_in": "update.kernel_gate.1",
    "kernel_update_conv.norm_out": "update.group_norm",
    "kernel_update_conv.input_norm_out": "update.kernel_norm",
    "kernel_update_conv.fc_layer": "update.out.0",
    "kernel_update_conv.fc_norm": "update.out.1",
    "attention.attn": "interaction.attention",
    "attention.attn.out_proj": "interaction.attention.out_proj",
    "attention_norm": "interaction.attention_norm",
    "ffn.layers.0.0": "interaction.ffn.0",
    "ffn.layers.1": "interaction.ffn.2",
    "ffn_norm": "interaction.ffn_norm",
    "cls_fcs.0": "class_branch.hidden",
    "cls_fcs.1": "class_branch.norm",
    "fc_cls": "class_branch.out",
    "mask_fcs.0": "mask_branch.hidden",
    "mask_fcs.1": "mask_branch.norm",
    "fc_mask": "mask_branch.out",
}
_UPDATES: Rows = tuple(
    (
        rf"(?:roi_head\.mask_head|decode_head\.kernel_update_head)\.(\d+)\.{re.escape(published)}",
        rf"updates.\1.{here}",
    )
    for published, here in _UPDATE_NAMES.items()
)

_ROWS = tuple(
    (re.compile(pattern), here)
    for pattern, here in (*_RESNET, *_SWIN, *_DETECTION, *_SEMANTIC, *_UPDATES)
)


def name_here(key: str) -> str | None:
    """Return this project's name of a published key, or None if it is unknown."""
    module, _, last = key.rpartition(".")
    for pattern, here in _ROWS:
        if found := pattern.fullmatch(module):
            return f"{found.expand(here)}.{last}"
    return None


def constants(keys: Collection[str]) -> list[str]:
    """Return the keys that hold no weights but what the window size implies."""
    return [
        key
        for key in keys
        if key.endswith(f".{SWIN_INDEX}") and key.replace(SWIN_INDEX, SWIN_TABLE) in keys
    ]


def to_timm_merging(key: str, tensor: Tensor) -> Tensor:
    """Return a tensor as timm reads it: patch merging in mmdetection's Swin has another order.

    There the 4c inputs of a merging layer are (channel, window), in timm (window, channel) with
    the window read by columns (KNET_SPEC 9.4). Swin's own authors agree with timm.
    """
    if not re.fullmatch(r"backbone\.stages\.\d\.downsample\..+", key):
        return tensor
    by_channel = tensor.reshape(*tensor.shape[:-1], -1, 4)
    by_window = by_channel.transpose(-1, -2)[..., _MERGED_QUADRANTS, :]
    return by_window.reshape(tensor.shape)


def window_index(window: int) -> Tensor:
    """Return the (window**2, window**2) table that Swin reads its position biases by."""
    place = torch.arange(window)
    row, column = place.repeat_interleave(window), place.repeat(window)
    span = 2 * window - 1
    down = row[:, None] - row[None, :] + window - 1
    right = column[:, None] - column[None, :] + window - 1
    return down * span + right


def rename(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """Return weights under the names here, each name's published key, and the unknown keys."""
    renamed: dict[str, Tensor] = {}
    origins: dict[str, str] = {}
    unknown: list[str] = []
    left_out = set(constants(weights))
    for key, tensor in weights.items():
        here = name_here(key)
        if key in left_out:
            continue
        if here is None or here in renamed:
            unknown.append(key)
        else:
            renamed[here] = to_timm_merging(key, tensor)
            origins[here] = key
    return renamed, origins, unknown
