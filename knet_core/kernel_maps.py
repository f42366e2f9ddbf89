"""Where in an image each instance kernel looks, on average over a data set (paper, Fig. 4a)."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from knet_core.data import SegmentationDataset, eval_loader
from knet_core.distributed import mean_over_ranks, rank, world_size
from knet_core.errors import ConfigError
from knet_core.losses import MASK_STRIDE
from knet_core.models.kernel_head import PyramidKernels
from knet_core.models.knet import KNet
from knet_core.visualize import contact_sheet

SIDE = 200
"""Pixels a side to which every image's masks are brought, as in the paper."""
_COLUMNS = 10
_COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""Viridis at 0, .25, .5, .75 and 1."""


@torch.no_grad()
def mean_activations(
    model: KNet,
    dataset: SegmentationDataset,
    *,
    device: torch.device,
    num_workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Return the mean activation of every instance kernel, (N, 200, 200) float64 in [0, 1].

    Each image's last masks are cut to the image, brought to 200 x 200 and averaged as
    probabilities. Collective: each worker takes a share of the images, and all get the result.

    Args:
        model: Of the instance or the panoptic task.
        dataset: One split.
        device: Where the model is.
        num_workers: Loader processes.
        progress: Called with (this worker's images done, its images in all).

    Raises:
        ConfigError: The model has no instance kernels.
        DataError: An image cannot be used.
    """
    if not isinstance(model.static, PyramidKernels):
        raise ConfigError(
            "model.task: a semantic model has one kernel per class and no instance kernels; "
            "kernel maps need an instance or a panoptic model"
        )
    num_kernels = model.static.kernels.instance.out_channels
    total = torch.zeros(num_kernels, SIDE, SIDE, dtype=torch.float64, device=device)
    share = len(range(rank(), len(dataset), world_size()))
    batches = eval_loader(
        dataset, batch_size=1, rank=rank(), world_size=world_size(), num_workers=num_workers
    )
    was_training = model.training
    model.eval()
    for done, batch in enumerate(batches, start=1):
        masks = model(batch.images.to(device)).stages[-1].masks[:, :num_kernels]
        height, width = (-(-side // MASK_STRIDE) for side in batch.infos[0].input_size)
        activation = masks[..., :height, :width].float().sigmoid()
        total += F.interpolate(activation, (SIDE, SIDE), mode="bilinear")[0]
        if progress:
            progress(done, share)
    model.train(was_training)
    return (mean_over_ranks(total) * world_size() / len(dataset)).cpu()


def draw_kernel_maps(maps: Tensor) -> bytes:
    """Return a PNG of all maps, ten in a row; each is stretched to its own largest value."""
    places = np.linspace(0.0, 1.0, len(_COLOURS))
    pictures: list[NDArray[np.uint8]] = []
    for activation in maps.numpy():
        level = activation / max(float(activation.max()), 1e-12)
        channels = [np.interp(level, places, column) for column in np.transpose(_COLOURS)]
        pictures.append(np.stack(channels, axis=-1).astype(np.uint8))
    return contact_sheet(pictures, columns=_COLUMNS)
