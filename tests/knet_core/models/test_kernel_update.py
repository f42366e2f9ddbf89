"""One update round against KNET_SPEC section 2, written with loops in float64."""

import pytest
import torch
from torch.nn import functional as F

from knet_core import ModelConfig
from knet_core.models.kernel_head import StaticKernels, assemble_group_features, hard_groups
from knet_core.models.kernel_update import KernelUpdateHead
from knet_core.structures import StageOutput

CONFIG = ModelConfig(channels=32, num_heads=4, ffn_channels=48, num_kernels=5)


def inputs(seed=0):
    g = torch.Generator().manual_seed(seed)
    previous = StageOutput(
        masks=torch.randn(2, 5, 4, 6, generator=g).double(),
        class_logits=None,
        kernels=torch.randn(2, 5, 32, generator=g).double(),
    )
    return torch.randn(2, 32, 4, 6, generator=g).double(), previous


def randomised(config):
    torch.manual_seed(0)
    head = KernelUpdateHead(config, num_classes=3).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return head


def norm(x, layer):
    return F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, eps=1e-5)


def attention(x, layer, heads):
    q, k, v = (x @ layer.in_proj_weight.T + layer.in_proj_bias).chunk(3, dim=-1)
    size = x.shape[-1] // heads
    out = torch.zeros_like(x)
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        weight = (q[..., part] @ k[..., part].transpose(1, 2) / size**0.5).softmax(-1)
        out[..., part] = weight @ v[..., part]
    return layer.out_proj(out)


def reference(head, features, previous, *, adaptive, interaction):
    x = torch.einsum("oi,bihw->bohw", head.feature_transform.weight[:, :, 0, 0], features)
    x = x + head.feature_transform.bias[:, None, None]
    f = torch.zeros_like(previous.kernels)
    for b in range(2):
        for n in range(5):
            for i in range(4):
                for j in range(6):
                    if previous.masks[b, n, i, j].sigmoid() > 0.5:
                        f[b, n] += x[b, :, i, j]
    u = head.update
    if adaptive:
        a, d = u.group_projection(f).chunk(2, -1)
        b_, e = u.kernel_projection(previous.kernels).chunk(2, -1)
        gate_f = norm(u.group_gate[0](a * b_), u.group_gate[1]).sigmoid()
        gate_k = norm(u.kernel_gate[0](a * b_), u.kernel_gate[1]).sigmoid()
        y = gate_f * norm(d, u.group_norm) + gate_k * norm(e, u.kernel_norm)
    else:
        y = f + previous.kernels
    k = norm(u.out[0](y), u.out[1]).relu()
    if interaction:
        layer = head.interaction
        k = norm(k + attention(k, layer.attention, 4), layer.attention_norm)
        k = norm(k + layer.ffn[2](layer.ffn[0](k).relu()), layer.ffn_norm)

    def branch(part):
        return part.out(norm(part.hidden(k), part.norm).relu())

    return (
        k,
        branch(head.class_branch),
        torch.einsum("bnc,bchw->bnhw", branch(head.mask_branch), x),
    )


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("interaction", [True, False])
def test_a_round_follows_the_specification(adaptive, interaction):
    config = ModelConfig(
        channels=32,
        num_heads=4,
        ffn_channels=48,
        adaptive_update=adaptive,
        interaction=interaction,
    )
    head, (features, previous) = randomised(config), inputs()
    result = head(features, previous)
    kernels, classes, masks = reference(
        head, features, previous, adaptive=adaptive, interaction=interaction
    )
    torch.testing.assert_close(result.kernels, kernels, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.class_logits, classes, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.masks, masks, rtol=1e-9, atol=1e-9)


def test_group_features_are_sums_over_hard_masks_without_a_gradient():
    masks = torch.randn(1, 2, 3, 3, requires_grad=True)
    groups = hard_groups(masks)
    assert set(groups.unique().tolist()) <= {0.0, 1.0}
    assert not groups.requires_grad
    features = torch.randn(1, 4, 3, 3)
    expected = torch.einsum("bnhw,bchw->bnc", groups, features)
    torch.testing.assert_close(assemble_group_features(groups, features), expected)


def test_static_kernels_take_up_what_they_grouped():
    torch.manual_seed(0)
    static = StaticKernels(32, num_kernels=5, num_classes=3)
    ins, sem = torch.randn(2, 32, 4, 6), torch.randn(2, 32, 4, 6)
    stage, features, _ = static(ins, sem)
    torch.testing.assert_close(features, ins + sem)
    mask = static.instance.weight[3, :, 0, 0] @ ins[1].flatten(1) > 0
    expected = static.instance.weight[3, :, 0, 0] + features[1].flatten(1)[:, mask].sum(1)
    torch.testing.assert_close(stage.kernels[1, 3], expected, rtol=1e-5, atol=1e-4)
