"""Writes the synthetic set to disk in three layouts at once. No torch.

```
DIR/annotations/instances_{train,val}.json            COCO instances (things)
DIR/annotations/panoptic_{train,val}.json, .../*.png  COCO panoptic (things and stuff)
DIR/{train,val}/*.png                                 their images
DIR/semantic/images/{training,validation}/*.png       ADE20K's layout
DIR/semantic/annotations/{training,validation}/*.png  0 = ignore, then category ids
DIR/semantic/classes.txt                              line n names category id n
```
"""

import errno
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from knet_core.config import ShapesConfig
from knet_core.data.paths import Split
from knet_core.data.shapes import (
    STUFF_CATEGORIES,
    THING_CATEGORIES,
    ShapesSource,
    instance_annotations,
    panoptic_truth,
    semantic_labels,
)
from knet_core.data.source import PanopticTruth, image_entry
from knet_core.errors import DataError, DiskFullError

_ADE_NAMES: dict[Split, str] = {"train": "training", "val": "validation"}


def make_shapes(
    directory: Path,
    num_train: int,
    num_val: int,
    size: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the synthetic set; the same bytes for the same arguments.

    Args:
        directory: Where the set will lie; must not exist, or be empty. It appears only when the
            set is complete.
        num_train: Images of the train split.
        num_val: Images of the val split.
        size: Side of an image in pixels.
        seed: Decides every pixel.
        progress: Called with (images done, images in all) after every image.

    Raises:
        DataError: The directory is in use or cannot be written.
        DiskFullError: The disk is full; nothing is left behind.
        ConfigError: A number is out of range.
    """
    config = ShapesConfig(num_train=num_train, num_val=num_val, size=size, seed=seed)
    directory = Path(directory).absolute()
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise DataError(
            f"{directory}: already exists and is not empty; expected a new folder: choose another "
            f"or remove it"
        )
    with _appearing(directory) as folder:
        total, done = num_train + num_val, 0
        for split in _ADE_NAMES:
            for _ in _write_split(folder, ShapesSource(config, split), split):
                done += 1
                if progress:
                    progress(done, total)
        names = "".join(f"{c.name}\n" for c in THING_CATEGORIES + STUFF_CATEGORIES)
        (folder / "semantic" / "classes.txt").write_text(names)


@contextmanager
def _appearing(directory: Path) -> Iterator[Path]:
    """Yield a folder that becomes `directory` on success and vanishes on any failure."""
    scratch: Path | None = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        folder = scratch / directory.name  # made by mkdir, so with the user's permissions
        folder.mkdir()
        yield folder
        folder.replace(directory)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(
                f"{directory}: the disk is full; nothing was written: free some space or choose "
                f"another folder"
            ) from error
        raise DataError(
            f"{directory}: cannot be written ({error.strerror}); expected a folder that you may "
            f"write: choose another or correct its permissions"
        ) from error
    finally:
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)


def _write_split(folder: Path, source: ShapesSource, split: Split) -> Iterator[None]:
    """Write one split, yielding after every image."""
    annotations = folder / "annotations"
    panoptic = annotations / f"panoptic_{split}"
    ade_images = folder / "semantic" / "images" / _ADE_NAMES[split]
    ade_labels = folder / "semantic" / "annotations" / _ADE_NAMES[split]
    for path in (folder / split, panoptic, ade_images, ade_labels):
        path.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    segments: list[dict[str, Any]] = []
    for index in range(len(source)):
        scene, record = source.scene(index), source.record(index)
        picture = _png(scene.image)
        (folder / split / record.file_name).write_bytes(picture)
        (ade_images / record.file_name).write_bytes(picture)
        (ade_labels / record.file_name).write_bytes(_png(semantic_labels(scene) + np.uint8(1)))
        truth = panoptic_truth(scene)
        # A few objects and stuff regions: their numbers need the red channel only.
        red = truth.ids.astype(np.uint8)
        rgb = np.stack([red, np.zeros_like(red), np.zeros_like(red)], axis=-1)
        (panoptic / record.file_name).write_bytes(_png(rgb))
        images.append(image_entry(record))
        objects += instance_annotations(scene, record.id, first_id=len(objects) + 1)
        segments.append(
            {
                "image_id": record.id,
                "file_name": record.file_name,
                "segments_info": _segments_info(truth),
            }
        )
        yield
    things = [{"id": c.id, "name": c.name, "supercategory": "thing"} for c in THING_CATEGORIES]
    _write_json(annotations / f"instances_{split}.json", images, objects, things)
    everything = [
        {"id": c.id, "name": c.name, "supercategory": kind, "isthing": int(kind == "thing")}
        for kind, group in (("thing", THING_CATEGORIES), ("stuff", STUFF_CATEGORIES))
        for c in group
    ]
    _write_json(annotations / f"panoptic_{split}.json", images, segments, everything)


def _segments_info(truth: PanopticTruth) -> list[dict[str, Any]]:
    """Return COCO's list of segments."""
    infos: list[dict[str, Any]] = []
    for segment in truth.segments:
        mask = truth.ids == segment.id
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        x, y = int(columns[0]), int(rows[0])
        infos.append(
            {
                "id": segment.id,
                "category_id": segment.label + 1,
                "iscrowd": 0,
                "area": int(mask.sum()),
                "bbox": [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1],
            }
        )
    return infos


def _png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _write_json(
    path: Path,
    images: list[dict[str, Any]],
    annotations: list[dict[str, Any]],
    categories: list[dict[str, Any]],
) -> None:
    document = {
        "info": {"description": "synthetic shapes"},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
    path.write_text(json.dumps(document, separators=(",", ":")))
