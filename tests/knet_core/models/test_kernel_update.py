"""One update round against KNET_SPEC section 2, written with loops in float64."""

import math

import pytest
import torch
from torch.nn import functional as F

from knet_core import ModelConfig
from knet_core.models.kernel_head import (
    StaticKernels,
    assemble_group_features,
    hard_classes,
    hard_groups,
    soft_classes,
    soft_groups,
)
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


def adapted(u, f, kernels):
    a, d = u.group_projection(f).chunk(2, -1)
    b, e = u.kernel_projection(kernels).chunk(2, -1)
    gate_f = norm(u.group_gate[0](a * b), u.group_gate[1]).sigmoid()
    gate_k = norm(u.kernel_gate[0](a * b), u.kernel_gate[1]).sigmoid()
    return gate_f * norm(d, u.group_norm) + gate_k * norm(e, u.kernel_norm)


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
    y = adapted(u, f, previous.kernels) if adaptive else f + previous.kernels
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
    config = ModelConfig(channels=32, num_kernels=5, num_heads=4)
    static = StaticKernels(config, num_classes=3, num_stuff=0)
    ins, sem = torch.randn(2, 32, 4, 6), torch.randn(2, 32, 4, 6)
    features = ins + sem
    stage = static(ins, sem, features).stage
    mask = static.instance.weight[3, :, 0, 0] @ ins[1].flatten(1) > 0
    expected = static.instance.weight[3, :, 0, 0] + features[1].flatten(1)[:, mask].sum(1)
    torch.testing.assert_close(stage.kernels[1, 3], expected, rtol=1e-5, atol=1e-4)


def softmax_by_definition(masks):
    shares = torch.zeros_like(masks)
    batch, kernels, height, width = masks.shape
    for b in range(batch):
        for i in range(height):
            for j in range(width):
                powers = [math.exp(masks[b, n, i, j]) for n in range(kernels)]
                for n in range(kernels):
                    shares[b, n, i, j] = powers[n] / sum(powers)
    return shares


def test_soft_groups_of_classes_share_every_pixel_and_pass_gradients():
    masks = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    groups = soft_classes(masks)
    expected = softmax_by_definition(masks.detach())
    torch.testing.assert_close(groups.detach(), expected, rtol=1e-12, atol=1e-12)
    groups.square().sum().backward()
    assert masks.grad.abs().sum() > 0


def test_hard_groups_of_classes_take_the_likeliest_alone():
    masks = torch.randn(2, 5, 3, 4, requires_grad=True)
    groups = hard_classes(masks)
    best = (masks == masks.amax(1, keepdim=True)).float()
    assert torch.equal(groups, best)
    assert not groups.requires_grad


def test_soft_groups_of_instances_are_probabilities_of_their_own():
    masks = torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(soft_groups(masks), 1 / (1 + (-masks).exp()))


def test_wide_semantic_kernels_are_updated_in_halves_by_one_narrow_update():
    config = ModelConfig(
        task="semantic", channels=512, update_channels=256, ffn_channels=48, grouping="soft"
    )
    torch.manual_seed(0)
    head = KernelUpdateHead(config, num_classes=0).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    features = torch.randn(2, 512, 3, 4, dtype=torch.float64)
    previous = StageOutput(
        masks=torch.randn(2, 5, 3, 4, dtype=torch.float64),
        class_logits=None,
        kernels=torch.randn(2, 5, 512, dtype=torch.float64),
    )
    result = head(features, previous)

    x = torch.einsum("oi,bihw->bohw", head.feature_transform.weight[:, :, 0, 0], features)
    x = x + head.feature_transform.bias[:, None, None]
    f = torch.einsum("bnhw,bchw->bnc", softmax_by_definition(previous.masks), x)
    kernels = torch.empty_like(f)
    for b in range(2):
        for n in range(5):
            for half in (slice(0, 256), slice(256, 512)):
                y = adapted(head.update, f[b, n, half], previous.kernels[b, n, half])
                kernels[b, n, half] = norm(head.update.out[0](y), head.update.out[1]).relu()
    layer = head.interaction
    kernels = norm(kernels + attention(kernels, layer.attention, 8), layer.attention_norm)
    hidden = layer.ffn[2](layer.ffn[0](kernels).relu())
    kernels = norm(kernels + hidden, layer.ffn_norm)
    part = head.mask_branch
    weights = part.out(norm(part.hidden(kernels), part.norm).relu())
    torch.testing.assert_close(result.kernels, kernels, rtol=1e-9, atol=1e-9)
    expected = torch.einsum("bnc,bchw->bnhw", weights, x)
    torch.testing.assert_close(result.masks, expected, rtol=1e-9, atol=1e-9)
    assert result.class_logits is None
    assert head.update.group_projection.weight.shape == (512, 256)


def test_semantic_updates_start_as_the_published_ones_do():
    config = ModelConfig(task="semantic", channels=256, ffn_channels=512)
    torch.manual_seed(0)
    head = KernelUpdateHead(config, num_classes=0)
    # PyTorch's own start for linear layers, within 1 / sqrt(inputs); Kaiming's for the transform.
    assert head.mask_branch.out.weight.abs().max().item() == pytest.approx(1 / 16, rel=1e-2)
    assert head.update.out[0].bias.abs().max().item() == pytest.approx(1 / 16, rel=5e-2)
    assert head.feature_transform.weight.std().item() == pytest.approx((2 / 256) ** 0.5, rel=2e-2)
    assert not head.feature_transform.bias.any()
