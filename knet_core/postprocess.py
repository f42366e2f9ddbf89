"""From one stage's logits to instances or classes at the size of the image on disk.

Panoptic maps have a file of their own, `knet_core.panoptic_paste`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from knet_core.resizing import chunks, resize_probabilities, running_argmax, to_original
from knet_core.structures import ImageSize, Instances, SemanticMap, StageOutput

MASK_THRESHOLD = 0.5


@torch.no_grad()
def instances(
    stage: StageOutput, sizes: Sequence[ImageSize], *, max_detections: int
) -> list[Instances]:
    """Return each image's `max_detections` best (kernel, class) pairs, best first (spec 5.2).

    The score is the class probability; one kernel may appear under several classes. There is no
    threshold and no suppression of overlaps.
    """
    assert stage.class_logits is not None
    scores = stage.class_logits.float().sigmoid()
    num_classes = scores.shape[-1]
    results = []
    for image_scores, masks, size in zip(scores, stage.masks, sizes, strict=True):
        flat = image_scores.flatten()
        best, index = flat.topk(min(max_detections, len(flat)))
        results.append(
            Instances(
                scores=best,
                labels=index % num_classes,
                masks=_binary_masks(masks, index // num_classes, size),
            )
        )
    return results


def _binary_masks(masks: Tensor, kernels: Tensor, size: ImageSize) -> Tensor:
    """Return the masks (K, H0, W0) of the kernels (K,), each resized once however often it occurs.

    Args:
        masks: (N, h, w) logits.
        kernels: Rows of `masks`, in any order.
        size: Of the image.
    """
    result = torch.empty(
        (len(kernels), *size.original_size), dtype=torch.bool, device=masks.device
    )
    different, place = torch.unique(kernels, return_inverse=True)
    for part in chunks(len(different)):
        found = resize_probabilities(masks[different[part]], size) > MASK_THRESHOLD
        rows = ((place >= part.start) & (place < part.stop)).nonzero().flatten()
        result[rows] = found[place[rows] - part.start]
    return result


@torch.no_grad()
def semantic_maps(
    stage: StageOutput, sizes: Sequence[ImageSize], *, padded_size: tuple[int, int]
) -> list[SemanticMap]:
    """Return the likeliest class of every pixel (spec 6.6, "whole").

    Logits are resized to the padded input and, without the padding, to the original; a softmax
    would not change which is greatest.

    Args:
        stage: One mask per class.
        sizes: One per image.
        padded_size: (H, W) of the padded batch.
    """
    results = []
    for masks, size in zip(stage.masks, sizes, strict=True):
        logits = masks.float().contiguous()
        winner = running_argmax(
            to_original(logits[None, part], padded_size, size)[0] for part in chunks(len(logits))
        )
        results.append(SemanticMap(labels=winner.to(torch.uint8)))
    return results
