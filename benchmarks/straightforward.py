"""The straightforward form of K-Net's losses and results: what `core.py` measures against.

The same mathematics as a reader of the specification would write it down, with the habits of the
published code where they cost something. Of `knet_core` it takes only the types of its inputs, and
nothing is slower than the published form. Sections are those of KNET_SPEC.

- Matching: each cost term takes its own sigmoid and its own products with the objects; agreement
  of masks is a product of the masks and one of their complements.
- Losses: masks are enlarged once per stage, and serve their own loss and the next matching; the
  targets of all kernels, matched or not, are one (B, R, h, w) float array per stage, from which
  those of matched kernels are picked; each term takes its own sigmoid; focal losses are against
  one-hot targets, a float for each class and pixel; labels are painted object by object.
- Panoptic maps: all masks are resized to the padded image, cut, and resized to the original
  before any two are compared; each segment then counts its pixels over the whole image.
- The network is not here: `core.py` runs the modules as they are built, NCHW, with batch
  normalisation as a layer of its own.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from knet_core.config import EvalConfig, LossConfig
from knet_core.structures import ImageSize, KNetOutput, Segment, StageOutput, Targets

EPS = 1e-3
ALPHA = 0.25
NOBODY = 255


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
    previous: StageOutput | None = None
    for number, stage in enumerate(output.stages[1:], start=1):
        if previous is not None:
            assert previous.class_logits is not None
            matches = [
                match(
                    mask[:num_instances].detach(),
                    scores[:num_instances, :num_things].detach(),
                    there,
                    target.labels,
                    weights,
                )
                for mask, scores, there, target in zip(
                    previous.masks, previous.class_logits, objects, targets, strict=True
                )
            ]
        large = replace(stage, masks=_upsample(stage.masks))
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
    mask_targets = masks.new_zeros(batch, num_kernels, height, width)
    positive = torch.zeros(batch, num_kernels, dtype=torch.bool, device=masks.device)
    painted = torch.full(
        (batch, height, width), num_classes, dtype=torch.int64, device=masks.device
    )
    for image, (kernels, found) in enumerate(matches):
        for label, area in zip(*stuff[image], strict=True):
            painted[image][area > 0] = label
        for kernel, there in zip(kernels, found, strict=True):
            mask_targets[image, kernel] = objects[image][there]
            positive[image, kernel] = True
            painted[image][objects[image][there] > 0] = targets[image].labels[there]
    flat = semantic.permute(0, 2, 3, 1).reshape(-1, num_classes)
    seg = _focal(flat, painted.flatten()).sum() / max(int((painted < num_classes).sum()), 1)
    return {
        "seg": weights.seg * seg,
        **{
            f"stage0/{name}": value
            for name, value in _mask_losses(masks, mask_targets, positive, weights).items()
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
    mask_targets = torch.zeros_like(masks)
    positive = torch.zeros(batch, num_rows, dtype=torch.bool, device=masks.device)
    for image, (kernels, found) in enumerate(matches):
        labels[image, kernels] = targets[image].labels[found]
        mask_targets[image, kernels] = objects[image][found]
        positive[image, kernels] = True
        classes, areas = stuff[image]
        rows = classes - num_things + num_instances
        labels[image, rows] = classes
        mask_targets[image, rows] = areas
        positive[image, rows] = True
    focal = _focal(stage.class_logits.flatten(0, 1), labels.flatten()) * counted.flatten(0, 1)
    return {
        "cls": weights.cls * focal.sum() / max(int(positive.sum()), 1),
        **_mask_losses(masks, mask_targets, positive, weights),
    }


def _mask_losses(
    masks: Tensor, mask_targets: Tensor, positive: Tensor, weights: LossConfig
) -> dict[str, Tensor]:
    logits, wanted = masks[positive], mask_targets[positive]
    probability = logits.sigmoid().flatten(1)
    target = wanted.flatten(1)
    overlap = (probability * target).sum(1)
    sizes = (probability * probability).sum(1) + EPS + (target * target).sum(1) + EPS
    rank = torch.full(
        (len(masks), *masks.shape[-2:]), NOBODY, dtype=torch.int64, device=masks.device
    )
    for image, row in positive.nonzero():
        rank[image][mask_targets[image, row] > 0] = row
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
