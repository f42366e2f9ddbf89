"""From every stage's kernels to the training loss, with and without stuff (Sec. 3.3).

Stage s is matched with the masks and scores of the stage before it; the static kernels are matched
with their own masks, and the first update keeps that assignment (as in the authors' code). A stuff
kernel is never matched: its class is in the image or not.

`compat="published"` repeats the released code: losses are means over groups of two images, one
GPU's share of a batch, and void and padding are negatives of the semantic loss. By default a batch
is one group, and nothing is learnt from pixels that nobody annotated. A pixel at stride 4 counts
as such where any of its central four is void, a crowd or padding, unless an object or stuff is
painted there.

Shapes:  B images · N instance kernels · R all kernels, stuff last · P pixels at stride 4
         M kernels with a mask to learn, of all images
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from knet_core.config import Compat, LossConfig
from knet_core.losses import (
    cross_entropy_map,
    focal_loss_sum,
    focal_map,
    map_losses,
    mask_and_dice,
    on_the_spot,
    upsample2,
)
from knet_core.matching import assignment_cost, match
from knet_core.structures import (
    IGNORE,
    KNetOutput,
    LossTerms,
    Matches,
    StageLosses,
    StageOutput,
    Targets,
)
from knet_core.truth import Truth, batch_truth, draw_points

_PUBLISHED_GROUP = 2
"""Images per GPU in every published recipe."""
_ROWS_AT_ONCE = 32
"""Masks enlarged together: 8 MB each way at 800x1216."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Kernels with a mask to learn, in order of images, then of kernels."""

    counts: tuple[int, ...]
    """Rows of each image."""
    images: Tensor
    """(M,) int64."""
    kernels: Tensor
    """(M,) int64."""
    regions: Tensor
    """(M,) int64, of `Truth`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Assignment:
    things: _Rows
    """Matched instance kernels."""
    all: _Rows
    """And the kernels of stuff that is there."""
    costs: tuple[Tensor, ...]
    """Matching costs (N, G) of each image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """What the losses of all stages share."""

    truth: Truth
    weights: LossConfig
    num_kernels: int
    """N."""
    num_things: int
    num_positive: Callable[[], Tensor]
    """Returns how many kernels have a class to learn in each update, a mean over all workers."""
    compat: Compat

    @property
    def size(self) -> int:
        return len(self.truth.num_objects)

    @property
    def group(self) -> int:
        """Images whose losses are one mean."""
        return _PUBLISHED_GROUP if self.compat == "published" else self.size

    @property
    def num_groups(self) -> int:
        return -(-self.size // self.group)


def kernel_criterion(
    output: KNetOutput,
    targets: Sequence[Targets],
    weights: LossConfig,
    *,
    num_things: int,
    compat: Compat,
) -> LossTerms:
    """Return the weighted losses of a batch of instance or panoptic targets.

    Args:
        output: Prediction for a padded batch.
        targets: One per image.
        weights: Weight of each term and of each matching cost.
        num_things: Classes that are matched; the others are stuff, each with a kernel of its own.
        compat: `published` repeats the released code's quirks (ADR 0007).

    Raises:
        NonFiniteError: A matching cost is NaN or infinite; names the image's place in the batch.
    """
    assert output.semantic is not None
    num_classes = output.semantic.shape[1]
    static, *updates = output.stages
    points = None
    if weights.points is not None:
        points = draw_points(len(targets), weights.points)
        points = points.to(static.masks.device, non_blocking=True)
    truth = batch_truth(
        targets,
        output.padded_size,
        num_things=num_things,
        num_classes=num_classes,
        points=points,
    )
    num_kernels = static.masks.shape[1] - (num_classes - num_things)
    # Known before anything is matched, whatever the matches: workers wait for each other once,
    # and not before they need to.
    num_positive = sum(min(num_kernels, count) for count in truth.num_objects)
    num_positive += sum(len(labels) for labels in truth.stuff)
    batch = _Batch(
        truth=truth,
        weights=weights,
        num_kernels=num_kernels,
        num_things=num_things,
        num_positive=_mean_over_workers(num_positive, static.masks.device),
        compat=compat,
    )

    assignment = _assign(static, batch)
    costs = assignment.costs
    owners = _paint(assignment.things, batch)
    seg = _semantic_loss(output.semantic, assignment.things, owners, batch)
    stages = [_static_losses(static, assignment.things, owners, batch)]
    for index, stage in enumerate(updates):
        if index > 0:
            assignment = _assign(updates[index - 1], batch)
            costs += assignment.costs
            owners = _paint(assignment.things, batch) if weights.rank else owners
        stages.append(_update_losses(stage, assignment, owners, batch))
    return LossTerms(stages=tuple(stages), seg=weights.seg * seg, costs=costs)


@torch.no_grad()
def _assign(stage: StageOutput, batch: _Batch) -> _Assignment:
    """Match the instance kernels of a stage, and add the kernels of stuff."""
    truth = batch.truth
    costs: list[Tensor] = []
    for image in range(batch.size):
        objects = truth.objects(image)
        if not truth.num_objects[image]:
            costs.append(truth.masks.new_zeros(batch.num_kernels, 0))
            continue
        scores = None
        if stage.class_logits is not None:
            scores = stage.class_logits[image, : batch.num_kernels, : batch.num_things].float()
        masks = stage.masks[image, None, : batch.num_kernels]
        masks = upsample2(masks.contiguous(memory_format=torch.channels_last))[0]
        seen = truth.see(masks, image)
        costs.append(
            assignment_cost(
                seen, scores, truth.masks[objects], truth.labels[objects], batch.weights
            )
        )
    matches = match(costs)
    device = stage.masks.device
    things = _rows(matches, batch, with_stuff=False, device=device)
    if not any(truth.stuff):
        return _Assignment(things=things, all=things, costs=tuple(costs))
    everything = _rows(matches, batch, with_stuff=True, device=device)
    return _Assignment(things=things, all=everything, costs=tuple(costs))


def _rows(
    matches: Sequence[Matches], batch: _Batch, *, with_stuff: bool, device: torch.device
) -> _Rows:
    """Put the matches of all images, and the stuff, into one list of rows on the device."""
    truth = batch.truth
    next_stuff = sum(truth.num_objects)
    rows: list[Tensor] = []
    for image, found in enumerate(matches):
        kernels, regions = found.kernels, found.objects + truth.objects(image).start
        if with_stuff:
            labels = torch.tensor(truth.stuff[image], dtype=torch.int64)
            stuff_regions = torch.arange(next_stuff, next_stuff + len(labels))
            kernels = torch.cat([kernels, batch.num_kernels + labels - batch.num_things])
            regions = torch.cat([regions, stuff_regions])
            next_stuff += len(labels)
        rows.append(torch.stack([torch.full_like(kernels, image), kernels, regions]))
    images, kernels, regions = torch.cat(rows, dim=1).to(device, non_blocking=True)
    return _Rows(
        counts=tuple(row.shape[1] for row in rows),
        images=images,
        kernels=kernels,
        regions=regions,
    )


def _paint(things: _Rows, batch: _Batch) -> Tensor:
    """Return the instance kernel that owns each pixel (B, P), -1 where none does.

    An object takes every pixel where its soft mask is above 0; of several, the last kernel's wins.
    """
    owners: list[Tensor] = []
    counts = list(things.counts)
    kernels = torch.split(things.kernels.to(torch.int32), counts)
    for own, regions in zip(kernels, torch.split(things.regions, counts), strict=True):
        covered = batch.truth.covered[regions]
        if len(own):
            owners.append(torch.where(covered, own[:, None], -1).amax(0))
        else:
            owners.append(own.new_full(covered.shape[1:], -1))
    return torch.stack(owners).long()


def _static_losses(
    stage: StageOutput, things: _Rows, owners: Tensor, batch: _Batch
) -> StageLosses:
    """Losses of the static kernels: of instances alone, stuff learns from the semantic map."""
    mask, dice = _mask_losses(stage, things, batch)
    rank = None
    if batch.weights.rank:
        rank = batch.weights.rank * _rank_loss(stage.masks[:, : batch.num_kernels], owners, batch)
    return StageLosses(mask=mask, dice=dice, rank=rank)


def _update_losses(
    stage: StageOutput, assignment: _Assignment, owners: Tensor, batch: _Batch
) -> StageLosses:
    """Losses after an update, of things and stuff together."""
    mask, dice = _mask_losses(stage, assignment.all, batch)
    rank = None
    if batch.weights.rank:
        stuff = batch.truth.stuff_map
        owners = torch.where(stuff >= 0, stuff - batch.num_things + batch.num_kernels, owners)
        rank = batch.weights.rank * _rank_loss(stage.masks, owners, batch)
    return StageLosses(
        mask=mask, dice=dice, cls=_class_loss(stage, assignment.all, batch), rank=rank
    )


def _mask_losses(stage: StageOutput, rows: _Rows, batch: _Batch) -> tuple[Tensor, Tensor]:
    """Return the weighted mask and dice losses of a stage's rows, 0 where there are none."""
    truth = batch.truth
    logits = stage.masks[rows.images, rows.kernels].float().contiguous()
    pieces, images = _pieces(rows.counts if truth.points is not None else [sum(rows.counts)])
    values = on_the_spot(
        logits,
        lambda masks, piece: truth.see(upsample2(masks[None]).squeeze(0), images[piece]),
        lambda seen, piece: mask_and_dice(seen, truth.masks[rows.regions[pieces[piece]]]),
        pieces,
        num_losses=2,
    )
    shares = torch.tensor(_shares(rows.counts, batch.group), dtype=torch.float32)
    mask, dice = (values * shares.to(values.device, non_blocking=True)).sum(1)
    return batch.weights.mask * mask, batch.weights.dice * dice


def _pieces(counts: Sequence[int]) -> tuple[list[slice], list[int]]:
    """Cut rows into pieces that are within one image each; return them and their images.

    Only points differ from image to image: without them a batch may count as one image.
    """
    pieces: list[slice] = []
    images: list[int] = []
    start = 0
    for image, count in enumerate(counts):
        for offset in range(start, start + count, _ROWS_AT_ONCE):
            pieces.append(slice(offset, min(offset + _ROWS_AT_ONCE, start + count)))
            images.append(image)
        start += count
    return pieces, images


def _shares(counts: Sequence[int], group: int) -> list[float]:
    """Return each row's weight in the mean over groups of the mean over a group's rows."""
    totals = [sum(counts[start : start + group]) for start in range(0, len(counts), group)]
    return [
        1 / (len(totals) * totals[image // group])
        for image, count in enumerate(counts)
        for _ in range(count)
    ]


def _class_loss(stage: StageOutput, rows: _Rows, batch: _Batch) -> Tensor:
    """Return the weighted focal loss of class scores.

    An instance kernel is scored for things only, a stuff kernel for its own class only.
    """
    assert stage.class_logits is not None
    logits = stage.class_logits.float()
    things = logits[:, : batch.num_kernels, : batch.num_things]
    stuff = logits[:, batch.num_kernels :, batch.num_things :].diagonal(dim1=1, dim2=2)
    labels = batch.truth.labels[rows.regions]
    positives = logits[rows.images, rows.kernels, labels]
    total = focal_loss_sum(torch.cat([things.flatten(), stuff.flatten()]), positives)
    num_positive = batch.num_positive() / batch.num_groups
    return batch.weights.cls * total / batch.num_groups / num_positive.clamp(min=1)


def _rank_loss(masks: Tensor, owners: Tensor, batch: _Batch) -> Tensor:
    """Return the cross-entropy over competing kernels (B, R, h, w), a mean over all pixels.

    Pixels that no kernel owns (-1) count in the mean, as published.
    """
    if batch.compat == "published":
        # There the mark of a pixel to be left out is also a kernel's number.
        owners = owners.where(owners != IGNORE, -1)
    values = map_losses(masks, owners, batch.truth.size, cross_entropy_map)
    shares = torch.tensor(_shares([1] * batch.size, batch.group), dtype=torch.float32)
    return (values * shares.to(values.device, non_blocking=True)).sum() / owners.shape[1]


def _semantic_loss(logits: Tensor, things: _Rows, owners: Tensor, batch: _Batch) -> Tensor:
    """Return the focal loss of the semantic map (B, C, h, w); instances are painted over stuff.

    Divided by the number of painted pixels, as published. A batch without any would then be
    divided by one and drown every other gradient, so it is divided by its number of pixels.
    """
    truth = batch.truth
    num_classes = logits.shape[1]
    labels = truth.stuff_map
    if batch.compat == "none":
        labels = torch.where((labels < 0) & ~truth.undecided, num_classes, labels)
    else:
        labels = labels.where(labels >= 0, num_classes)
    by_kernel = labels.new_zeros(batch.size, batch.num_kernels)
    by_kernel[things.images, things.kernels] = truth.labels[things.regions]
    labels = torch.where(owners >= 0, by_kernel.gather(1, owners.clamp(min=0)), labels)

    values = map_losses(logits, labels, truth.size, focal_map)
    counts = ((labels >= 0) & (labels < num_classes)).sum(1)
    if batch.compat == "none":
        counts = torch.where(counts.sum() > 0, counts, (labels >= 0).sum(1))
    groups = zip(torch.split(values, batch.group), torch.split(counts, batch.group), strict=True)
    return torch.stack([value.sum() / count.sum().clamp(min=1) for value, count in groups]).mean()


def _mean_over_workers(number: int, device: torch.device) -> Callable[[], Tensor]:
    """Start an exchange among the workers, and return what waits for the mean."""
    total = torch.full((), float(number), device=device)
    if not (distributed.is_available() and distributed.is_initialized()):
        return lambda: total
    work = distributed.all_reduce(total, async_op=True)

    def mean() -> Tensor:
        work.wait()
        return total / distributed.get_world_size()

    return mean
