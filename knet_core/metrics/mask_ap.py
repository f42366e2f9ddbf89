"""COCO's mask average precision, by pycocotools, over any number of workers."""

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from knet_core.structures import ImageInfo, Instances

_NAMES = ("val/AP", "val/AP50", "val/AP75", "val/APs", "val/APm", "val/APl")


class _HasId(Protocol):
    @property
    def id(self) -> int: ...


class MaskAP:
    """Collects detections and scores them against all images of the ground truth.

    Args:
        ground_truth: Images, annotations and categories in COCO's form; ids of annotations from
            1 (pycocotools takes 0 for "not matched"), masks as run lengths or polygons.
        categories: Classes in the order of labels.
    """

    def __init__(self, ground_truth: Mapping[str, Any], categories: Sequence[_HasId]) -> None:
        # pycocotools writes into annotations, so it gets its own.
        annotations = [dict(annotation) for annotation in ground_truth["annotations"]]
        self._truth = _coco({**ground_truth, "annotations": annotations})
        self._ids = [category.id for category in categories]
        self._detections: list[dict[str, Any]] = []

    def add(self, info: ImageInfo, instances: Instances) -> None:
        """Take the detections of one image; masks are kept as run lengths only."""
        masks = instances.masks.to("cpu").numpy().astype(np.uint8)
        rles = mask_api.encode(np.asfortranarray(masks.transpose(1, 2, 0)))
        for score, label, rle in zip(
            instances.scores.tolist(), instances.labels.tolist(), rles, strict=True
        ):
            self._detections.append(
                {
                    "image_id": info.image_id,
                    "category_id": self._ids[label],
                    "score": score,
                    "segmentation": rle,
                }
            )

    def state(self) -> list[dict[str, Any]]:
        """Return what was collected, as plain values to send to another worker."""
        return self._detections

    def merge(self, states: Iterable[Sequence[dict[str, Any]]]) -> None:
        """Replace what was collected by the states of all workers, this one's among them."""
        self._detections = [detection for state in states for detection in state]

    def compute(self) -> dict[str, float]:
        """Return AP, AP50, AP75 and AP of small, medium and large objects, each from 0 to 1.

        A key is left out where the ground truth holds no object to be scored.
        """
        # Areas come from masks; a box given by mistake would decide them in pycocotools' loader.
        detections = [
            {
                **detection,
                "id": number,
                "iscrowd": 0,
                "area": float(mask_api.area(detection["segmentation"])),
            }
            for number, detection in enumerate(self._detections, start=1)
        ]
        found = _coco({**self._truth.dataset, "annotations": detections})
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(self._truth, found, "segm")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return {
            name: float(value)
            for name, value in zip(_NAMES, evaluation.stats, strict=False)
            if value >= 0
        }


def _coco(dataset: Mapping[str, Any]) -> Any:
    """Build pycocotools' index without its printing."""
    coco = COCO()
    coco.dataset = dict(dataset)
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco
