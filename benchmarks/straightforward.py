"""The straightforward form of K-Net: what `core.py` measures against.

The same mathematics in the form of the published code (ZwwWayne/K-Net, commits 4a53205 and later,
on mmdet 2.17), pass by pass where a pass costs something. Nothing is slower than there, and
nothing is taken over from `knet_core` but types, modules that hold weights, and parts whose
published form is the same. Section numbers are those of KNET_SPEC.

- `predict`, the network, NCHW with batch normalisation as a layer of its own:
  - The pyramid's finest output convolution, then the one that halves its map (mmdet `FPN.forward`,
    `SemanticFPNWrapper.forward`); semantic logits of all classes, in inference too
    (`ConvKernelHead._decode_init_proposals`).
  - Each update transforms the whole map, groups by `einsum`, and convolves image by image
    (`KernelUpdateHead.forward`).
- `match` (`MaskHungarianAssigner.assign`): each cost takes its own sigmoid and its own products
  (`DiceCost`, `MaskCost`: agreement is a product of the masks and one of their complements).
- `panoptic_criterion` (`ConvKernelHead.forward_train`, `KernelIterHead.forward_train`):
  - Targets are enlarged or reduced once per image (`KNet.forward_train`), masks once per stage;
    the static masks a second time for the first update, which matches them again.
  - The matched masks and the others are copied (`MaskSamplingResult`).
  - Targets of all kernels, matched or not, are float arrays with weights of the same size that
    nobody reads, of things, of stuff, joined, and joined over images (`get_targets`).
  - Those of matched kernels are picked; each loss takes its own sigmoid; all targets become
    booleans for the rank loss, which paints kernel by kernel (`loss`).
  - Focal losses are against one-hot targets, a float for each class and pixel (mmdet
    `py_sigmoid_focal_loss`, its form on a CPU).
- `panoptic_map` (`rescale_masks`, `get_panoptic`, `merge_stuff_thing`): all masks are resized to
  the padded image, cut, and resized to the original before any two are compared; each segment then
  counts its pixels over the whole image.
- Layers of the backbone, norms, attention and the small products of kernels are the model's own:
  they are PyTorch's in both.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from knet_core.config import EvalConfig, LossConfig
from knet_core.models.kernel_head import PyramidKernels
from knet_core.models.kernel_update import KernelUpdateHead
from knet_core.models.knet import KNet
from knet_core.models.positional import sine_encoding
from knet_core.structures import ImageSize, KNetOutput, Segment, StageOutput, Targets

EPS = 1e-3
ALPHA = 0.25
NOBODY = 255


def predict(model: KNet, images: Tensor) -> KNetOutput:
    """Return what a panoptic or instance model predicts for images (B, 3, H, W) (section 1)."""
    static = model.static
    assert isinstance(static, PyramidKernels)
    maps = [
        lateral(feature)
        for lateral, feature in zip(static.fpn.laterals, model.backbone(images), strict=True)
    ]
    for level in range(len(maps) - 1, 0, -1):
        maps[level - 1] += F.interpolate(maps[level], size=maps[level - 1].shape[-2:])
    pyramid = [output(level) for output, level in zip(static.fpn.outputs, maps, strict=True)]
    _, channels, height, width = pyramid[-1].shape
    pyramid[-1] = pyramid[-1] + sine_encoding(height, width, channels, pyramid[-1])
    levels = [
        level(feature) for level, feature in zip(static.semantic_fpn.levels, pyramid, strict=True)
    ]
    total = levels[0] + levels[1] + levels[2] + levels[3]
    instances, semantics = (branch(total) for branch in static.semantic_fpn.branches)
    features = semantics + instances
    first = static.kernels(instances, semantics, features)
    stages = [first.stage]
    for head in model.updates:
        assert isinstance(head, KernelUpdateHead)
        stages.append(_update(head, features, stages[-1]))
    size = (images.shape[-2], images.shape[-1])
    return KNetOutput(stages=tuple(stages), semantic=first.semantic, padded_size=size)


def _update(head: KernelUpdateHead, features: Tensor, previous: StageOutput) -> StageOutput:
    """Return one round of kernel update (section 2)."""
    assert head.class_branch is not None
    mapped = head.feature_transform(features)
    groups = (previous.masks.sigmoid() > 0.5).float()
    group_features = torch.einsum("bnhw,bchw->bnc", groups, mapped)
    kernels = head.interaction(head.update(group_features, previous.kernels))
    dynamic = head.mask_branch(kernels)
    masks = [
        F.conv2d(mapped[image : image + 1], weight[..., None, None])
        for image, weight in enumerate(dynamic)
    ]
    return StageOutput(
        masks=torch.cat(masks), class_logits=head.class_branch(kernels), kernels=kernels
    )


def match(
    masks: Tensor,
    class_logits: Tensor | None,
    objects: Tensor,
    labels: Tensor,
    weights: LossConfig,
) -> tuple[Tensor, Tensor]:
    """Return (kernels, objects) of the cheapest assignment (section 4)."""
    cost = weights.dice * _dice_cost(masks, objects) + weights.mask * _mask_cost(masks, objects)
    if class_logits is not None:
        cost = cost + weights.cls * _class_cost(class_logits, labels)
    kernels, found = linear_sum_assignment(cost.detach().cpu())
    there = labels.device
    return torch.as_tensor(kernels, device=there), torch.as_tensor(found, device=there)


def _dice_cost(masks: Tensor, objects: Tensor) -> Tensor:
    probability = masks.sigmoid().flatten(1)
    target = objects.flatten(1).float()
    overlap = torch.einsum("np,gp->ng", probability, target)
    size = (probability * probability).sum(1) + EPS
    target_size = (target * target).sum(1) + EPS
    return -2 * overlap / (size[:, None] + target_size[None])


def _mask_cost(masks: Tensor, objects: Tensor) -> Tensor:
    probability = masks.sigmoid()
    target = objects.float()
    agree = torch.einsum("nhw,ghw->ng", probability, target)
    agree = agree + torch.einsum("nhw,ghw->ng", 1 - probability, 1 - target)
    return -agree / probability[0].numel()


def _class_cost(logits: Tensor, labels: Tensor) -> Tensor:
    score = logits.sigmoid()
    negative = -(1 - score + 1e-12).log() * (1 - ALPHA) * score.pow(2)
    positive = -(score + 1e-12).log() * ALPHA * (1 - score).pow(2)
    return positive[:, labels] - negative[:, labels]


def panoptic_criterion(
    output: KNetOutput, targets: Sequence[Targets], weights: LossConfig, *, num_things: int
) -> dict[str, Tensor]:
    """Return the weighted losses by the names of `LossTerms.named` (section 3).

    Every pixel must be labelled: what void pixels mean is not part of the comparison.
    """
    assert output.semantic is not None
    height, width = (8 * side for side in output.semantic.shape[-2:])
    num_classes = output.semantic.shape[1]
    num_stuff = num_classes - num_things
    num_instances = output.stages[0].masks.shape[1] - num_stuff
    objects = [_resize_objects(target.masks, (height, width)) for target in targets]
    stuff = [_stuff_objects(target, num_things, (height, width)) for target in targets]

    static = output.stages[0]
    masks = _upsample(static.masks[:, :num_instances])
    matches = [
        match(mask.detach(), None, there, target.labels, weights)
        for mask, there, target in zip(masks, objects, targets, strict=True)
    ]
    terms = _static_losses(
        masks, _upsample(output.semantic), matches, targets, objects, stuff, weights
    )
    previous = replace(static, masks=_upsample(static.masks.detach()))
    for number, stage in enumerate(output.stages[1:], start=1):
        large = replace(stage, masks=_upsample(stage.masks))
        matches = []
        for image, target in enumerate(targets):
            scores = None
            if previous.class_logits is not None:
                scores = previous.class_logits[image, :num_instances, :num_things].detach()
            before = previous.masks[image, :num_instances].detach()
            matches.append(match(before, scores, objects[image], target.labels, weights))
        losses = _stage_losses(large, matches, targets, objects, stuff, weights, num_things)
        terms |= {f"stage{number}/{name}": value for name, value in losses.items()}
        previous = large
    return terms


def _static_losses(
    masks: Tensor,
    semantic: Tensor,
    matches: Sequence[tuple[Tensor, Tensor]],
    targets: Sequence[Targets],
    objects: Sequence[Tensor],
    stuff: Sequence[tuple[Tensor, Tensor]],
    weights: LossConfig,
) -> dict[str, Tensor]:
    batch, num_kernels, height, width = masks.shape
    num_classes = semantic.shape[1]
    mask_targets: list[Tensor] = []
    positive = torch.zeros(batch, num_kernels, dtype=torch.bool, device=masks.device)
    painted = torch.full(
        (batch, height, width), num_classes, dtype=torch.int64, device=masks.device
    )
    for image, (kernels, found) in enumerate(matches):
        for label, area in zip(*stuff[image], strict=True):
            painted[image][area > 0] = label
        positive[image, kernels] = True
        mask_targets.append(_sampled(masks[image], kernels, objects[image][found]).targets)
        for there in found:
            painted[image][objects[image][there] > 0] = targets[image].labels[there]
    flat = semantic.permute(0, 2, 3, 1).reshape(-1, num_classes)
    seg = _focal(flat, painted.flatten()).sum() / max(int((painted < num_classes).sum()), 1)
    return {
        "seg": weights.seg * seg,
        **{
            f"stage0/{name}": value
            for name, value in _mask_losses(
                masks, torch.cat(mask_targets), positive, weights
            ).items()
        },
    }


def _stage_losses(
    stage: StageOutput,
    matches: Sequence[tuple[Tensor, Tensor]],
    targets: Sequence[Targets],
    objects: Sequence[Tensor],
    stuff: Sequence[tuple[Tensor, Tensor]],
    weights: LossConfig,
    num_things: int,
) -> dict[str, Tensor]:
    assert stage.class_logits is not None
    masks = stage.masks
    batch, num_rows, _, _ = masks.shape
    num_classes = stage.class_logits.shape[-1]
    num_instances = num_rows - (num_classes - num_things)
    labels = torch.full((batch, num_rows), num_classes, device=masks.device)
    counted = masks.new_zeros(batch, num_rows, num_classes)
    counted[:, :num_instances, :num_things] = 1
    for row in range(num_instances, num_rows):
        counted[:, row, row - num_instances + num_things] = 1
    mask_targets: list[Tensor] = []
    mask_weights: list[Tensor] = []
    positive = torch.zeros(batch, num_rows, dtype=torch.bool, device=masks.device)
    for image, (kernels, found) in enumerate(matches):
        labels[image, kernels] = targets[image].labels[found]
        positive[image, kernels] = True
        things = _sampled(masks[image, :num_instances], kernels, objects[image][found])
        classes, areas = stuff[image]
        rows = classes - num_things
        stuff_targets = _placed(areas, rows, num_rows - num_instances)
        stuff_weights = _placed(torch.ones_like(areas), rows, num_rows - num_instances)
        labels[image, rows + num_instances] = classes
        positive[image, rows + num_instances] = True
        mask_targets.append(torch.cat([things.targets, stuff_targets]))
        mask_weights.append(torch.cat([things.weights, stuff_weights]))
    torch.cat(mask_weights)
    focal = _focal(stage.class_logits.flatten(0, 1), labels.flatten()) * counted.flatten(0, 1)
    return {
        "cls": weights.cls * focal.sum() / max(int(positive.sum()), 1),
        **_mask_losses(masks, torch.cat(mask_targets), positive, weights),
    }


class _Sampled(NamedTuple):
    """What is made of the masks of one image before any loss."""

    masks: tuple[Tensor, Tensor]
    """(K, h, w) of the matched kernels, and of the others; only their sizes are read."""
    targets: Tensor
    """(N, h, w) for all kernels, 0 for those without an object."""
    weights: Tensor
    """(N, h, w), 1 in the rows of matched kernels; read by nobody."""


def _sampled(masks: Tensor, kernels: Tensor, areas: Tensor) -> _Sampled:
    matched = torch.zeros(len(masks), dtype=torch.bool, device=masks.device)
    matched[kernels] = True
    return _Sampled(
        masks=(masks[matched], masks[~matched]),
        targets=_placed(areas, kernels, len(masks)),
        weights=_placed(torch.ones_like(areas), kernels, len(masks)),
    )


def _placed(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    placed = values.new_zeros(num_rows, *values.shape[1:])
    placed[rows] = values
    return placed


def _mask_losses(
    masks: Tensor, mask_targets: Tensor, positive: Tensor, weights: LossConfig
) -> dict[str, Tensor]:
    chosen = positive.flatten()
    logits, wanted = masks.flatten(0, 1)[chosen], mask_targets[chosen]
    probability = logits.sigmoid().flatten(1)
    target = wanted.flatten(1)
    overlap = (probability * target).sum(1)
    sizes = (probability * probability).sum(1) + EPS + (target * target).sum(1) + EPS
    rank = torch.full(
        (len(masks), *masks.shape[-2:]), NOBODY, dtype=torch.int64, device=masks.device
    )
    covered = mask_targets.view(masks.shape).bool()
    for image, row in positive.nonzero():
        rank[image][covered[image, row]] = row
    per_pixel = F.cross_entropy(masks, rank, ignore_index=NOBODY, reduction="none")
    return {
        "mask": weights.mask * F.binary_cross_entropy_with_logits(logits, wanted),
        "dice": weights.dice * (1 - 2 * overlap / sizes).mean(),
        "rank": weights.rank * per_pixel.mean(),
    }


def _focal(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of each element (R, C); label C is background (section 3.2)."""
    num_classes = logits.shape[1]
    target = F.one_hot(labels, num_classes + 1)[:, :num_classes].to(logits)
    probability = logits.sigmoid()
    miss = (1 - probability) * target + probability * (1 - target)
    weight = (ALPHA * target + (1 - ALPHA) * (1 - target)) * miss.pow(2)
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none") * weight


def _resize_objects(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Return masks (G, height, width) padded to `size`, then resized to a quarter."""
    height, width = masks.shape[-2:]
    padded = F.pad(masks, (0, size[1] - width, 0, size[0] - height)).float()
    return _resize(padded[None], (size[0] // 4, size[1] // 4))[0]


def _stuff_objects(
    target: Targets, num_things: int, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return (labels, masks) of the stuff in an image, in increasing class order."""
    assert target.semantic is not None
    present = [label for label in target.semantic.unique() if num_things <= label < NOBODY]
    areas = [_resize_objects((target.semantic == label)[None], size)[0] for label in present]
    return torch.stack(present).long(), torch.stack(areas)


def _upsample(masks: Tensor) -> Tensor:
    return F.interpolate(masks, scale_factor=2, mode="bilinear", align_corners=False)


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def panoptic_map(
    stage: StageOutput, image: int, size: ImageSize, evaluation: EvalConfig, *, num_things: int
) -> tuple[Tensor, list[Segment]]:
    """Return the map of ids and its segments for one image of a batch (section 5.3)."""
    assert stage.class_logits is not None
    masks, scores = stage.masks[image], stage.class_logits[image].sigmoid()
    num_instances = len(masks) - (scores.shape[1] - num_things)
    input_size = tuple(8 * side for side in masks.shape[-2:])
    probability = _resize(_upsample(masks[None]).sigmoid(), (input_size[0], input_size[1]))
    probability = probability[..., : size.input_size[0], : size.input_size[1]]
    probability = _resize(probability, size.original_size)[0]

    thing_scores, thing_labels = scores[:num_instances, :num_things].max(dim=1)
    stuff_scores = scores[num_instances:, num_things:].diagonal()
    stuff_labels = torch.arange(num_things, scores.shape[1], device=scores.device)
    best = torch.cat([thing_scores, stuff_scores])
    labels = torch.cat([thing_labels, stuff_labels])

    owner = (best[:, None, None] * probability).argmax(dim=0)
    ids = torch.zeros(owner.shape, dtype=torch.int32, device=owner.device)
    segments: list[Segment] = []
    for row in best.argsort(descending=True).tolist():
        if row < num_instances and best[row] < evaluation.score_threshold:
            continue
        mine = owner == row
        area = int(mine.sum())
        whole = int((probability[row] >= 0.5).sum())
        if area and whole and area / whole >= evaluation.overlap_threshold:
            label = int(labels[row])
            segment = Segment(
                id=label + 1000 * (len(segments) + 1), label=label, score=float(best[row])
            )
            ids[mine] = segment.id
            segments.append(segment)
    return ids, segments
