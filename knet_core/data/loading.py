"""The order of samples, and loaders that follow it exactly.

Training reads one infinite sequence: a permutation of the data set for every epoch, one after the
other. Optimizer step s of global batch B reads positions s*B to (s+1)*B, and worker r of W a
contiguous W-th of them. So what a step trains on depends neither on the number of loader
processes or workers nor on where a run was interrupted.

Padding is saved by the order within a step: wide images come before tall ones, so at most one
micro-batch of a step holds both. The published loaders instead draw every worker's images from one
kind, and leave out or repeat what does not fill a batch; here a step trains on the same images
with and without.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from knet_core.data.dataset import SegmentationDataset, collate
from knet_core.errors import ConfigError, DataError
from knet_core.structures import Batch

_Place = tuple[int, int]
"""(epoch, index in the data set)."""


class TrainStream:
    """The infinite training sequence over `length` samples.

    Args:
        length: Number of samples.
        seed: Decides the order.
        tall: (length,) images higher than wide, to be kept together within a step; None does not.
    """

    def __init__(self, length: int, *, seed: int, tall: NDArray[np.bool_] | None = None) -> None:
        self._tall = tall
        self._length = length
        self._seed = seed
        self._epoch = -1
        self._order: NDArray[np.int64] = np.zeros(0, dtype=np.int64)

    def at(self, position: int) -> _Place:
        """Return (epoch, index) of one position, counted from 0 over all epochs."""
        epoch, offset = divmod(position, self._length)
        if epoch != self._epoch:
            rng = np.random.default_rng((self._seed, epoch))
            self._epoch, self._order = epoch, rng.permutation(self._length)
        return epoch, int(self._order[offset])

    def step(self, step: int, batch_size: int) -> list[_Place]:
        """Return what one optimizer step trains on, wide images before tall ones.

        Only the order within the step depends on `tall`: every image still occurs once an epoch.
        """
        places = [self.at(step * batch_size + place) for place in range(batch_size)]
        if (tall := self._tall) is not None:
            places.sort(key=lambda place: bool(tall[place[1]]))  # stable
        return places


def train_loader(
    dataset: SegmentationDataset,
    *,
    seed: int,
    batch_size: int,
    micro_batch: int | None,
    rank: int,
    world_size: int,
    start_step: int,
    num_steps: int,
    num_workers: int,
) -> Iterator[Batch]:
    """Yield this worker's micro-batches of optimizer steps `start_step` to `num_steps`.

    Each step has batch_size / (world_size * micro_batch) of them, in order.

    Args:
        dataset: The training split.
        seed: Decides the order of samples.
        batch_size: Images per optimizer step over all workers.
        micro_batch: Images per yielded batch; None for the worker's whole share.
        rank: This worker.
        world_size: Number of workers.
        start_step: First optimizer step, counted from 0.
        num_steps: Where the run ends, counted from 0 as well.
        num_workers: Loader processes; 0 loads in this one.

    Raises:
        ConfigError: `batch_size` does not divide into workers and micro-batches.
        DataError: While iterating: an image cannot be used.
    """
    share, rest = divmod(batch_size, world_size)
    if rest:
        raise ConfigError(
            f"train.batch_size: {batch_size} images cannot be shared by {world_size} workers; "
            f"expected a multiple of {world_size}"
        )
    size = micro_batch or share
    if share % size:
        raise ConfigError(
            f"train.micro_batch: {size} does not divide the {share} images of a worker "
            f"(train.batch_size={batch_size} over {world_size} workers)"
        )
    stream = TrainStream(len(dataset), seed=seed, tall=dataset.tall())

    def places() -> Iterator[list[_Place]]:
        for step in range(start_step, num_steps):
            mine = stream.step(step, batch_size)[rank * share : (rank + 1) * share]
            for start in range(0, share, size):
                yield mine[start : start + size]

    return _load(dataset, places(), num_workers)


def eval_loader(
    dataset: SegmentationDataset,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    num_workers: int,
) -> Iterator[Batch]:
    """Yield images rank, rank + world_size, ... in order; every image once over all workers.

    Raises:
        DataError: While iterating: an image cannot be used.
    """
    mine = range(rank, len(dataset), world_size)
    places = (
        [(0, index) for index in mine[start : start + batch_size]]
        for start in range(0, len(mine), batch_size)
    )
    return _load(dataset, places, num_workers)


class _Batches(Dataset[Batch | DataError]):
    """Loads whole batches in a loader process.

    An expected error travels back as a value: raised there, it would reach the user wrapped in the
    loader process's traceback.
    """

    def __init__(self, dataset: SegmentationDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, places: Sequence[_Place]) -> Batch | DataError:
        try:
            return collate([self._dataset.load(index, epoch=epoch) for epoch, index in places])
        except DataError as error:
            return error


class _Order:
    """A sampler that follows an iterator once."""

    def __init__(self, places: Iterator[list[_Place]]) -> None:
        self._places = places

    def __iter__(self) -> Iterator[list[_Place]]:
        return self._places


def _load(
    dataset: SegmentationDataset, places: Iterator[list[_Place]], num_workers: int
) -> Iterator[Batch]:
    loader: DataLoader[Batch | DataError] = DataLoader(
        _Batches(dataset),
        sampler=_Order(places),  # one "sample" is a batch's places
        batch_size=None,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # a new loader must not advance the global generator
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield batch
