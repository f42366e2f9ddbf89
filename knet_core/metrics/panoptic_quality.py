"""Panoptic quality by panopticapi's rules (Kirillov et al., "Panoptic Segmentation")."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from knet_core.data.source import PanopticTruth, places

if TYPE_CHECKING:  # files are scored without torch
    from knet_core.structures import ImageInfo, PanopticMap

_HIGH, _LOW, _FOUND, _SPURIOUS, _MISSED = range(5)
_FRACTION = 53
"""An IoU above one half is a whole number of 2^-53: a float64 of that size has no smaller bit."""
_HALF = 27
"""Bits of it in the lower of two words, so that 2^36 of them add up without overflow."""


class _HasKind(Protocol):
    @property
    def isthing(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Panoptic quality, a mean over classes, from 0 to 1."""

    pq: float
    sq: float
    rq: float
    num_classes: int
    """Classes that occur; others do not count."""


def overlaps(
    true_ids: NDArray[np.integer[Any]],
    true_numbers: NDArray[np.integer[Any]],
    ids: NDArray[np.integer[Any]],
    numbers: NDArray[np.integer[Any]],
) -> NDArray[np.int64]:
    """Return how many pixels every pair of segments shares (S + 1, K + 1).

    Row and column 0 stand for void: pixels whose id no segment has.

    Args:
        true_ids: Ground truth (H0, W0), at least one pixel, ids below 2^24.
        true_numbers: (S,) different ids of its segments.
        ids: Prediction (H0, W0), ids below 2^24.
        numbers: (K,) different ids of its segments.
    """
    shape = (len(true_numbers) + 1, len(numbers) + 1)
    # Neighbours mostly belong to the same two segments: count runs of pixels, not pixels.
    one, other = true_ids.ravel(), ids.ravel()
    changes = np.flatnonzero((one[1:] != one[:-1]) | (other[1:] != other[:-1])) + 1
    starts = np.concatenate(([0], changes))
    lengths = np.diff(starts, append=one.size)
    pairs = places(one[starts], true_numbers).astype(np.int64) * shape[1]
    pairs += places(other[starts], numbers)
    table = np.bincount(pairs, weights=lengths, minlength=shape[0] * shape[1])
    return table.astype(np.int64).reshape(shape)  # exact: far below 2^53


class PanopticSums:
    """What images add up to, class by class (C). Whole numbers only: no order changes a bit.

    Args:
        num_classes: C.
    """

    def __init__(self, num_classes: int) -> None:
        self.counts = np.zeros((5, num_classes), dtype=np.int64)
        """Rows: IoU of matches in two words, matches, spurious predictions, missed segments."""

    def add(
        self,
        table: NDArray[np.int64],
        true_labels: NDArray[np.int64],
        crowd: NDArray[np.bool_],
        labels: NDArray[np.int64],
    ) -> None:
        """Compare the segments of one image.

        A predicted segment of id 0 owns all pixels of value 0, void ones as well
        (`compat: published`).

        Args:
            table: (S + 1, K + 1) from `overlaps`.
            true_labels: (S,).
            crowd: (S,) which true segments are crowds.
            labels: (K,) of the prediction.
        """
        shared, void = table[1:, 1:], table[0, 1:]
        areas = table[:, 1:].sum(axis=0)
        union = table[1:].sum(axis=1)[:, None] + areas - shared - void
        same = (true_labels[:, None] == labels) & ~crowd[:, None]
        iou = np.where(same, shared / np.maximum(union, 1), 0.0)
        matched = iou > 0.5  # at most one in every row and column
        found, by = matched.nonzero()
        missed = ~matched.any(axis=1) & ~crowd
        # A prediction that lies mostly on void or on its own class's crowd is not counted.
        ignored = void.copy()
        for label in np.unique(true_labels[crowd]).tolist():
            last = np.flatnonzero(crowd & (true_labels == label))[-1]  # as panopticapi
            ignored += np.where(labels == label, shared[last], 0)
        spurious = ~matched.any(axis=0) & (ignored <= 0.5 * areas)
        bits = (iou[found, by] * 2.0**_FRACTION).astype(np.int64)
        np.add.at(self.counts[_HIGH], true_labels[found], bits >> _HALF)
        np.add.at(self.counts[_LOW], true_labels[found], bits & (2**_HALF - 1))
        np.add.at(self.counts[_FOUND], true_labels[found], 1)
        np.add.at(self.counts[_SPURIOUS], labels[spurious], 1)
        np.add.at(self.counts[_MISSED], true_labels[missed], 1)

    def matches(self) -> NDArray[np.int64]:
        """Return matches, spurious predictions and missed segments of every class (3, C)."""
        return self.counts[_FOUND:]

    def per_class(self) -> NDArray[np.float64]:
        """Return PQ, SQ and RQ of every class (3, C), 0 where it does not occur."""
        high, low, found, spurious, missed = self.counts
        iou = np.array(
            [
                ((a << _HALF) + b) / 2**_FRACTION  # Python's integers: rounded once
                for a, b in zip(high.tolist(), low.tolist(), strict=True)
            ],
            dtype=np.float64,
        )
        segments = found + 0.5 * spurious + 0.5 * missed
        each = np.where(segments > 0, segments, 1)
        return np.stack([iou / each, iou / np.where(found > 0, found, 1), found / each])

    def mean(self, chosen: NDArray[np.bool_]) -> Quality:
        """Return the means over the chosen classes (C) that occur; 0 where none does."""
        occurs = self.matches().any(axis=0) & chosen
        if not occurs.any():
            return Quality(pq=0.0, sq=0.0, rq=0.0, num_classes=0)
        pq, sq, rq = self.per_class()[:, occurs].mean(axis=1).tolist()
        return Quality(pq=pq, sq=sq, rq=rq, num_classes=int(occurs.sum()))


class PanopticQuality:
    """Compares panoptic maps in memory with the ground truth.

    Args:
        truth: Ground truth by image id.
        categories: Classes in the order of labels.
    """

    def __init__(
        self, truth: Callable[[int], PanopticTruth], categories: Sequence[_HasKind]
    ) -> None:
        self._truth = truth
        self._isthing = np.array([category.isthing for category in categories], dtype=np.bool_)
        self._sums = PanopticSums(len(categories))

    def add(self, info: "ImageInfo", prediction: "PanopticMap") -> None:
        """Compare the segments of one image.

        Raises:
            DataError: The ground truth cannot be decoded.
        """
        truth = self._truth(info.image_id)
        table = overlaps(
            truth.ids,
            np.array([segment.id for segment in truth.segments], dtype=np.int64),
            prediction.ids.cpu().numpy(),
            np.array([segment.id for segment in prediction.segments], dtype=np.int64),
        )
        self._sums.add(
            table,
            np.array([segment.label for segment in truth.segments], dtype=np.int64),
            np.array([segment.iscrowd for segment in truth.segments], dtype=np.bool_),
            np.array([segment.label for segment in prediction.segments], dtype=np.int64),
        )

    def state(self) -> NDArray[np.int64]:
        """Return the counts (5, C), to send to another worker."""
        return self._sums.counts

    def merge(self, states: Iterable[NDArray[np.int64]]) -> None:
        """Replace what was collected by the states of all workers, this one's among them."""
        self._sums.counts = np.sum(list(states), axis=0, dtype=np.int64)

    def compute(self) -> dict[str, float]:
        """Return PQ, SQ and RQ, means over classes, of all and of things and stuff alone.

        Classes that occur neither in the ground truth nor in a prediction do not count; a key is
        left out where none is left.
        """
        scores: dict[str, float] = {}
        everything = np.ones_like(self._isthing)
        for suffix, kind in (("", everything), ("_th", self._isthing), ("_st", ~self._isthing)):
            mean = self._sums.mean(kind)
            if mean.num_classes:
                scores[f"val/PQ{suffix}"] = mean.pq
                scores[f"val/SQ{suffix}"] = mean.sq
                scores[f"val/RQ{suffix}"] = mean.rq
        return scores
