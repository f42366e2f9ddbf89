"""The synthetic set: textured shapes over drawn landscapes, rendered from a seed. No torch."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as mask_api

from knet_core.config import ShapesConfig, Task
from knet_core.data.paths import Split
from knet_core.data.rendering import STUFF, THINGS, Scene, render
from knet_core.data.source import Category, ImageRecord, PanopticTruth, TrueSegment, image_entry

THING_CATEGORIES = tuple(Category(i + 1, name) for i, name in enumerate(THINGS))
STUFF_CATEGORIES = tuple(
    Category(len(THINGS) + i + 1, name, isthing=False) for i, name in enumerate(STUFF)
)


class ShapesSource:
    """One split of the synthetic set, rendered whenever an image is asked for.

    Args:
        config: Size and seed.
        split: The other split holds other images.
        task: Instance shows things only, the others stuff as well.
    """

    annotated = True

    def __init__(self, config: ShapesConfig, split: Split, *, task: Task = "instance") -> None:
        self._config = config
        self._split = split
        self._task = task
        self.categories = THING_CATEGORIES
        if task != "instance":
            self.categories += STUFF_CATEGORIES
        self._last: tuple[int, Scene] | None = None  # a sample asks for image and objects

    def __len__(self) -> int:
        return self._config.num_train if self._split == "train" else self._config.num_val

    def record(self, index: int) -> ImageRecord:
        """Return id, file name and size of one image."""
        size = self._config.size
        return ImageRecord(id=index + 1, file_name=f"{index:06d}.png", height=size, width=size)

    def sizes(self) -> NDArray[np.int32]:
        """Return the height and width of all images (N, 2)."""
        return np.full((len(self), 2), self._config.size, dtype=np.int32)

    def scene(self, index: int) -> Scene:
        """Render one image; the same for the same seed, split and index."""
        if self._last is None or self._last[0] != index:
            stream = 0 if self._split == "train" else 1
            rng = np.random.default_rng((self._config.seed, stream, index))
            self._last = index, render(rng, self._config.size)
        return self._last[1]

    def image(self, index: int) -> NDArray[np.uint8]:
        """Render the pixels, (S, S, 3) RGB."""
        return self.scene(index).image

    def objects(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Render the labels (G,) and masks (G, S, S)."""
        scene = self.scene(index)
        return scene.labels, scene.masks.astype(np.uint8)

    def semantic(self, index: int) -> NDArray[np.uint8] | None:
        """Render the label of every pixel (S, S); None for instances, which know no stuff."""
        return None if self._task == "instance" else semantic_labels(self.scene(index))

    def panoptic(self, index: int) -> PanopticTruth:
        """Render the segments of one image; nothing is void."""
        return panoptic_truth(self.scene(index))

    def ground_truth(self) -> dict[str, Any]:
        """Render every image and return its objects in COCO's form."""
        annotations: list[dict[str, Any]] = []
        for index in range(len(self)):
            annotations += instance_annotations(
                self.scene(index), self.record(index).id, first_id=len(annotations) + 1
            )
        return {
            "images": [image_entry(self.record(index)) for index in range(len(self))],
            "annotations": annotations,
            "categories": [{"id": c.id, "name": c.name} for c in THING_CATEGORIES],
        }


def semantic_labels(scene: Scene) -> NDArray[np.uint8]:
    """Return the label of every pixel (S, S): a thing's class, elsewhere the stuff's."""
    labels = scene.stuff + np.uint8(len(THINGS))
    for label, mask in zip(scene.labels.tolist(), scene.masks, strict=True):
        labels[mask] = label
    return labels


def panoptic_truth(scene: Scene) -> PanopticTruth:
    """Return the visible regions, numbered from 1: objects in their order, then stuff by class."""
    labels = semantic_labels(scene)
    ids = np.zeros(labels.shape, dtype=np.int32)
    regions = list(zip(scene.labels.tolist(), scene.masks, strict=True))
    regions += [(label, labels == label) for label in range(len(THINGS), len(THINGS + STUFF))]
    segments: list[TrueSegment] = []
    for label, mask in regions:
        if mask.any():
            segments.append(TrueSegment(id=len(segments) + 1, label=label, iscrowd=False))
            ids[mask] = segments[-1].id
    return PanopticTruth(ids=ids, segments=tuple(segments))


def instance_annotations(scene: Scene, image_id: int, *, first_id: int) -> list[dict[str, Any]]:
    """Return a scene's objects as COCO annotations; the run lengths are text, as in JSON."""
    entries = []
    for number, (label, mask) in enumerate(zip(scene.labels.tolist(), scene.masks, strict=True)):
        rle = mask_api.encode(np.asfortranarray(mask, dtype=np.uint8))
        entries.append(
            {
                "id": first_id + number,
                "image_id": image_id,
                "category_id": THING_CATEGORIES[label].id,
                "iscrowd": 0,
                "area": int(mask_api.area(rle)),
                "bbox": mask_api.toBbox(rle).tolist(),
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
            }
        )
    return entries
