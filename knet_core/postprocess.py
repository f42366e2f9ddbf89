"""From the last stage's logits to instances at the size of the image on disk."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from knet_core.criterion import MASK_STRIDE, upsample2
from knet_core.structures import ImageInfo, Instances, StageOutput

MASK_THRESHOLD = 0.5


@torch.no_grad()
def instances(
    stage: StageOutput, infos: Sequence[ImageInfo], max_detections: int
) -> list[Instances]:
    """Return each image's `max_detections` best (kernel, class) pairs, best first.

    The score is the class probability; one kernel may appear under several classes. There is no
    threshold and no suppression of overlaps.
    """
    assert stage.class_logits is not None
    scores = stage.class_logits.float().sigmoid()
    num_classes = scores.shape[-1]
    results = []
    for image_scores, masks, info in zip(scores, stage.masks, infos, strict=True):
        flat = image_scores.flatten()
        best, index = flat.topk(min(max_detections, len(flat)))
        kernels, place = (index // num_classes).unique(return_inverse=True)
        results.append(
            Instances(
                scores=best,
                labels=index % num_classes,
                masks=(resize_probabilities(masks[kernels], info) > MASK_THRESHOLD)[place],
            )
        )
    return results


def resize_probabilities(masks: Tensor, info: ImageInfo) -> Tensor:
    """Bring mask logits (K, h, w) of one image to probabilities (K, H0, W0).

    The order is the published one: probabilities, to the padded input, crop, to the original.
    """
    height, width = (side * MASK_STRIDE for side in masks.shape[-2:])
    probability = upsample2(masks[None]).sigmoid()
    probability = _resize(probability, (height, width))
    probability = probability[..., : info.input_size[0], : info.input_size[1]]
    return _resize(probability, info.original_size)[0]


def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(maps.shape[-2:]) == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
