"""An imported checkpoint predicts, learns and answers as the published model does.

The published model is written here once more, from the specification alone and by the published
names of its weights: plain functions of a state dict, naive loops for losses and results. It
shares nothing with the package. Weights are random; both see the same.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

from knet_core import LossConfig, Targets, import_official, load_model
from knet_core.losses import quarter_masks
from knet_core.matching import assignment_cost, match
from knet_core.structures import ImageSize

TOLERANCE = 1e-5
"""Largest difference, as a share of the largest value."""
HEIGHT, WIDTH = 64, 96
INPUT_SIZES = ((64, 96), (51, 83))
ORIGINAL_SIZES = ((45, 67), (60, 97))
THINGS, CLASSES = 80, 133


class Weights:
    """A random state dict, built by published names; values keep activations near one."""

    def __init__(self, seed):
        self.state = {}
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape, std=1.0, mean=0.0):
        return torch.randn(*shape, generator=self.generator) * std + mean

    def linear(self, name, out, inputs, *kernel, bias=True):
        fan_in = inputs * math.prod(kernel)
        self.state[f"{name}.weight"] = self.normal(out, inputs, *kernel, std=fan_in**-0.5)
        if bias:
            self.state[f"{name}.bias"] = self.normal(out, std=0.1)

    def norm(self, name, width, *, running=False, mean=1.0):
        self.state[f"{name}.weight"] = self.normal(width, std=0.1, mean=mean)
        self.state[f"{name}.bias"] = self.normal(width, std=0.1)
        if running:
            self.state[f"{name}.running_mean"] = self.normal(width, std=0.1)
            self.state[f"{name}.running_var"] = self.normal(width, std=0.1, mean=1.0).abs()
            self.state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def unit(self, name, out, inputs, kernel, norm):
        self.linear(f"{name}.conv", out, inputs, kernel, kernel, bias=False)
        self.norm(f"{name}.{norm}", out, running=norm == "bn")

    def resnet50(self, *, deep_stem=False, deformable=False):
        stem = [(0, 32, 3), (3, 32, 32), (6, 64, 32)]
        for index, out, inputs in stem if deep_stem else []:
            self.linear(f"backbone.stem.{index}", out, inputs, 3, 3, bias=False)
            self.norm(f"backbone.stem.{index + 1}", out, running=True)
        if not deep_stem:
            self.linear("backbone.conv1", 64, 3, 7, 7, bias=False)
            self.norm("backbone.bn1", 64, running=True)
        inputs = 64
        for stage, blocks in enumerate((3, 4, 6, 3)):
            width = 64 * 2**stage
            for block in range(blocks):
                name = f"backbone.layer{stage + 1}.{block}"
                self.linear(f"{name}.conv1", width, inputs, 1, 1, bias=False)
                self.linear(f"{name}.conv2", width, width, 3, 3, bias=False)
                if deformable and stage > 0:
                    self.linear(f"{name}.conv2.conv_offset", 18, width, 3, 3)
                self.linear(f"{name}.conv3", 4 * width, width, 1, 1, bias=False)
                self.norm(f"{name}.bn1", width, running=True)
                self.norm(f"{name}.bn2", width, running=True)
                self.norm(f"{name}.bn3", 4 * width, running=True, mean=0.3)
                if block == 0:
                    self.linear(f"{name}.downsample.0", 4 * width, inputs, 1, 1, bias=False)
                    self.norm(f"{name}.downsample.1", 4 * width, running=True)
                inputs = 4 * width

    def update_head(self, name, channels, inner, ffn, classes=0):
        self.linear(f"{name}.feat_transform.conv", channels, channels, 1, 1)
        update = f"{name}.kernel_update_conv"
        for part in ("dynamic_layer", "input_layer"):
            self.linear(f"{update}.{part}", 2 * inner, inner)
        for part in ("input_gate", "update_gate", "fc_layer"):
            self.linear(f"{update}.{part}", inner, inner)
        for part in ("norm_in", "norm_out", "input_norm_in", "input_norm_out", "fc_norm"):
            self.norm(f"{update}.{part}", inner)
        self.linear("in_proj", 3 * channels, channels)
        for part in ("weight", "bias"):
            projection = self.state.pop(f"in_proj.{part}")
            self.state[f"{name}.attention.attn.in_proj_{part}"] = projection
        self.linear(f"{name}.attention.attn.out_proj", channels, channels)
        self.norm(f"{name}.attention_norm", channels)
        self.norm(f"{name}.ffn_norm", channels)
        self.linear(f"{name}.ffn.layers.0.0", ffn, channels)
        self.linear(f"{name}.ffn.layers.1", channels, ffn)
        for branch in ("cls", "mask") if classes else ("mask",):
            self.linear(f"{name}.{branch}_fcs.0", channels, channels, bias=False)
            self.norm(f"{name}.{branch}_fcs.1", channels)
        self.linear(f"{name}.fc_mask", channels, channels)
        if classes:
            # Far apart, so that some kernels are sure of themselves and most are not.
            things = min(classes, THINGS)
            self.state[f"{name}.fc_cls.weight"] = self.normal(classes, channels, std=0.3)
            self.state[f"{name}.fc_cls.bias"] = torch.cat(
                [self.normal(things, mean=-7.5), self.normal(classes - things, std=2.0)]
            )


def detection_weights(*, classes, kernels, seed, coordinates=False, deformable=False):
    made = Weights(seed)
    made.resnet50(deformable=deformable)
    for level, width in enumerate((256, 512, 1024, 2048)):
        made.linear(f"neck.lateral_convs.{level}.conv", 256, width, 1, 1)
        made.linear(f"neck.fpn_convs.{level}.conv", 256, 256, 3, 3)
    head = "rpn_head.localization_fpn"
    for level, convs in enumerate((1, 1, 2, 3)):
        for conv in range(convs):
            inputs = 258 if coordinates and (level, conv) == (3, 0) else 256
            made.unit(f"{head}.convs_all_levels.{level}.conv{conv}", 256, inputs, 3, "gn")
    for name in (
        f"{head}.conv_pred", f"{head}.aux_convs.0", "rpn_head.loc_convs.0", "rpn_head.seg_convs.0"
    ):  # fmt: skip
        made.unit(name, 256, 256, 1, "gn")
    # As large as the features they group, so that kernels differ.
    made.state["rpn_head.init_kernels.weight"] = made.normal(kernels, 256, 1, 1, std=40.0)
    made.linear("rpn_head.conv_seg", classes, 256, 1, 1)
    for stage in range(3):
        made.update_head(f"roi_head.mask_head.{stage}", 256, 256, 2048, classes)
        update = f"roi_head.mask_head.{stage}.kernel_update_conv"
        made.state[f"{update}.norm_in.bias"] -= 2
        made.state[f"{update}.input_norm_in.bias"] += 2
    # One feature of the last stage is 1 everywhere and lowers all masks, so that they are small
    # and several find a place.
    for part, channel, bias in (("feat_transform.conv", 0, 1.0), ("fc_mask", 0, -22.0)):
        made.state[f"roi_head.mask_head.2.{part}.weight"][channel] = 0
        made.state[f"roi_head.mask_head.2.{part}.bias"][channel] = bias
    return made.state


def semantic_weights(kind, *, classes, channels, inner, seed):
    made = Weights(seed)
    made.resnet50(deep_stem=True)
    head = "decode_head.kernel_generate_head"
    made.linear(f"{head}.conv_seg", classes, channels, 1, 1)
    if kind == "fcn":
        made.unit(f"{head}.convs.0", channels, 2048, 3, "bn")
        made.unit(f"{head}.convs.1", channels, channels, 3, "bn")
        made.unit(f"{head}.conv_cat", channels, 2048 + channels, 3, "bn")
    if kind == "deeplabv3":
        made.unit(f"{head}.image_pool.1", channels, 2048, 1, "bn")
        for branch, kernel in enumerate((1, 3, 3, 3)):
            made.unit(f"{head}.aspp_modules.{branch}", channels, 2048, kernel, "bn")
        made.unit(f"{head}.bottleneck", channels, 5 * channels, 3, "bn")
    if kind in ("pspnet", "upernet"):
        for pool in range(4):
            made.unit(f"{head}.psp_modules.{pool}.1", channels, 2048, 1, "bn")
        made.unit(f"{head}.bottleneck", channels, 2048 + 4 * channels, 3, "bn")
    if kind == "upernet":
        for level, width in enumerate((256, 512, 1024)):
            made.unit(f"{head}.lateral_convs.{level}", channels, width, 1, "bn")
            made.unit(f"{head}.fpn_convs.{level}", channels, channels, 3, "bn")
        made.unit(f"{head}.fpn_bottleneck", channels, 4 * channels, 3, "bn")
    for stage in range(3):
        made.update_head(f"decode_head.kernel_update_head.{stage}", channels, inner, 64)
    made.unit("auxiliary_head.convs.0", 256, 1024, 3, "bn")
    made.linear("auxiliary_head.conv_seg", classes, 256, 1, 1)
    return made.state


@dataclasses.dataclass
class Stage:
    masks: torch.Tensor
    kernels: torch.Tensor
    logits: torch.Tensor | None = None


class Published:
    """Sections 1, 2 and 6 of the specification over a state dict."""

    def __init__(self, state):
        self.state = state

    def has(self, name):
        return f"{name}.weight" in self.state

    def conv(self, x, name, **options):
        return F.conv2d(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"), **options)

    def fc(self, x, name):
        return x @ self.state[f"{name}.weight"].T + self.state.get(f"{name}.bias", 0.0)

    def ln(self, x, name):
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias

    def bn(self, x, name):
        mean, var, weight, bias = (
            self.state[f"{name}.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def cgr(self, x, name, **options):
        weight, bias = self.state[f"{name}.gn.weight"], self.state[f"{name}.gn.bias"]
        return F.group_norm(self.conv(x, f"{name}.conv", **options), 32, weight, bias).relu()

    def cbr(self, x, name, dilation=1):
        padding = dilation * (self.state[f"{name}.conv.weight"].shape[-1] // 2)
        convolved = self.conv(x, f"{name}.conv", padding=padding, dilation=dilation)
        return self.bn(convolved, f"{name}.bn").relu()

    def resnet(self, x, *, output_stride=32):
        if self.has("backbone.stem.0"):
            for conv, stride in ((0, 2), (3, 1), (6, 1)):
                x = self.conv(x, f"backbone.stem.{conv}", stride=stride, padding=1)
                x = self.bn(x, f"backbone.stem.{conv + 1}").relu()
        else:
            x = self.bn(self.conv(x, "backbone.conv1", stride=2, padding=3), "backbone.bn1").relu()
        x = F.max_pool2d(x, 3, 2, 1)
        plan = ((1, 1), (2, 1), (2, 1), (2, 1))
        if output_stride == 8:
            plan = ((1, 1), (2, 1), (1, 2), (1, 4))
        maps = []
        for stage, (stride, dilation) in enumerate(plan, start=1):
            block = 0
            while self.has(f"backbone.layer{stage}.{block}.conv1"):
                first = block == 0
                reach = max(dilation // 2, 1) if first else dilation
                name = f"backbone.layer{stage}.{block}"
                x = self.bottleneck(x, name, stride if first else 1, reach)
                block += 1
            maps.append(x)
        return maps

    def bottleneck(self, x, name, stride, dilation):
        y = self.bn(self.conv(x, f"{name}.conv1"), f"{name}.bn1").relu()
        options = {"stride": stride, "padding": dilation, "dilation": dilation}
        if self.has(f"{name}.conv2.conv_offset"):
            offsets = self.conv(y, f"{name}.conv2.conv_offset", **options)
            y = deform_conv2d(y, offsets, self.state[f"{name}.conv2.weight"], **options)
        else:
            y = self.conv(y, f"{name}.conv2", **options)
        y = self.bn(y, f"{name}.bn2").relu()
        y = self.bn(self.conv(y, f"{name}.conv3"), f"{name}.bn3")
        if self.has(f"{name}.downsample.0"):
            x = self.conv(x, f"{name}.downsample.0", stride=stride)
            x = self.bn(x, f"{name}.downsample.1")
        return (x + y).relu()

    def pyramid(self, maps):
        laterals = [self.conv(m, f"neck.lateral_convs.{i}.conv") for i, m in enumerate(maps)]
        for i in (3, 2, 1):
            laterals[i - 1] = laterals[i - 1] + F.interpolate(
                laterals[i], laterals[i - 1].shape[-2:], mode="nearest"
            )
        return [
            self.conv(m, f"neck.fpn_convs.{i}.conv", padding=1) for i, m in enumerate(laterals)
        ]

    def localization(self, p2, p3, p4, p5):
        name = "rpn_head.localization_fpn"

        def cgr(x, level, conv, stride=1):
            place = f"{name}.convs_all_levels.{level}.conv{conv}"
            return self.cgr(x, place, stride=stride, padding=1)

        height, width = p5.shape[-2:]
        p5 = p5 + positions(height, width)
        if self.state[f"{name}.convs_all_levels.3.conv0.conv.weight"].shape[1] == 258:
            x = torch.linspace(-1, 1, width).expand(len(p5), 1, height, width)
            y = torch.linspace(-1, 1, height)[:, None].expand(len(p5), 1, height, width)
            p5 = torch.cat([p5, x, y], 1)
        total = cgr(p2, 0, 0, stride=2) + cgr(p3, 1, 0)
        total = total + cgr(up2(cgr(p4, 2, 0)), 2, 1)
        total = total + cgr(up2(cgr(up2(cgr(p5, 3, 0)), 3, 1)), 3, 2)
        instance = self.cgr(self.cgr(total, f"{name}.conv_pred"), "rpn_head.loc_convs.0")
        semantic = self.cgr(self.cgr(total, f"{name}.aux_convs.0"), "rpn_head.seg_convs.0")
        return instance, semantic

    def detect(self, images):
        """Return the static stage, three updates, and the semantic logits S0."""
        instance, semantic = self.localization(*self.pyramid(self.resnet(images)))
        features = instance + semantic
        masks = self.conv(instance, "rpn_head.init_kernels")
        s0 = self.conv(semantic, "rpn_head.conv_seg")
        weight = self.state["rpn_head.init_kernels.weight"].flatten(1)
        group = (masks.sigmoid() > 0.5).float()
        kernels = weight + torch.einsum("bnhw,bchw->bnc", group, features)
        if s0.shape[1] > THINGS:
            stuff = self.state["rpn_head.conv_seg.weight"][THINGS:].flatten(1)
            masks = torch.cat([masks, s0[:, THINGS:]], 1)
            kernels = torch.cat([kernels, stuff.expand(len(images), -1, -1)], 1)
        stages = [Stage(masks, kernels)]
        for s in range(3):
            stages.append(self.update(f"roi_head.mask_head.{s}", features, stages[-1], soft=False))
        return stages, s0

    def update(self, name, features, before, *, soft):
        x = self.conv(features, f"{name}.feat_transform.conv")
        masks = before.masks
        group = masks.softmax(1) if soft else (masks.sigmoid() > 0.5).float()
        grouped = torch.einsum("bnhw,bchw->bnc", group, x)
        kernels = self.interact(name, self.adapt(name, grouped, before.kernels))
        logits = None
        if self.has(f"{name}.fc_cls"):
            hidden = self.ln(self.fc(kernels, f"{name}.cls_fcs.0"), f"{name}.cls_fcs.1").relu()
            logits = self.fc(hidden, f"{name}.fc_cls")
        hidden = self.ln(self.fc(kernels, f"{name}.mask_fcs.0"), f"{name}.mask_fcs.1").relu()
        masks = torch.einsum("bnc,bchw->bnhw", self.fc(hidden, f"{name}.fc_mask"), x)
        return Stage(masks, kernels, logits)

    def adapt(self, name, f, k):
        name = f"{name}.kernel_update_conv"
        shape, width = k.shape, self.state[f"{name}.fc_layer.weight"].shape[0]
        f, k = f.reshape(len(f), -1, width), k.reshape(len(k), -1, width)
        dynamic, static = self.fc(f, f"{name}.dynamic_layer"), self.fc(k, f"{name}.input_layer")
        a, d = dynamic[..., :width], dynamic[..., width:]
        b, e = static[..., :width], static[..., width:]
        g = a * b
        gate_f = self.ln(self.fc(g, f"{name}.update_gate"), f"{name}.norm_in").sigmoid()
        gate_k = self.ln(self.fc(g, f"{name}.input_gate"), f"{name}.input_norm_in").sigmoid()
        y = gate_f * self.ln(d, f"{name}.norm_out") + gate_k * self.ln(e, f"{name}.input_norm_out")
        return self.ln(self.fc(y, f"{name}.fc_layer"), f"{name}.fc_norm").relu().reshape(shape)

    def interact(self, name, kernels):
        weight = self.state[f"{name}.attention.attn.in_proj_weight"]
        bias = self.state[f"{name}.attention.attn.in_proj_bias"]
        q, k, v = (kernels @ weight.T + bias).chunk(3, dim=-1)
        heads = []
        width = kernels.shape[-1] // 8
        for head in range(8):
            part = slice(head * width, (head + 1) * width)
            scores = (q[..., part] @ k[..., part].transpose(1, 2) / width**0.5).softmax(-1)
            heads.append(scores @ v[..., part])
        attended = self.fc(torch.cat(heads, -1), f"{name}.attention.attn.out_proj")
        kernels = self.ln(kernels + attended, f"{name}.attention_norm")
        hidden = self.fc(kernels, f"{name}.ffn.layers.0.0").relu()
        return self.ln(kernels + self.fc(hidden, f"{name}.ffn.layers.1"), f"{name}.ffn_norm")

    def classify(self, images, kind):
        """Return the generate head's stage, three updates, and the auxiliary logits."""
        maps = self.resnet(images, output_stride=32 if kind == "upernet" else 8)
        head = "decode_head.kernel_generate_head"
        features = getattr(self, kind)(head, *maps)
        kernels = self.state[f"{head}.conv_seg.weight"].flatten(1).expand(len(images), -1, -1)
        stages = [Stage(self.conv(features, f"{head}.conv_seg"), kernels)]
        for s in range(3):
            name = f"decode_head.kernel_update_head.{s}"
            stages.append(self.update(name, features, stages[-1], soft=True))
        auxiliary = self.cbr(maps[2], "auxiliary_head.convs.0")
        return stages, self.conv(auxiliary, "auxiliary_head.conv_seg")

    def fcn(self, head, c2, c3, c4, c5):
        y = self.cbr(self.cbr(c5, f"{head}.convs.0"), f"{head}.convs.1")
        return self.cbr(torch.cat([c5, y], 1), f"{head}.conv_cat")

    def pspnet(self, head, c2, c3, c4, c5):
        parts = [c5]
        for index, size in enumerate((1, 2, 3, 6)):
            pooled = self.cbr(F.adaptive_avg_pool2d(c5, size), f"{head}.psp_modules.{index}.1")
            parts.append(resize(pooled, c5.shape[-2:]))
        return self.cbr(torch.cat(parts, 1), f"{head}.bottleneck")

    def deeplabv3(self, head, c2, c3, c4, c5):
        pooled = self.cbr(c5.mean((2, 3), keepdim=True), f"{head}.image_pool.1")
        parts = [resize(pooled, c5.shape[-2:])]
        for index, dilation in enumerate((1, 12, 24, 36)):
            parts.append(self.cbr(c5, f"{head}.aspp_modules.{index}", dilation))
        return self.cbr(torch.cat(parts, 1), f"{head}.bottleneck")

    def upernet(self, head, c2, c3, c4, c5):
        levels = [self.cbr(m, f"{head}.lateral_convs.{i}") for i, m in enumerate((c2, c3, c4))]
        levels.append(self.pspnet(head, c2, c3, c4, c5))
        for i in (3, 2, 1):
            levels[i - 1] = levels[i - 1] + resize(levels[i], levels[i - 1].shape[-2:])
        for i in range(3):
            levels[i] = self.cbr(levels[i], f"{head}.fpn_convs.{i}")
        fused = torch.cat([resize(level, levels[0].shape[-2:]) for level in levels], 1)
        return self.cbr(fused, f"{head}.fpn_bottleneck")


def positions(height, width):
    encoding = torch.zeros(256, height, width)
    for k in range(128):
        wave = math.sin if k % 2 == 0 else math.cos
        divisor = 10000 ** (2 * (k // 2) / 128)
        for i in range(height):
            encoding[k, i, :] = wave((i + 1) / (height + 1e-6) * 2 * math.pi / divisor)
        for j in range(width):
            encoding[128 + k, :, j] = wave((j + 1) / (width + 1e-6) * 2 * math.pi / divisor)
    return encoding


def resize(x, size):
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def up2(x):
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


# ---- Targets, matching and losses: sections 3 and 4.


def quarter(mask):
    """Pad to the batch and keep the mean of the central 2x2 of every 4x4."""
    full = np.zeros((HEIGHT, WIDTH))
    full[: mask.shape[0], : mask.shape[1]] = mask
    small = np.zeros((HEIGHT // 4, WIDTH // 4))
    for i in range(HEIGHT // 4):
        for j in range(WIDTH // 4):
            small[i, j] = full[4 * i + 1 : 4 * i + 3, 4 * j + 1 : 4 * j + 3].mean()
    return torch.from_numpy(small)


def stuff_masks(target):
    """Return {class: soft mask} of the stuff in a semantic map, in order of class."""
    if target.semantic is None:
        return {}
    present = sorted(set(target.semantic.unique().tolist()) - {*range(THINGS), 255})
    return {label: quarter((target.semantic == label).numpy()) for label in present}


def published_match(masks, logits, target):
    """Return [(kernel, object)] of one image; masks (N, h, w) and logits (N, C) of instances."""
    if len(target.labels) == 0:
        return []
    p = up2(masks[None])[0].double().sigmoid().flatten(1)
    cost = np.zeros((len(p), len(target.labels)))
    for g, mask in enumerate(target.masks):
        t = quarter(mask.numpy()).flatten()
        for n in range(len(p)):
            overlap = (p[n] * t).sum()
            dice = -2 * overlap / ((p[n] ** 2).sum() + 1e-3 + (t**2).sum() + 1e-3)
            both = -(overlap + ((1 - p[n]) * (1 - t)).sum()) / t.numel()
            cost[n, g] = 4 * dice + both
            if logits is not None:
                q = logits[n, target.labels[g]].double().sigmoid()
                positive = 0.25 * (1 - q) ** 2 * -(q + 1e-12).log()
                negative = 0.75 * q**2 * -(1 - q + 1e-12).log()
                cost[n, g] += 2 * (positive - negative)
    return list(zip(*linear_sum_assignment(cost), strict=True))


def published_assignments(stages, targets, num_instances):
    """Return the matches used by the static stage and every update, per image."""
    static = [
        published_match(stages[0].masks[b, :num_instances], None, target)
        for b, target in enumerate(targets)
    ]
    found = [static, static]
    for before in stages[1:-1]:
        masks, logits = before.masks[:, :num_instances], before.logits[:, :num_instances, :THINGS]
        found.append([published_match(masks[b], logits[b], t) for b, t in enumerate(targets)])
    return found


def focal(x, y):
    p = x.sigmoid()
    pt = (1 - p) * y + p * (1 - y)
    entropy = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    return (0.25 * y + 0.75 * (1 - y)) * pt**2 * entropy


def published_losses(stages, s0, targets, num_instances):
    """Return every weighted term by the name it has here."""
    panoptic = s0.shape[1] > THINGS
    assignments = published_assignments(stages, targets, num_instances)
    terms = {}
    for index, (stage, matches) in enumerate(zip(stages, assignments, strict=True)):
        rows = positives(targets, matches, num_instances, stuff=index > 0)
        masks = up2(stage.masks).double()
        mask_terms = [
            (
                F.binary_cross_entropy_with_logits(masks[b, k], t),
                1 - 2 * (masks[b, k].sigmoid() * t).sum()
                / ((masks[b, k].sigmoid() ** 2).sum() + 1e-3 + (t**2).sum() + 1e-3),
            )
            for b, k, _, t in rows
        ]  # fmt: skip
        terms[f"stage{index}/mask"] = sum(bce for bce, _ in mask_terms) / len(rows)
        terms[f"stage{index}/dice"] = 4 * sum(dice for _, dice in mask_terms) / len(rows)
        if panoptic:
            competing = masks if index > 0 else masks[:, :num_instances]
            terms[f"stage{index}/rank"] = 0.1 * rank(competing, rows)
        if stage.logits is not None:
            terms[f"stage{index}/cls"] = 2 * classes(stage.logits.double(), rows, num_instances)
    terms["seg"] = segmentation(up2(s0).double(), targets, assignments[0], num_instances)
    return terms


def positives(targets, matches, num_instances, *, stuff):
    """Return (image, row, class, soft mask) of every row with a target, rows increasing."""
    rows = []
    for b, target in enumerate(targets):
        for k, g in sorted(matches[b]):
            rows.append((b, k, int(target.labels[g]), quarter(target.masks[g].numpy())))
        for label, mask in stuff_masks(target).items() if stuff else ():
            rows.append((b, num_instances + label - THINGS, label, mask))
    return rows


def rank(masks, rows):
    owner = torch.full((len(masks), *masks.shape[-2:]), 255)
    for b, k, _, t in rows:
        owner[b][t > 0] = k
    total = 0.0
    log_probability = masks.log_softmax(1)
    for b in range(len(masks)):
        for i in range(masks.shape[2]):
            for j in range(masks.shape[3]):
                if owner[b, i, j] != 255:
                    total -= log_probability[b, owner[b, i, j], i, j]
    return total / owner.numel()


def classes(logits, rows, num_instances):
    target, weight = torch.zeros_like(logits), torch.ones_like(logits)
    if logits.shape[2] > THINGS:
        weight[:, :num_instances, THINGS:] = 0
        weight[:, num_instances:] = 0
        for c in range(CLASSES - THINGS):
            weight[:, num_instances + c, THINGS + c] = 1
    for b, k, label, _ in rows:
        target[b, k, label] = 1
    return (focal(logits, target) * weight).sum() / max(1, len(rows))


def segmentation(s0, targets, matches, num_instances):
    painted = torch.full((len(s0), *s0.shape[-2:]), s0.shape[1])
    for b, target in enumerate(targets):
        for label, mask in stuff_masks(target).items():
            painted[b][mask > 0] = label
    for b, _, label, mask in positives(targets, matches, num_instances, stuff=False):
        painted[b][mask > 0] = label
    one_hot = F.one_hot(painted, s0.shape[1] + 1)[..., :-1].permute(0, 3, 1, 2).double()
    return focal(s0, one_hot).sum() / max(1, (painted < s0.shape[1]).sum())


def cross_entropy(logits, labels):
    log_probability = resize(logits, labels.shape[1:]).double().log_softmax(1)
    total = 0.0
    for b, i, j in np.ndindex(*labels.shape):
        if labels[b, i, j] != 255:
            total -= log_probability[b, labels[b, i, j], i, j]
    return total / labels.numel()


# ---- Results: section 5.


def probabilities(masks, b):
    """Return masks at the original size, in the published order of steps."""
    p = resize(up2(masks[b : b + 1]).sigmoid(), (HEIGHT, WIDTH))
    height, width = INPUT_SIZES[b]
    return resize(p[..., :height, :width], ORIGINAL_SIZES[b])[0]


def published_instances(stage, b):
    scores = stage.logits[b].sigmoid().flatten()
    best = scores.argsort(descending=True)[:100]
    p = probabilities(stage.masks, b)
    num_classes = stage.logits.shape[2]
    return [(scores[i], int(i) % num_classes, p[int(i) // num_classes] > 0.5) for i in best]


def published_panoptic(stage, b, num_instances):
    """Return the exported map, 0 where nothing lies, and the number of segments kept."""
    cls = stage.logits[b].sigmoid()
    scores, labels = [], []
    for k in range(num_instances):
        scores.append(float(cls[k, :THINGS].max()))
        labels.append(int(cls[k, :THINGS].argmax()))
    for c in range(CLASSES - THINGS):
        scores.append(float(cls[num_instances + c, THINGS + c]))
        labels.append(THINGS + c)
    p = probabilities(stage.masks, b)
    weighted = torch.tensor(scores)[:, None, None] * p
    owner = np.zeros(ORIGINAL_SIZES[b], dtype=int)
    for i, j in np.ndindex(*owner.shape):
        owner[i, j] = int(weighted[:, i, j].argmax())
    ids, segments = np.zeros_like(owner), 0
    for k in sorted(range(len(scores)), key=lambda k: -scores[k]):
        if labels[k] < THINGS and scores[k] < 0.3:
            continue
        mine = owner == k
        area, own = mine.sum(), int((p[k] >= 0.5).sum())
        if area > 0 and own > 0 and area / own >= 0.6:
            ids[mine] = labels[k] + 1000 * segments
            segments += 1
    return ids, segments


# ---- The comparison.


@pytest.fixture
def published(tmp_path, one_thread):
    """Import a state dict, and return the loaded model with the published one."""

    def load(state):
        file = tmp_path / "published.pth"
        torch.save({"meta": {"epoch": 12}, "state_dict": state}, file)
        import_official(file, tmp_path / "imported")
        return load_model(tmp_path / "imported"), Published(state)

    return load


@pytest.fixture
def images():
    made = torch.zeros(2, 3, HEIGHT, WIDTH)
    generator = torch.Generator().manual_seed(5)
    for image, (height, width) in zip(made, INPUT_SIZES, strict=True):
        image[:, :height, :width] = torch.randn(3, height, width, generator=generator)
    return made


def things_and_stuff(*, stuff):
    """Overlapping rectangles, a class twice, and a map with void and a crowd of things."""
    generator = np.random.default_rng(3)
    targets = []
    for (height, width), labels in zip(INPUT_SIZES, ([0, 17, 17], [79, 3]), strict=True):
        masks = np.zeros((len(labels), height, width), dtype=np.uint8)
        semantic = np.full((height, width), 255, dtype=np.uint8)
        semantic[: height // 2] = generator.choice([80, 97, 132], (height // 2, width))
        semantic[height // 2 :, : width // 3] = 113
        semantic[-9:, -9:] = 5  # a crowd
        for mask, label in zip(masks, labels, strict=True):
            top, left = generator.integers(0, 30), generator.integers(0, 50)
            mask[top : top + 21, left : left + 27] = 1
            semantic[mask > 0] = label
        targets.append(
            Targets(
                labels=torch.tensor(labels),
                masks=torch.from_numpy(masks),
                semantic=torch.from_numpy(semantic) if stuff else None,
            )
        )
    return targets


def assert_equal(ours, theirs, what):
    assert ours.shape == theirs.shape, what
    error = float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())
    assert error <= TOLERANCE, f"{what}: {error:.1e}"


def assert_same_stages(output, stages):
    assert len(output.stages) == len(stages)
    for index, (ours, theirs) in enumerate(zip(output.stages, stages, strict=True)):
        assert_equal(ours.kernels, theirs.kernels, f"kernels {index}")
        assert_equal(ours.masks, theirs.masks, f"masks {index}")
        assert (ours.class_logits is None) == (theirs.logits is None)
        if theirs.logits is not None:
            assert_equal(ours.class_logits, theirs.logits, f"class logits {index}")


def assert_same_assignments(output, stages, targets, num_instances):
    ours = []
    for before in (0, 0, *range(1, len(stages) - 1)):
        stage = output.stages[before]
        ours.append([])
        for b, target in enumerate(targets):
            cost = assignment_cost(
                up2(stage.masks)[b, :num_instances],
                stage.class_logits[b, :num_instances, :THINGS] if before else None,
                quarter_masks(target.masks, (HEIGHT, WIDTH)),
                target.labels,
                LossConfig(),
            )
            (matches,) = match([cost])
            pairs = zip(matches.kernels.tolist(), matches.objects.tolist(), strict=True)
            ours[-1].append(list(pairs))
    assert ours == published_assignments(stages, targets, num_instances)


def assert_same_losses(terms, theirs):
    assert terms.named().keys() == theirs.keys()
    for name, value in theirs.items():
        assert float(terms.named()[name]) == pytest.approx(float(value), rel=TOLERANCE), name


SIZES = [
    ImageSize(input_size=shown, original_size=stored)
    for shown, stored in zip(INPUT_SIZES, ORIGINAL_SIZES, strict=True)
]


@torch.no_grad()
def test_a_panoptic_model_is_the_published_one(published, images):
    model, reference = published(detection_weights(classes=CLASSES, kernels=100, seed=12))
    output, (stages, s0) = model(images), reference.detect(images)
    assert_same_stages(output, stages)
    assert_equal(output.semantic, s0, "semantic logits")

    targets = things_and_stuff(stuff=True)
    assert_same_assignments(output, stages, targets, 100)
    losses = published_losses(stages, s0, targets, 100)
    assert_same_losses(model.criterion(output, targets), losses)

    kept = []
    for b, ours in enumerate(model.postprocess(output, SIZES)):
        ids, segments = published_panoptic(stages[-1], b, 100)
        assert np.array_equal(ours.ids.numpy(), ids)
        assert len(ours.segments) == segments
        kept += [segment.label < THINGS for segment in ours.segments]
    assert kept.count(True) >= 2
    assert kept.count(False) >= 2


@torch.no_grad()
def test_an_instance_model_is_the_published_one(published, images):
    """With deformable convolutions, coordinates and few kernels."""
    options = {"coordinates": True, "deformable": True}
    state = detection_weights(classes=THINGS, kernels=20, seed=2, **options)
    model, reference = published(state)
    output, (stages, s0) = model(images), reference.detect(images)
    assert_same_stages(output, stages)
    assert_equal(output.semantic, s0, "semantic logits")

    targets = things_and_stuff(stuff=False)
    assert_same_assignments(output, stages, targets, 20)
    losses = published_losses(stages, s0, targets, 20)
    assert_same_losses(model.criterion(output, targets), losses)

    for b, ours in enumerate(model.postprocess(output, SIZES)):
        theirs = published_instances(stages[-1], b)
        assert ours.labels.tolist() == [label for _, label, _ in theirs]
        assert_equal(ours.scores, torch.stack([score for score, _, _ in theirs]), "scores")
        assert torch.equal(ours.masks, torch.stack([mask for _, _, mask in theirs]))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["fcn", "pspnet", "deeplabv3", "upernet"])
def test_a_semantic_model_is_the_published_one(published, images, kind):
    """At an eighth of the published width; kernels are updated in two halves as there."""
    inner = 64 if kind == "upernet" else 32
    state = semantic_weights(kind, classes=9, channels=64, inner=inner, seed=4)
    model, reference = published(state)
    model.static.training = True  # the auxiliary classifier belongs to training
    output, (stages, auxiliary) = model(images), reference.classify(images, kind)
    assert_same_stages(output, stages)
    assert_equal(output.semantic, auxiliary, "auxiliary logits")

    targets, labels = [], torch.full((2, HEIGHT, WIDTH), 255)
    for b, (height, width) in enumerate(INPUT_SIZES):
        semantic = torch.from_numpy(np.random.default_rng(b).integers(0, 10, (height, width)))
        semantic[semantic == 9] = 255
        labels[b, :height, :width] = semantic
        empty = torch.zeros(0, height, width, dtype=torch.uint8)
        none = torch.zeros(0, dtype=torch.int64)
        targets.append(Targets(labels=none, masks=empty, semantic=semantic.byte()))
    theirs = {f"stage{s}/ce": cross_entropy(stages[s].masks, labels) for s in range(4)}
    theirs["seg"] = 0.4 * cross_entropy(auxiliary, labels)
    assert_same_losses(model.criterion(output, targets), theirs)

    for b, ours in enumerate(model.postprocess(output, SIZES)):
        height, width = INPUT_SIZES[b]
        logits = resize(stages[-1].masks[b : b + 1], (HEIGHT, WIDTH))[..., :height, :width]
        assert torch.equal(ours.labels.long(), resize(logits, ORIGINAL_SIZES[b])[0].argmax(0))
