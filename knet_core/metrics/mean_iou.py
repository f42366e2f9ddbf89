"""Mean intersection over union of classes, over the pixels of all images together."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # files are scored without torch
    from knet_core.structures import ImageInfo, SemanticMap


@dataclass(frozen=True, slots=True, kw_only=True)
class SemanticScores:
    """Shares from 0 to 1."""

    miou: float
    """Mean over the classes that occur in the ground truth or in a prediction."""
    macc: float
    """Mean over the classes of the ground truth of the share of their pixels found."""
    aacc: float
    """Share of all labelled pixels found."""
    per_class: tuple[float | None, ...]
    """IoU of every class; None where it occurs nowhere."""


class PixelCounts:
    """Counts the pixels of every class (C).

    Args:
        num_classes: C.
    """

    def __init__(self, num_classes: int) -> None:
        self._num_classes = num_classes
        self.counts = np.zeros((3, num_classes), dtype=np.int64)
        """Rows: pixels predicted rightly, predicted, true."""

    def add(self, truth: NDArray[np.unsignedinteger[Any]], labels: NDArray[Any]) -> None:
        """Compare the pixels of one image.

        Args:
            truth: (H0, W0) labels; those of C and more are not counted.
            labels: (H0, W0) predicted labels, of the same type; those of C and more are no class:
                wrong, but of no other class.
        """
        side = self._num_classes + 1
        wide = np.uint16 if side * side <= 2**16 else np.uint32
        last = truth.dtype.type(self._num_classes)
        # One count of all pairs; the last row and column stand for "no class".
        pairs = np.minimum(truth, last).astype(wide)
        pairs *= wide(side)
        pairs += np.minimum(labels, last)
        table = np.bincount(pairs.ravel(), minlength=side * side).reshape(side, side)[:-1]
        self.counts += np.stack([table.diagonal(), table.sum(axis=0)[:-1], table.sum(axis=1)])

    def scores(self) -> SemanticScores | None:
        """Return the scores; None where no pixel is labelled."""
        right, predicted, true = self.counts
        union = predicted + true - right
        if not true.any():
            return None
        return SemanticScores(
            miou=float((right[union > 0] / union[union > 0]).mean()),
            macc=float((right[true > 0] / true[true > 0]).mean()),
            aacc=float(right.sum() / true.sum()),
            per_class=tuple(
                both / either if either else None
                for both, either in zip(right.tolist(), union.tolist(), strict=True)
            ),
        )


class MeanIoU:
    """Compares label maps in memory with the ground truth.

    Args:
        truth: Label map (H0, W0) by image id; labels of no class are not counted.
        num_classes: Number of classes C.
    """

    def __init__(self, truth: Callable[[int], NDArray[np.uint8]], num_classes: int) -> None:
        self._truth = truth
        self._pixels = PixelCounts(num_classes)

    def add(self, info: "ImageInfo", prediction: "SemanticMap") -> None:
        """Compare the pixels of one image.

        Raises:
            DataError: The ground truth cannot be decoded.
        """
        self._pixels.add(self._truth(info.image_id), prediction.labels.cpu().numpy())

    def state(self) -> NDArray[np.int64]:
        """Return the counts (3, C), to send to another worker."""
        return self._pixels.counts

    def merge(self, states: Iterable[NDArray[np.int64]]) -> None:
        """Replace what was collected by the states of all workers, this one's among them."""
        self._pixels.counts = np.sum(list(states), axis=0, dtype=np.int64)

    def compute(self) -> dict[str, float]:
        """Return mIoU, mAcc (mean accuracy of classes) and aAcc (accuracy of pixels).

        Classes that occur neither in the ground truth nor in a prediction do not count; nothing
        is returned where no pixel is labelled.
        """
        scores = self._pixels.scores()
        if scores is None:
            return {}
        return {
            "val/mIoU": scores.miou,
            "val/mAcc": scores.macc,
            "val/aAcc": scores.aacc,
        }
