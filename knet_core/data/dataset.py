"""Samples ready for the network, made from any source; deterministic in (seed, epoch, index)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from knet_core.config import DataConfig
from knet_core.data.coco import CocoSource
from knet_core.data.paths import Split, find_split
from knet_core.data.shapes import ShapesSource
from knet_core.data.source import Category, Source
from knet_core.data.transforms import (
    evaluation_geometry,
    image_tensor,
    mask_tensor,
    training_geometry,
)
from knet_core.structures import Batch, ImageInfo, Instances, Targets

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
    """One split: images with labelled masks.

    Args:
        source: Where images and objects come from.
        config: Sizes and flips.
        training: Augment; evaluation resizes only.
        seed: Of the augmentation.
    """

    def __init__(self, source: Source, config: DataConfig, *, training: bool, seed: int) -> None:
        self._source = source
        self._config = config
        self._training = training
        self._seed = seed

    def __len__(self) -> int:
        return len(self._source)

    @property
    def categories(self) -> tuple[Category, ...]:
        """Classes sorted by id; a label is a position in this list."""
        return self._source.categories

    @property
    def num_classes(self) -> int:
        """Number of categories."""
        return len(self.categories)

    def load(self, index: int, *, epoch: int) -> Sample:
        """Decode, augment and normalise one image.

        Objects that vanish at the network's input size are left out; an image may have none.

        Raises:
            DataError: The image cannot be decoded or has not the stated size.
        """
        record = self._source.record(index)
        original = (record.height, record.width)
        if self._training:
            rng = np.random.default_rng((self._seed, epoch, index))
            geometry = training_geometry(original, self._config, rng)
        else:
            geometry = evaluation_geometry(original, self._config)
        labels, masks = self._source.objects(index)
        resized = mask_tensor(masks, geometry)
        targets = Targets(labels=torch.from_numpy(labels), masks=resized)
        visible = resized.flatten(1).any(dim=1).bool()  # of uint8, `any` is uint8
        if not visible.all():
            targets = Targets(labels=targets.labels[visible], masks=resized[visible])
        return Sample(
            image=image_tensor(self._source.image(index), geometry),
            targets=targets,
            info=ImageInfo(
                image_id=record.id,
                file_name=record.file_name,
                input_size=geometry.size,
                original_size=original,
            ),
        )

    def raw_image(self, index: int) -> NDArray[np.uint8]:
        """Return the stored pixels, (H0, W0, 3) RGB."""
        return self._source.image(index)

    def instances(self, index: int) -> Instances:
        """Return the ground truth of one image at its stored size, every score 1."""
        labels, masks = self._source.objects(index)
        return Instances(
            scores=torch.ones(len(labels)),
            labels=torch.from_numpy(labels),
            masks=torch.from_numpy(masks).bool(),
        )

    def ground_truth(self) -> dict[str, Any]:
        """Return images, annotations and categories in COCO's form, for evaluation."""
        return self._source.ground_truth()


def build_dataset(config: DataConfig, split: Split, *, seed: int) -> SegmentationDataset:
    """Return one split of the data set that `config` describes.

    Raises:
        DataError: Files are missing or annotations cannot be used; one line for each problem.
    """
    training = split == "train"
    source: Source
    if config.format == "shapes":
        source = ShapesSource(config.shapes, split)
    else:
        source = CocoSource(find_split(config, split), training=training)
    return SegmentationDataset(source, config, training=training, seed=seed)


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
