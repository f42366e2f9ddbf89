"""Mean intersection over union of classes, over the pixels of all images together."""

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from knet_core.structures import ImageInfo, SemanticMap


class MeanIoU:
    """Counts the pixels of every class.

    Args:
        truth: Label map (H0, W0) by image id; labels of no class are not counted.
        num_classes: Number of classes C.
    """

    def __init__(self, truth: Callable[[int], NDArray[np.uint8]], num_classes: int) -> None:
        self._truth = truth
        self._num_classes = num_classes
        self._counts = np.zeros((3, num_classes), dtype=np.int64)
        """Rows: pixels predicted rightly, predicted, true."""

    def add(self, info: ImageInfo, prediction: SemanticMap) -> None:
        """Compare the pixels of one image.

        Raises:
            DataError: The ground truth cannot be decoded.
        """
        truth = self._truth(info.image_id)
        counted = truth < self._num_classes
        pairs = truth[counted].astype(np.int64) * self._num_classes
        pairs += prediction.labels.cpu().numpy()[counted]
        table = np.bincount(pairs, minlength=self._num_classes**2)
        table = table.reshape(self._num_classes, self._num_classes)
        self._counts += np.stack([table.diagonal(), table.sum(axis=0), table.sum(axis=1)])

    def state(self) -> NDArray[np.int64]:
        """Return the counts (3, C), to send to another worker."""
        return self._counts

    def merge(self, states: Iterable[NDArray[np.int64]]) -> None:
        """Replace what was collected by the states of all workers, this one's among them."""
        self._counts = np.sum(list(states), axis=0)

    def compute(self) -> dict[str, float]:
        """Return mIoU, mAcc (mean accuracy of classes) and aAcc (accuracy of pixels).

        Classes that occur neither in the ground truth nor in a prediction do not count; nothing
        is returned where no pixel is labelled.
        """
        right, predicted, true = self._counts
        union = predicted + true - right
        if not true.any():
            return {}
        return {
            "val/mIoU": float((right[union > 0] / union[union > 0]).mean()),
            "val/mAcc": float((right[true > 0] / true[true > 0]).mean()),
            "val/aAcc": float(right.sum() / true.sum()),
        }
