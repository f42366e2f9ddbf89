"""Panoptic quality by panopticapi's rules (Kirillov et al., "Panoptic Segmentation")."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from knet_core.data.source import PanopticTruth, places
from knet_core.structures import ImageInfo, PanopticMap

_IOU, _FOUND, _SPURIOUS, _MISSED = range(4)


class _HasKind(Protocol):
    @property
    def isthing(self) -> bool: ...


class PanopticQuality:
    """Sums matches and misses of every class.

    Args:
        truth: Ground truth by image id.
        categories: Classes in the order of labels.
    """

    def __init__(
        self, truth: Callable[[int], PanopticTruth], categories: Sequence[_HasKind]
    ) -> None:
        self._truth = truth
        self._isthing = np.array([category.isthing for category in categories], dtype=np.bool_)
        self._sums = np.zeros((4, len(categories)))
        """Rows: IoU of matches, matches, spurious predictions, missed segments."""

    def add(self, info: ImageInfo, prediction: PanopticMap) -> None:
        """Compare the segments of one image.

        A segment of id 0 owns all pixels of value 0, void ones as well (`compat: published`).

        Raises:
            DataError: The ground truth cannot be decoded.
        """
        truth = self._truth(info.image_id)
        true_ids = np.array([segment.id for segment in truth.segments], dtype=np.int64)
        true_labels = np.array([segment.label for segment in truth.segments], dtype=np.int64)
        crowd = np.array([segment.iscrowd for segment in truth.segments], dtype=np.bool_)
        ids = np.array([segment.id for segment in prediction.segments], dtype=np.int64)
        labels = np.array([segment.label for segment in prediction.segments], dtype=np.int64)
        # One count of all pairs; row and column 0 stand for void.
        rows = places(truth.ids, true_ids).astype(np.int64)
        columns = places(prediction.ids.cpu().numpy(), ids)
        shape = (len(true_ids) + 1, len(ids) + 1)
        pairs = np.bincount((rows * shape[1] + columns).ravel(), minlength=shape[0] * shape[1])
        pairs = pairs.reshape(shape)
        shared, void = pairs[1:, 1:], pairs[0, 1:]
        areas = pairs[:, 1:].sum(axis=0)
        union = pairs[1:].sum(axis=1)[:, None] + areas - shared - void
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
        np.add.at(self._sums[_IOU], true_labels[found], iou[found, by])
        np.add.at(self._sums[_FOUND], true_labels[found], 1)
        np.add.at(self._sums[_SPURIOUS], labels[spurious], 1)
        np.add.at(self._sums[_MISSED], true_labels[missed], 1)

    def state(self) -> NDArray[np.float64]:
        """Return the sums (4, C), to send to another worker."""
        return self._sums

    def merge(self, states: Iterable[NDArray[np.float64]]) -> None:
        """Replace what was collected by the states of all workers, this one's among them."""
        self._sums = np.sum(list(states), axis=0)

    def compute(self) -> dict[str, float]:
        """Return PQ, SQ and RQ, means over classes, of all and of things and stuff alone.

        Classes that occur neither in the ground truth nor in a prediction do not count; a key is
        left out where none is left.
        """
        iou, found, spurious, missed = self._sums
        segments = found + 0.5 * spurious + 0.5 * missed
        occurs = segments > 0
        recognition = found / np.where(occurs, segments, 1)
        segmentation = iou / np.where(found > 0, found, 1)
        quality = iou / np.where(occurs, segments, 1)
        scores: dict[str, float] = {}
        for suffix, kind in (("", occurs), ("_th", self._isthing), ("_st", ~self._isthing)):
            chosen = occurs & kind
            if chosen.any():
                scores[f"val/PQ{suffix}"] = float(quality[chosen].mean())
                scores[f"val/SQ{suffix}"] = float(segmentation[chosen].mean())
                scores[f"val/RQ{suffix}"] = float(recognition[chosen].mean())
        return scores
