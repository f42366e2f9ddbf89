"""From one stage's logits to panoptic maps: kernels compete for pixels (spec 5.3).

This file holds the rules and their plain form, which looks at every kernel at every pixel;
`knet_core.panoptic_tiles` finds the same owners and areas several times faster on a CPU.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from knet_core.config import Compat, EvalConfig
from knet_core.panoptic_tiles import TiledContest
from knet_core.resizing import chunks, resize_probabilities, rounds_alike, running_argmax
from knet_core.structures import ImageSize, PanopticMap, Segment, StageOutput

ID_STEP = 1000
"""A segment's id is its label + this * its rank."""
MASK_THRESHOLD = 0.5


class Contest(Protocol):
    """Which of K kernels owns each pixel of an image, and which hold enough of their masks."""

    def owners(self) -> Tensor:
        """Return the row of the greatest score * probability, the first of equals: (H0, W0)."""

    def hold(self, rows: Sequence[int], owned: Sequence[int], threshold: float) -> list[bool]:
        """Return of each row whether its owned pixels (> 0) are at least this share of its mask.

        The mask is where its probability is >= 0.5; it must not be empty.
        """


class FullContest:
    """The definition: every kernel at every pixel, `resizing.CHUNK` kernels at a time.

    Args:
        masks: (K, h, w) logits at stride 8.
        scores: (K,).
        size: Of the image.
    """

    def __init__(self, masks: Tensor, scores: Tensor, size: ImageSize) -> None:
        self.masks = masks
        self.scores = scores
        self.size = size
        alike = rounds_alike(masks, size)
        self._all = None if alike else resize_probabilities(masks, size)

    def owners(self, *, first: int = 0, stop: int | None = None) -> Tensor:
        """See `Contest`; only rows from `first` to before `stop` take part."""
        rows = range(len(self.masks))[first:stop]
        weighed = (
            self._probabilities(rows[part]) * self.scores[list(rows[part]), None, None]
            for part in chunks(len(rows))
        )
        return running_argmax(weighed) + first

    def hold(self, rows: Sequence[int], owned: Sequence[int], threshold: float) -> list[bool]:
        """See `Contest`."""
        areas: list[int] = []
        for part in chunks(len(rows)):
            inside = self._probabilities(rows[part]) >= MASK_THRESHOLD
            areas += inside.sum(dim=(1, 2)).tolist()
        return [
            area > 0 and own / area >= threshold for own, area in zip(owned, areas, strict=True)
        ]

    def inside(self, owners: Tensor) -> Tensor:
        """Return where each pixel's owner has a probability >= 0.5: (H0, W0) bool."""
        result = torch.zeros_like(owners, dtype=torch.bool)
        rows: list[int] = torch.unique(owners).tolist()
        for part in chunks(len(rows)):
            inside = self._probabilities(rows[part]) >= MASK_THRESHOLD
            for row, mask in zip(rows[part], inside, strict=True):
                result |= mask & (owners == row)
        return result

    def _probabilities(self, rows: Sequence[int]) -> Tensor:
        if self._all is not None:
            return self._all[list(rows)]
        return resize_probabilities(self.masks[list(rows)], self.size)


@torch.no_grad()
def panoptic_maps(
    stage: StageOutput,
    sizes: Sequence[ImageSize],
    evaluation: EvalConfig,
    *,
    num_things: int,
    compat: Compat,
) -> list[PanopticMap]:
    """Return one map of segments an image.

    Every pixel is owned by one kernel. In descending order of score a kernel becomes a segment and
    takes the pixels that it owns if a thing's score is at least `evaluation.score_threshold`, and
    if it owns at least `evaluation.overlap_threshold` as many pixels as its own mask
    (probability >= 0.5) has. Pixels of other kernels stay empty; nobody inherits them.

    With `evaluation.pasting`

    - `mixed` (published): a pixel is owned by the kernel whose score * probability is greatest,
      things and stuff alike;
    - `separate` (as Panoptic FPN merges): first things alone, and a thing owns only pixels inside
      its own mask; then stuff alone, on the pixels that no thing has taken. All things rank
      before all stuff.

    Args:
        stage: Instance kernels first, then one kernel for each kind of stuff.
        sizes: One per image.
        evaluation: Thresholds and order.
        num_things: Classes that are things; they come first.
        compat: Ranks count from 1; from 0 where `published`, whose best segment, if of class 0,
            has the id of empty pixels.
    """
    assert stage.class_logits is not None
    classes = stage.class_logits.float().sigmoid()
    num_stuff = classes.shape[-1] - num_things
    num_instances = classes.shape[1] - num_stuff
    thing_scores, thing_labels = classes[:, :num_instances, :num_things].max(dim=-1)
    stuff_scores = classes[:, num_instances:, num_things:].diagonal(dim1=1, dim2=2)
    stuff_labels = torch.arange(num_things, num_things + num_stuff, device=classes.device)
    labels = torch.cat([thing_labels, stuff_labels.expand(len(classes), -1)], dim=1)
    scores = torch.cat([thing_scores, stuff_scores], dim=1)
    return [
        _paste(
            image_masks,
            image_scores,
            image_labels.tolist(),
            size,
            evaluation,
            num_instances=num_instances,
            first_rank=0 if compat == "published" else 1,
        )
        for image_masks, image_scores, image_labels, size in zip(
            stage.masks, scores, labels, sizes, strict=True
        )
    ]


def _paste(
    masks: Tensor,
    scores: Tensor,
    labels: Sequence[int],
    size: ImageSize,
    evaluation: EvalConfig,
    *,
    num_instances: int,
    first_rank: int,
) -> PanopticMap:
    """Paste one image's kernels; `scores` and `labels` have one entry per kernel."""
    enough = scores >= evaluation.score_threshold
    enough[num_instances:] = True
    compete = _mixed if evaluation.pasting == "mixed" else _things_first
    owners, kept = compete(
        masks, scores, enough, size, evaluation.overlap_threshold, num_instances
    )
    segments = []
    id_of_row = torch.zeros(len(masks) + 1, dtype=torch.int32)  # the last for nobody's pixels
    for rank, row in enumerate(kept, start=first_rank):
        id_of_row[row] = labels[row] + ID_STEP * rank
        segments.append(
            Segment(id=int(id_of_row[row]), label=labels[row], score=float(scores[row]))
        )
    return PanopticMap(ids=id_of_row.to(owners.device)[owners], segments=tuple(segments))


def _mixed(
    masks: Tensor,
    scores: Tensor,
    enough: Tensor,
    size: ImageSize,
    threshold: float,
    num_instances: int,
) -> tuple[Tensor, list[int]]:
    """Let all kernels compete at once; see `panoptic_maps`.

    Tiles pay on a CPU; a GPU does the plain form faster than many small steps.

    Returns:
        The row that owns each pixel (H0, W0), and the rows that become segments in order of rank.
    """
    tiled = masks.device.type == "cpu" and rounds_alike(masks, size)
    contest: Contest = (TiledContest if tiled else FullContest)(masks, scores, size)
    owners = contest.owners()
    return owners, _kept(contest, owners, scores, enough, threshold)


def _things_first(
    masks: Tensor,
    scores: Tensor,
    enough: Tensor,
    size: ImageSize,
    threshold: float,
    num_instances: int,
) -> tuple[Tensor, list[int]]:
    """Let things compete, then stuff for what they left; returns as `_mixed`, K for nobody."""
    nobody = len(masks)
    contest = FullContest(masks, scores, size)
    things = contest.owners(stop=num_instances)
    things = torch.where(contest.inside(things), things, nobody)
    kept = _kept(contest, things, scores, enough, threshold)
    if num_instances == nobody:
        return things, kept
    taken = torch.isin(things, torch.tensor(kept, dtype=torch.int64, device=things.device))
    stuff = torch.where(taken, nobody, contest.owners(first=num_instances))
    owners = torch.where(taken, things, stuff)
    return owners, kept + _kept(contest, stuff, scores, enough, threshold)


def _kept(
    contest: Contest, owners: Tensor, scores: Tensor, enough: Tensor, threshold: float
) -> list[int]:
    """Return the rows that become segments, best score first.

    Args:
        contest: Among K kernels.
        owners: (H0, W0) the row of every pixel, K or more where nobody owns it.
        scores: (K,).
        enough: (K,) bool, where the score suffices.
        threshold: Least ratio of owned pixels to the mask's.
    """
    counts = torch.bincount(owners.flatten(), minlength=len(scores))[: len(scores)]
    order = scores.argsort(descending=True, stable=True)
    candidates: list[int] = order[(enough & (counts > 0))[order]].tolist()
    owned: list[int] = counts[candidates].tolist()
    held = contest.hold(candidates, owned, threshold)
    return [row for row, holds in zip(candidates, held, strict=True) if holds]
