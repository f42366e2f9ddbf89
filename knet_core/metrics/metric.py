"""What every metric offers, and which one belongs to a task."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from knet_core.data import SegmentationDataset
from knet_core.errors import DataError
from knet_core.metrics.mask_ap import MaskAP
from knet_core.metrics.mean_iou import MeanIoU
from knet_core.metrics.panoptic_quality import PanopticQuality
from knet_core.structures import ImageInfo


class Metric(Protocol):
    """Collects predictions on every worker, and scores them all on one."""

    def add(self, info: ImageInfo, prediction: Any, /) -> None:
        """Take the prediction of one image, of the kind that the task makes."""

    def state(self) -> Any:
        """Return what was collected, as plain values to send to another worker."""

    def merge(self, states: Iterable[Any], /) -> None:
        """Replace what was collected by the states of all workers, this one's among them."""

    def compute(self) -> dict[str, float]:
        """Return `val/<name>` of everything collected; shares from 0 to 1."""


def metric_factory(dataset: SegmentationDataset) -> Callable[[], Metric]:
    """Return what makes empty metrics of a data set's task; they share its ground truth.

    Raises:
        DataError: An annotation cannot be decoded, or there are none.
    """
    if not dataset.annotated:
        raise DataError(
            "data.val.annotations: the file lists images without annotations, so nothing can be "
            "scored; expected a list named 'annotations': save predictions only, or name the file "
            "of an annotated split"
        )
    if dataset.task == "instance":
        truth = dataset.ground_truth()
        return lambda: MaskAP(truth, dataset.categories)
    places = dataset.places()
    if dataset.task == "panoptic":
        return lambda: PanopticQuality(
            lambda image_id: dataset.panoptic(places[image_id]), dataset.categories
        )
    return lambda: MeanIoU(
        lambda image_id: dataset.semantic(places[image_id]), dataset.num_classes
    )
