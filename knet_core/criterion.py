"""From every stage's prediction to the training loss (Sec. 3.3).

Stage s is matched with the masks and scores of the stage before it; the static kernels are matched
with their own masks, and the first update keeps that assignment (as in the authors' code).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from knet_core.config import LossConfig
from knet_core.errors import NonFiniteError
from knet_core.losses import dice_loss, focal_loss_sum, mask_loss, quarter_masks
from knet_core.matching import match
from knet_core.structures import KNetOutput, LossTerms, Matches, StageLosses, StageOutput, Targets

MASK_STRIDE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """The matches of a batch as flat indices, one row per matched kernel (M rows)."""

    images: Tensor
    kernels: Tensor
    labels: Tensor
    masks: Tensor
    """(M, P) soft masks of the matched objects, stride 4, flattened."""


def criterion(output: KNetOutput, targets: Sequence[Targets], weights: LossConfig) -> LossTerms:
    """Return the weighted losses of a batch.

    Args:
        output: Prediction for a padded batch.
        targets: One per image.
        weights: Weight of each term and of each matching cost.

    Raises:
        NonFiniteError: A matching cost is NaN or infinite; names the image's place in the batch.
    """
    height, width = output.semantic.shape[-2:]
    size = (height * MASK_STRIDE, width * MASK_STRIDE)
    objects = [quarter_masks(target.masks, size) for target in targets]
    num_kernels = output.stages[0].masks.shape[1]
    num_matched = sum(min(len(target.labels), num_kernels) for target in targets)
    normaliser = _mean_over_workers(num_matched, output.semantic)

    static, *updates = output.stages
    masks = upsample2(static.masks)
    static_assignment = assignment = _assign(masks, None, targets, objects, weights)
    stages = [_stage_losses(static, masks, assignment, normaliser, weights)]
    for index, stage in enumerate(updates):
        if index > 0:
            assignment = _assign(masks, updates[index - 1].class_logits, targets, objects, weights)
        masks = upsample2(stage.masks)
        stages.append(_stage_losses(stage, masks, assignment, normaliser, weights))
    seg = _semantic_loss(upsample2(output.semantic), static_assignment)
    return LossTerms(stages=tuple(stages), seg=weights.seg * seg)


def upsample2(masks: Tensor) -> Tensor:
    """Resize (B, N, h, w) bilinearly to twice the size, in float32."""
    return F.interpolate(masks.float(), scale_factor=2, mode="bilinear", align_corners=False)


def _assign(
    masks: Tensor,
    class_logits: Tensor | None,
    targets: Sequence[Targets],
    objects: Sequence[Tensor],
    weights: LossConfig,
) -> Assignment:
    matches: list[Matches] = []
    for index, (target, target_masks) in enumerate(zip(targets, objects, strict=True)):
        scores = None if class_logits is None else class_logits[index].float()
        try:
            matches.append(match(masks[index], scores, target_masks, target.labels, weights))
        except NonFiniteError as error:
            raise NonFiniteError(f"image {index} of the batch: {error}") from error
    pairs = list(zip(matches, targets, objects, strict=True))
    return Assignment(
        images=torch.cat([torch.full_like(m.kernels, i) for i, m in enumerate(matches)]),
        kernels=torch.cat([m.kernels for m in matches]),
        labels=torch.cat([target.labels[m.objects] for m, target, _ in pairs]),
        masks=torch.cat([masks[m.objects].flatten(1) for m, _, masks in pairs]),
    )


def _stage_losses(
    stage: StageOutput,
    masks: Tensor,
    assignment: Assignment,
    normaliser: float,
    weights: LossConfig,
) -> StageLosses:
    """Losses of one stage; `masks` are its upsampled logits."""
    matched = masks[assignment.images, assignment.kernels].flatten(1)
    cls = None
    if stage.class_logits is not None:
        logits = stage.class_logits.float()
        positives = logits[assignment.images, assignment.kernels, assignment.labels]
        cls = weights.cls * focal_loss_sum(logits, positives) / max(normaliser, 1.0)
    return StageLosses(
        mask=weights.mask * mask_loss(matched, assignment.masks),
        dice=weights.dice * dice_loss(matched, assignment.masks),
        cls=cls,
    )


def _semantic_loss(logits: Tensor, assignment: Assignment) -> Tensor:
    """Focal loss of the semantic map (B, C, h, w); objects are painted in their kernels' order.

    Divided by the number of painted pixels, as published; a batch without any object would then be
    divided by one and drown every other gradient, so it is divided by its number of pixels.
    """
    batch, num_classes, height, width = logits.shape
    painted = torch.full(
        (batch, height * width), num_classes, dtype=torch.int64, device=logits.device
    )
    for image, label, mask in zip(
        assignment.images, assignment.labels, assignment.masks, strict=True
    ):
        painted[image] = torch.where(mask > 0, label, painted[image])
    images, pixels = (painted < num_classes).nonzero(as_tuple=True)
    positives = logits.flatten(2)[images, painted[images, pixels], pixels]
    return focal_loss_sum(logits, positives) / (len(positives) or painted.numel())


def _mean_over_workers(value: int, like: Tensor) -> float:
    if not (distributed.is_available() and distributed.is_initialized()):
        return float(value)
    total = torch.tensor(float(value), device=like.device)
    distributed.all_reduce(total)
    return total.item() / distributed.get_world_size()
