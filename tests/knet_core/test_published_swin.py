"""An imported Swin gives the published backbone's maps.

The published Swin is written here once more, from the specification and by mmdetection's names:
maps are padded before they are rolled, patches are merged as `unfold` lays them out, and each
output has a norm of its own. Sizes are no multiples of the window of 7, as in every real image.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from knet_core.models.backbones import Backbone
from knet_core.official_config import infer
from knet_core.official_names import rename

DEPTHS, HEADS, WIDTH, WINDOW = (2, 2, 6, 2), (3, 6, 12, 24), 96, 7


def published_swin():
    generator = torch.Generator().manual_seed(0)
    state = {}

    def add(name, *shape, bias=True):
        std = math.prod(shape[1:]) ** -0.5
        state[f"{name}.weight"] = torch.randn(*shape, generator=generator) * std
        if bias:
            state[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.1

    def norm(name, width):
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(width, generator=generator)
        state[f"{name}.bias"] = 0.1 * torch.randn(width, generator=generator)

    add("patch_embed.projection", WIDTH, 3, 4, 4)
    norm("patch_embed.norm", WIDTH)
    for stage, depth in enumerate(DEPTHS):
        width = WIDTH * 2**stage
        for block in range(depth):
            name = f"stages.{stage}.blocks.{block}"
            table = torch.randn((2 * WINDOW - 1) ** 2, HEADS[stage], generator=generator)
            state[f"{name}.attn.w_msa.relative_position_bias_table"] = table
            index = torch.zeros(WINDOW**2, WINDOW**2, dtype=torch.int64)
            state[f"{name}.attn.w_msa.relative_position_index"] = index
            add(f"{name}.attn.w_msa.qkv", 3 * width, width)
            add(f"{name}.attn.w_msa.proj", width, width)
            add(f"{name}.ffn.layers.0.0", 4 * width, width)
            add(f"{name}.ffn.layers.1", width, 4 * width)
            norm(f"{name}.norm1", width)
            norm(f"{name}.norm2", width)
        if stage < 3:
            norm(f"stages.{stage}.downsample.norm", 4 * width)
            add(f"stages.{stage}.downsample.reduction", 2 * width, 4 * width, bias=False)
        norm(f"norm{stage}", width)
    return state


def layer_norm(state, name, x):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0.0)


def attend(state, name, x, origins, heads):
    """Attend within one window (49, D); `origins` number the regions that the roll joined."""
    width = x.shape[-1] // heads
    q, k, v = linear(state, f"{name}.qkv", x).chunk(3, dim=-1)
    table = state[f"{name}.relative_position_bias_table"]
    place = [(i, j) for i in range(WINDOW) for j in range(WINDOW)]
    span = 2 * WINDOW - 1
    index = torch.tensor(
        [[(a - c + WINDOW - 1) * span + (b - d + WINDOW - 1) for c, d in place] for a, b in place]
    )
    parts = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = q[:, part] @ k[:, part].T / width**0.5 + table[index, head]
        scores = scores.masked_fill(origins[:, None] != origins[None, :], -math.inf)
        parts.append(scores.softmax(-1) @ v[:, part])
    return linear(state, f"{name}.proj", torch.cat(parts, -1))


def shifted_windows(state, name, x, heads, shift):
    """Pad (h, w, D) at the bottom and right, roll, attend window by window, and go back."""
    height, width, _ = x.shape
    x = F.pad(x, (0, 0, 0, -width % WINDOW, 0, -height % WINDOW))
    rows, columns = x.shape[:2]
    x = x.roll((-shift, -shift), (0, 1))
    out = torch.zeros_like(x)
    for top in range(0, rows, WINDOW):
        for left in range(0, columns, WINDOW):
            inside = (slice(top, top + WINDOW), slice(left, left + WINDOW))
            # What came round the edge is no neighbour of what was there.
            origins = torch.tensor(
                [
                    2 * (top + i >= rows - shift and shift > 0)
                    + (left + j >= columns - shift and shift > 0)
                    for i in range(WINDOW)
                    for j in range(WINDOW)
                ]
            )
            found = attend(state, name, x[inside].flatten(0, 1), origins, heads)
            out[inside] = found.unflatten(0, (WINDOW, WINDOW))
    return out.roll((shift, shift), (0, 1))[:height, :width]


def published_maps(state, image):
    """Return the four output maps (h, w, D) of one image (3, H, W)."""
    weight, bias = (state[f"patch_embed.projection.{part}"] for part in ("weight", "bias"))
    x = F.conv2d(image[None], weight, bias, stride=4)[0].permute(1, 2, 0)
    x = layer_norm(state, "patch_embed.norm", x)
    maps = []
    for stage, depth in enumerate(DEPTHS):
        for block in range(depth):
            name = f"stages.{stage}.blocks.{block}"
            shift = WINDOW // 2 if block % 2 else 0
            y = layer_norm(state, f"{name}.norm1", x)
            x = x + shifted_windows(state, f"{name}.attn.w_msa", y, HEADS[stage], shift)
            y = layer_norm(state, f"{name}.norm2", x)
            y = F.gelu(linear(state, f"{name}.ffn.layers.0.0", y))
            x = x + linear(state, f"{name}.ffn.layers.1", y)
        maps.append(layer_norm(state, f"norm{stage}", x))
        if stage < 3:
            name = f"stages.{stage}.downsample"
            height, width = (x.shape[0] + 1) // 2, (x.shape[1] + 1) // 2
            even = F.pad(x, (0, 0, 0, x.shape[1] % 2, 0, x.shape[0] % 2))
            unfolded = F.unfold(even.permute(2, 0, 1)[None], 2, stride=2)[0].T
            merged = layer_norm(state, f"{name}.norm", unfolded.unflatten(0, (height, width)))
            x = linear(state, f"{name}.reduction", merged)
    return maps


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 96), (96, 160)])
def test_an_imported_swin_is_the_published_one(one_thread, size):
    state = published_swin()
    weights = {f"backbone.{name}": tensor for name, tensor in state.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    shapes["decode_head.kernel_generate_head.conv_seg.weight"] = (9, 256, 1, 1)
    shapes["decode_head.kernel_generate_head.conv_cat.conv.weight"] = (256, 1024, 3, 3)
    renamed, _, unknown = rename(weights)
    assert not unknown
    backbone = Backbone(infer(shapes, "swin").model.backbone).eval()
    backbone.load_state_dict({name.removeprefix("backbone."): w for name, w in renamed.items()})
    image = torch.randn(3, *size, generator=torch.Generator().manual_seed(1))
    for ours, theirs in zip(backbone(image[None]), published_maps(state, image), strict=True):
        theirs = theirs.permute(2, 0, 1)[None]
        assert ours.shape == theirs.shape
        assert float((ours - theirs).abs().max() / theirs.abs().max()) <= 1e-5
