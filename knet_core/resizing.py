"""From the network's maps to the size of the image on disk, in the published order of resizes.

Shapes:  K maps of one image · h, w the network's map · H, W the padded input · H0, W0 on disk
Maps go through in chunks of `CHUNK`, so that no array of K x H0 x W0 floats is ever made.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from knet_core.losses import MASK_STRIDE
from knet_core.structures import ImageSize

CHUNK = 16
"""Maps resized at a time: 62 MB of float32 at 800 x 1216, where all 153 would take 595 MB."""


_SMALL = 128
"""Torch resizes to H + W up to this on another path of its own (seen in 2.15 on a CPU)."""
_COLOURS = 3


def resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (B, K, h, w) bilinearly; maps of that size already are returned as they are.

    A map comes out with the same bits whichever others are resized with it, but for outputs so
    small that `rounds_alike` is false.
    """
    if tuple(maps.shape[-2:]) == size:
        return maps
    count = maps.shape[1]
    if count == _COLOURS:  # torch takes them for a picture and rounds otherwise
        maps = torch.cat([maps, maps[:, :1]], dim=1)
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)[:, :count]


def to_original(maps: Tensor, padded_size: tuple[int, int], size: ImageSize) -> Tensor:
    """Bring maps (B, K, h, w) to the padded input and, cut to the image, to (B, K, H0, W0)."""
    height, width = size.input_size
    return resize(resize(maps, padded_size)[..., :height, :width], size.original_size)


def resize_probabilities(masks: Tensor, size: ImageSize) -> Tensor:
    """Bring mask logits (K, h, w) at stride 8 to probabilities (K, H0, W0); spec 5.1.

    They become probabilities at stride 4, before they are resized further.
    """
    height, width = masks.shape[-2:]
    probabilities = resize(masks[None].float().contiguous(), (2 * height, 2 * width)).sigmoid()
    return to_original(probabilities, (height * MASK_STRIDE, width * MASK_STRIDE), size)[0]


def rounds_alike(masks: Tensor, size: ImageSize) -> bool:
    """Return whether the probabilities of masks (K, h, w) do not depend on which are resized.

    To small sizes torch rounds positions and sums by a map's place among the others.
    """
    height, width = masks.shape[-2:]
    steps = (2 * (height + width), MASK_STRIDE * (height + width), sum(size.original_size))
    return min(steps) > _SMALL


def chunks(length: int) -> Iterator[slice]:
    """Return consecutive slices of at most `CHUNK` that cover `length` rows."""
    for start in range(0, length, CHUNK):
        yield slice(start, min(start + CHUNK, length))


def running_argmax(parts: Iterable[Tensor]) -> Tensor:
    """Return the argmax over dimension 0 of the parts put together, holding one part at a time.

    Of equal values the first wins, as in `torch.argmax`.

    Args:
        parts: (k_i, ...) each, at least one.
    """
    best = winner = None
    offset = 0
    for part in parts:
        value, index = part.max(dim=0)
        index += offset
        offset += len(part)
        if best is None or winner is None:
            best, winner = value, index
            continue
        better = value > best
        best = torch.where(better, value, best)
        winner = torch.where(better, index, winner)
    assert winner is not None
    return winner
