"""From every stage's class maps to the training loss of semantic segmentation (KNET_SPEC 6.5)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from knet_core.config import LossConfig
from knet_core.losses import cross_entropy_map, map_losses
from knet_core.structures import IGNORE, KNetOutput, LossTerms, StageLosses, Targets


def semantic_criterion(
    output: KNetOutput, targets: Sequence[Targets], weights: LossConfig
) -> LossTerms:
    """Return the weighted cross-entropies of a batch of semantic targets.

    Each compares logits, enlarged to the size of the padded images, with the labels: a sum over
    labelled pixels divided by the number of all pixels, padding too, as published.

    Args:
        output: Prediction for a padded batch.
        targets: One per image, with `semantic`.
        weights: Its `ce` and `auxiliary`.
    """
    labels = _padded_labels(targets, output.padded_size)
    stages = tuple(
        StageLosses(ce=weights.ce * _cross_entropy(stage.masks, labels)) for stage in output.stages
    )
    seg = None
    if output.semantic is not None:
        seg = weights.auxiliary * _cross_entropy(output.semantic, labels)
    return LossTerms(stages=stages, seg=seg)


def _padded_labels(targets: Sequence[Targets], size: tuple[int, int]) -> Tensor:
    """Return all labels as one tensor (B, *size) uint8, `IGNORE` in padding."""
    maps: list[Tensor] = []
    for target in targets:
        assert target.semantic is not None, "the semantic task needs a semantic map"
        maps.append(target.semantic)
    padded = maps[0].new_full((len(maps), *size), IGNORE)
    for image, labels in zip(padded, maps, strict=True):
        image[: labels.shape[0], : labels.shape[1]] = labels
    return padded


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of logits (B, C, h, w), whatever their stride."""
    flat = torch.where(labels == IGNORE, -1, labels.long()).flatten(1)
    sums = map_losses(logits, flat, (labels.shape[1], labels.shape[2]), cross_entropy_map)
    return sums.sum() / labels.numel()
