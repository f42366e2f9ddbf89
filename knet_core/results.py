"""Predictions as files that other tools read: COCO results, COCO panoptic, label images."""

import errno
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

import numpy as np
from PIL import Image
from pycocotools import mask as mask_api

from knet_core.data.source import Category
from knet_core.errors import DataError, DiskFullError
from knet_core.structures import ImageInfo, Instances, PanopticMap, Prediction, SemanticMap


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a folder to write into; it appears at `path` when the block ends, whole or not at all.

    Args:
        path: Must not exist, unless as an empty folder.

    Raises:
        DiskFullError: The disk is full; nothing is left behind.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
            folder = Path(scratch, path.name)
            folder.mkdir()  # with the permissions that the user wants, unlike the one around it
            yield folder
            folder.replace(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"{path}: the disk is full; nothing was written: free some space or choose "
                f"another folder"
            ) from error
        raise


class ResultWriter:
    """Writes the predictions of one task as they come; no image is kept in memory.

    Instances become `instances.json` (COCO's results form with `file_name`), panoptic maps
    `panoptic.json` with `panoptic/<name>.png` (COCO's panoptic form), semantic maps
    `semantic/<name>.png` (pixels hold the data set's class ids, as the servers of ADE20K and
    Cityscapes want them; 16 bits where an id needs them). A name is the image's without its
    ending; folders in it are joined by `_`.

    Args:
        folder: An empty one.
        categories: Classes in the order of labels.
    """

    def __init__(self, folder: Path, categories: Sequence[Category]) -> None:
        self._folder = folder
        self._categories = categories
        ids = [category.id for category in categories]
        self._ids = np.array(ids, dtype=np.uint8 if max(ids) < 2**8 else np.uint16)
        self._instances: TextIO | None = None
        self._separator = "["
        self._panoptic: list[dict[str, Any]] = []
        self._images: list[dict[str, Any]] = []
        self._names: set[str] = set()

    def add(self, info: ImageInfo, prediction: Prediction) -> None:
        """Take the prediction of one image.

        Raises:
            DataError: An earlier image's file has the same name.
        """
        if isinstance(prediction, Instances):
            self._add_instances(info, prediction)
            return
        parts = PurePosixPath(info.file_name).with_suffix("").parts
        stem = "_".join(part for part in parts if part not in ("..", "/"))
        if stem in self._names:
            raise DataError(
                f"image {info.image_id}: {info.file_name} would overwrite another image's "
                f"{stem}.png; expected different file names: rename one"
            )
        self._names.add(stem)
        if isinstance(prediction, PanopticMap):
            self._add_panoptic(info, f"{stem}.png", prediction)
        else:
            self._add_semantic(f"{stem}.png", prediction)

    def __enter__(self) -> "ResultWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Write what belongs to all images together, unless something went wrong."""
        if self._instances is not None:
            with self._instances:
                self._instances.write("[]\n" if self._separator == "[" else "]\n")
        if self._panoptic and kind is None:
            document = {
                "images": self._images,
                "annotations": self._panoptic,
                "categories": [
                    {"id": c.id, "name": c.name, "isthing": int(c.isthing)}
                    for c in self._categories
                ],
            }
            (self._folder / "panoptic.json").write_text(_json(document))

    def _add_instances(self, info: ImageInfo, found: Instances) -> None:
        if self._instances is None:
            self._instances = (self._folder / "instances.json").open("w")
        masks = found.masks.cpu().numpy().view(np.uint8)
        for score, label, mask in zip(
            found.scores.tolist(), found.labels.tolist(), masks, strict=True
        ):
            rle = mask_api.encode(np.asfortranarray(mask))
            entry = {
                "image_id": info.image_id,
                "file_name": info.file_name,
                "category_id": self._categories[label].id,
                "score": score,
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
            }
            self._instances.write(self._separator + _json(entry))
            self._separator = ",\n"

    def _add_panoptic(self, info: ImageInfo, file: str, found: PanopticMap) -> None:
        ids = found.ids.cpu().numpy()
        channels = [ids & 255, ids >> 8 & 255, ids >> 16 & 255]
        pixels = np.stack(channels, axis=-1).astype(np.uint8)
        self._save("panoptic", file, Image.fromarray(pixels))
        counts = np.unique(ids, return_counts=True)
        areas = dict(zip(*(part.tolist() for part in counts), strict=True))
        self._images.append(
            {
                "id": info.image_id,
                "file_name": info.file_name,
                "height": ids.shape[0],
                "width": ids.shape[1],
            }
        )
        self._panoptic.append(
            {
                "image_id": info.image_id,
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

    def _add_semantic(self, file: str, found: SemanticMap) -> None:
        self._save("semantic", file, Image.fromarray(self._ids[found.labels.cpu().numpy()]))

    def _save(self, kind: str, file: str, picture: Image.Image) -> None:
        (self._folder / kind).mkdir(exist_ok=True)
        picture.save(self._folder / kind / file, format="PNG")


def _json(document: Any) -> str:
    return json.dumps(document, separators=(",", ":"))
