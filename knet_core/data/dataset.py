"""Samples ready for the network, made from any source; deterministic in (seed, epoch, index)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from knet_core.config import DataConfig, DataFormat, Task
from knet_core.data.cityscapes import CityscapesSource
from knet_core.data.coco import CocoSource
from knet_core.data.coco_panoptic import CocoPanopticSource
from knet_core.data.paths import Split, find_split
from knet_core.data.semantic_folder import SemanticFolderSource
from knet_core.data.shapes import ShapesSource
from knet_core.data.source import Category, PanopticTruth, Source
from knet_core.data.transforms import (
    LabelMap,
    Masks,
    as_image,
    evaluation_transforms,
    training_transforms,
)
from knet_core.errors import ConfigError
from knet_core.structures import (
    Batch,
    ImageInfo,
    Instances,
    PanopticMap,
    Prediction,
    Segment,
    SemanticMap,
    Targets,
)

TASKS: dict[DataFormat, tuple[Task, ...]] = {
    "coco": ("instance",),
    "coco_panoptic": ("panoptic", "instance", "semantic"),
    "ade20k": ("semantic",),
    "cityscapes": ("instance", "panoptic", "semantic"),
    "shapes": ("instance", "panoptic", "semantic"),
}
"""What each format can serve."""
_STRIDE = 32
"""The network's coarsest stride; inputs are padded to multiples of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One image before padding."""

    image: Tensor
    """(3, height, width) float32, normalised."""
    targets: Targets
    info: ImageInfo


class SegmentationDataset:
    """One split: images with what a task asks of them.

    Args:
        source: Where images and their annotations come from.
        config: Sizes and augmentation.
        training: Augment; evaluation resizes only.
        seed: Of the augmentation.
        task: What targets and ground truth hold.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        *,
        training: bool,
        seed: int,
        task: Task = "instance",
    ) -> None:
        self.task: Task = task
        self._source = source
        self._config = config
        self._seed = seed
        self._transforms = (training_transforms if training else evaluation_transforms)(config)

    def __len__(self) -> int:
        return len(self._source)

    @property
    def categories(self) -> tuple[Category, ...]:
        """Classes, things first; a label is a position in this list."""
        return self._source.categories

    @property
    def annotated(self) -> bool:
        """False where only images are listed, to be predicted and not scored."""
        return self._source.annotated

    @property
    def num_classes(self) -> int:
        """Number of categories."""
        return len(self.categories)

    def load(self, index: int, *, epoch: int) -> Sample:
        """Decode, augment and normalise one image.

        Objects that vanish at the network's input size are left out; an image may have none.

        Raises:
            DataError: The image or its annotations cannot be decoded, or differ in size.
        """
        record = self._source.record(index)
        original = (record.height, record.width)
        labels, masks = self._objects(index, original)
        semantic = self._source.semantic(index)
        with torch.random.fork_rng(devices=[]):
            self._seed_generator(index, epoch)
            image, resized, resized_labels = self._transforms(
                as_image(self._source.image(index)),
                Masks(torch.from_numpy(masks)),
                None if semantic is None else LabelMap(torch.from_numpy(semantic[None])),
            )
        visible = resized.flatten(1).any(dim=1).bool()  # of uint8, `any` is uint8
        everything = bool(visible.all())
        height, width = image.shape[1:]
        return Sample(
            image=image,
            targets=Targets(
                labels=torch.from_numpy(labels)
                if everything
                else torch.from_numpy(labels)[visible],
                masks=resized if everything else resized[visible],
                semantic=None if resized_labels is None else resized_labels[0],
            ),
            info=ImageInfo(
                image_id=record.id,
                file_name=record.file_name,
                input_size=(height, width),
                original_size=original,
            ),
        )

    def _seed_generator(self, index: int, epoch: int) -> None:
        """Seed torch's generator of the CPU, from which transforms draw; those of GPUs stay."""
        state = np.random.SeedSequence((self._seed, epoch, index)).generate_state(1, np.uint64)
        torch.default_generator.manual_seed(int(state[0]))

    def _objects(
        self, index: int, size: tuple[int, int]
    ) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        if self.task != "semantic":
            return self._source.objects(index)
        return np.zeros(0, dtype=np.int64), np.zeros((0, *size), dtype=np.uint8)

    def tall(self) -> NDArray[np.bool_] | None:
        """Return which images are higher than wide (N,); None where batches do not ask for it."""
        if self._config.crop is not None or not self._config.group_by_aspect:
            return None
        sizes = self._source.sizes()
        return sizes[:, 0] > sizes[:, 1]

    def raw_image(self, index: int) -> NDArray[np.uint8]:
        """Return the stored pixels, (H0, W0, 3) RGB."""
        return self._source.image(index)

    def truth(self, index: int) -> Prediction:
        """Return the ground truth of one image at its stored size, every score 1.

        Crowds are left out of instances; a panoptic map shows them as segments.
        """
        if self.task == "semantic":
            return SemanticMap(labels=torch.from_numpy(self.semantic(index)))
        if self.task == "panoptic":
            found = self.panoptic(index)
            return PanopticMap(
                ids=torch.from_numpy(found.ids),
                segments=tuple(
                    Segment(id=segment.id, label=segment.label, score=1.0)
                    for segment in found.segments
                ),
            )
        labels, masks = self._source.objects(index)
        return Instances(
            scores=torch.ones(len(labels)),
            labels=torch.from_numpy(labels),
            masks=torch.from_numpy(masks).bool(),
        )

    def semantic(self, index: int) -> NDArray[np.uint8]:
        """Return the label of every stored pixel (H0, W0), 255 for void and crowds."""
        labels = self._source.semantic(index)
        assert labels is not None, "build_dataset refuses formats without label maps"
        return labels

    def panoptic(self, index: int) -> PanopticTruth:
        """Return the segments of one image at its stored size."""
        return self._source.panoptic(index)

    def ground_truth(self) -> dict[str, Any]:
        """Return images, annotations and categories in COCO's form, for evaluation."""
        return self._source.ground_truth()

    def places(self) -> dict[int, int]:
        """Return the index of every image id."""
        return {self._source.record(index).id: index for index in range(len(self))}


def refuse_task(layout: DataFormat, task: Task) -> None:
    """Refuse a format that holds no annotations for the task.

    Raises:
        ConfigError: It does not.
    """
    if task not in TASKS[layout]:
        formats = [name for name, tasks in TASKS.items() if task in tasks]
        raise ConfigError(
            f"data.format: {layout} holds no annotations for model.task={task}; expected "
            f"{', '.join(formats[:-1])} or {formats[-1]}: choose such a data set, or "
            f"model.task={' or '.join(TASKS[layout])}"
        )


def build_dataset(
    config: DataConfig, split: Split, *, seed: int, task: Task = "instance"
) -> SegmentationDataset:
    """Return one split of the data set that `config` describes.

    Raises:
        ConfigError: The format holds no annotations for the task.
        DataError: Files are missing or annotations cannot be used; one line for each problem.
    """
    training = split == "train"
    refuse_task(config.format, task)
    source: Source
    if config.format == "shapes":
        source = ShapesSource(config.shapes, split, task=task)
    elif config.format == "ade20k":
        source = SemanticFolderSource(find_split(config, split), config)
    elif config.format == "cityscapes":
        source = CityscapesSource(find_split(config, split), training=training, task=task)
    elif config.format == "coco_panoptic":
        source = CocoPanopticSource(find_split(config, split), training=training, task=task)
    else:
        source = CocoSource(find_split(config, split), training=training)
    return SegmentationDataset(source, config, training=training, seed=seed, task=task)


def collate(samples: Sequence[Sample]) -> Batch:
    """Pad images with zeros, at the bottom and right, to one multiple of 32; targets stay."""
    height, width = (
        max(-(-sample.image.shape[axis] // _STRIDE) * _STRIDE for sample in samples)
        for axis in (1, 2)
    )
    return Batch(
        images=torch.stack(
            [
                F.pad(s.image, (0, width - s.image.shape[2], 0, height - s.image.shape[1]))
                for s in samples
            ]
        ),
        targets=tuple(sample.targets for sample in samples),
        infos=tuple(sample.info for sample in samples),
    )
