"""Predictions as files that other tools read: COCO results, COCO panoptic, label images."""

import io
import json
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as mask_api

from knet_core.data.source import Category
from knet_core.structures import Instances, PanopticMap, Prediction, SemanticMap

Files = dict[str, bytes]
"""Contents by relative path."""


class ResultFiles:
    """Collects the predictions of one task and lays them out as files.

    Instances become `instances.json` (COCO's results form with `file_name`), panoptic maps
    `panoptic.json` with `panoptic/<name>.png` (COCO's panoptic form), semantic maps
    `semantic/<name>.png` (ADE20K's form: label + 1, 0 is kept for "ignore").

    Args:
        categories: Classes in the order of labels.
    """

    def __init__(self, categories: Sequence[Category]) -> None:
        self._categories = categories
        self._instances: list[dict[str, Any]] = []
        self._panoptic: list[dict[str, Any]] = []
        self._images: list[dict[str, Any]] = []
        self._maps: Files = {}

    def add(self, name: str, prediction: Prediction) -> None:
        """Take the prediction of the image of this file name; names must differ."""
        image_id = len(self._images) + 1
        if isinstance(prediction, Instances):
            size = tuple(prediction.masks.shape[1:])
            self._add_instances(image_id, name, prediction)
        elif isinstance(prediction, PanopticMap):
            size = tuple(prediction.ids.shape)
            self._add_panoptic(image_id, name, prediction)
        else:
            size = tuple(prediction.labels.shape)
            self._add_semantic(name, prediction)
        self._images.append(
            {"id": image_id, "file_name": name, "height": size[0], "width": size[1]}
        )

    def files(self) -> Files:
        """Return everything collected so far."""
        files = dict(self._maps)
        if self._panoptic:
            document = {
                "images": self._images,
                "annotations": self._panoptic,
                "categories": [
                    {"id": c.id, "name": c.name, "isthing": int(c.isthing)}
                    for c in self._categories
                ],
            }
            files["panoptic.json"] = _json(document)
        elif not files:
            files["instances.json"] = _json(self._instances)
        return files

    def _add_instances(self, image_id: int, name: str, found: Instances) -> None:
        masks = found.masks.cpu().numpy().astype(np.uint8)
        rles = mask_api.encode(np.asfortranarray(masks.transpose(1, 2, 0)))
        for score, label, rle in zip(
            found.scores.tolist(), found.labels.tolist(), rles, strict=True
        ):
            self._instances.append(
                {
                    "image_id": image_id,
                    "file_name": name,
                    "category_id": self._categories[label].id,
                    "score": score,
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                }
            )

    def _add_panoptic(self, image_id: int, name: str, found: PanopticMap) -> None:
        ids = found.ids.cpu().numpy()
        file = f"{PurePath(name).stem}.png"
        channels = [ids & 255, ids >> 8 & 255, ids >> 16 & 255]
        self._maps[f"panoptic/{file}"] = _png(np.stack(channels, axis=-1).astype(np.uint8))
        areas = dict(
            zip(*(part.tolist() for part in np.unique(ids, return_counts=True)), strict=True)
        )
        self._panoptic.append(
            {
                "image_id": image_id,
                "file_name": file,
                "segments_info": [
                    {
                        "id": segment.id,
                        "category_id": self._categories[segment.label].id,
                        "area": areas[segment.id],
                        "score": segment.score,
                    }
                    for segment in found.segments
                ],
            }
        )

    def _add_semantic(self, name: str, found: SemanticMap) -> None:
        labels = found.labels.cpu().numpy().astype(np.uint8) + np.uint8(1)
        self._maps[f"semantic/{PurePath(name).stem}.png"] = _png(labels)


def _png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _json(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
