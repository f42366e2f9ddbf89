"""Ground truth of a batch as the kernels' losses see it: at stride 4, things and stuff alike.

A value at stride 4 stands for the central 2x2 of its 4x4 pixels, as bilinear interpolation does.

Shapes:  B images · G objects of all images · S stuff regions of all images · h, w stride-4 maps
         P = h * w pixels, or the points sampled from them
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from knet_core.losses import quarter_masks
from knet_core.structures import IGNORE, Targets


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """What a batch shows, on the device; regions are its objects, then its stuff."""

    size: tuple[int, int]
    """(h, w)."""
    labels: Tensor
    """(G + S,) int64, class of each region."""
    masks: Tensor
    """(G + S, P) soft masks in [0, 1]."""
    covered: Tensor
    """(G, h * w) bool, where an object's soft mask is above 0."""
    num_objects: tuple[int, ...]
    """Objects of each image; they lie in order of their images."""
    stuff: tuple[tuple[int, ...], ...]
    """Labels of the stuff in each image, increasing; stuff lies in order of its images."""
    stuff_map: Tensor
    """(B, h * w) int64, label of the stuff at a pixel, -1 elsewhere; of two the higher wins."""
    undecided: Tensor
    """(B, h * w) bool: void, a crowd or padding among the four pixels."""
    points: Tensor | None
    """(B, P, 2) x and y in [0, 1]; None stands for all pixels."""

    def see(self, maps: Tensor, image: int) -> Tensor:
        """Return the values (M, P) of maps (M, h, w) where the masks are compared."""
        return read(maps, None if self.points is None else self.points[image])

    def objects(self, image: int) -> slice:
        """Return the regions that are objects of one image."""
        start = sum(self.num_objects[:image])
        return slice(start, start + self.num_objects[image])


def draw_points(batch: int, number: int) -> Tensor:
    """Return points (batch, number, 2), uniform in [0, 1], from torch's generator of the CPU."""
    return torch.rand(batch, number, 2)


def read(maps: Tensor, points: Tensor | None) -> Tensor:
    """Return maps (M, h, w) as rows (M, P): all pixels, or bilinearly at points (P, 2)."""
    if points is None:
        return maps.flatten(1)
    grid = (2 * points - 1)[None, None]
    # Beyond the outermost pixels' centres the map goes on as it is there.
    sampled = F.grid_sample(maps[None], grid, padding_mode="border", align_corners=False)
    return sampled[0, :, 0]


def batch_truth(
    targets: Sequence[Targets],
    size: tuple[int, int],
    *,
    num_things: int,
    num_classes: int,
    points: Tensor | None,
) -> Truth:
    """Bring the targets of a batch to stride 4.

    Args:
        targets: One per image; `semantic` is needed where there is stuff.
        size: (H, W) of the padded images, multiples of 4.
        num_things: Classes that are objects; the others are stuff.
        num_classes: Both together.
        points: As in `Truth`.
    """
    present = _present_stuff(targets, num_things, num_classes)
    device = targets[0].labels.device
    stuff_labels = torch.tensor([label for row in present for label in row], dtype=torch.int64)
    stuff_labels = stuff_labels.to(device, non_blocking=True)
    classes = torch.split(stuff_labels, [len(row) for row in present])
    objects: list[Tensor] = []
    covered: list[Tensor] = []
    stuff: list[Tensor] = []
    stuff_maps: list[Tensor] = []
    undecided: list[Tensor] = []
    for image, target in enumerate(targets):
        where = None if points is None else points[image]
        quarters = quarter_masks(target.masks, size)
        covered.append(quarters.flatten(1) > 0)
        objects.append(read(quarters, where))
        central = _central_labels(target, size)
        same = central == classes[image][:, None, None, None]
        stuff.append(read(same.sum(1, dtype=torch.float32) * 0.25, where))
        is_stuff = (central >= num_things) & (central < num_classes)
        stuff_maps.append(torch.where(is_stuff, central.long(), -1).amax(0).flatten())
        undecided.append((central == IGNORE).any(0).flatten())
    return Truth(
        size=(size[0] // 4, size[1] // 4),
        labels=torch.cat([*(target.labels for target in targets), stuff_labels]),
        masks=torch.cat([*objects, *stuff]),
        covered=torch.cat(covered),
        num_objects=tuple(len(target.labels) for target in targets),
        stuff=present,
        stuff_map=torch.stack(stuff_maps),
        undecided=torch.stack(undecided),
        points=points,
    )


def _present_stuff(
    targets: Sequence[Targets], num_things: int, num_classes: int
) -> tuple[tuple[int, ...], ...]:
    """Return the stuff labels in each image, at full resolution; the host waits once."""
    if num_things == num_classes:
        return tuple(() for _ in targets)
    counts: list[Tensor] = []
    for target in targets:
        assert target.semantic is not None, "targets with stuff need a semantic map"
        counts.append(torch.bincount(target.semantic.flatten(), minlength=IGNORE + 1))
    present = torch.stack(counts)[:, num_things:num_classes].cpu() > 0
    return tuple(
        tuple(num_things + index for index, found in enumerate(row) if found)
        for row in present.tolist()
    )


def _central_labels(target: Targets, size: tuple[int, int]) -> Tensor:
    """Return the labels (4, h, w) of each quarter pixel's central four, `IGNORE` in padding."""
    semantic = target.semantic
    if semantic is None:
        # Everything inside the image is decided; which thing it shows is never read.
        semantic = target.masks.new_zeros(target.masks.shape[-2:])
    height, width = semantic.shape
    semantic = F.pad(semantic, (0, size[1] - width, 0, size[0] - height), value=IGNORE)
    return torch.stack([semantic[top::4, left::4] for top in (1, 2) for left in (1, 2)])
