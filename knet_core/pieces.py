"""A batch passed through the network in pieces that fit into memory, for training."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from knet_core.models.knet import KNet
from knet_core.structures import KNetOutput, StageOutput


class InPieces(nn.Module):
    """The same function as the network and the same gradients, up to the order of sums.

    Accumulating over smaller micro-batches would not be: losses are means over the objects of a
    micro-batch. Here the losses see the whole of it. Only the predictions of all images are in
    memory together; what led to them is computed again, piece by piece, on the way back
    (gradient checkpointing, Chen et al. 2016, arXiv:1604.06174), for about a third more time.

    Args:
        network: Must treat each image by itself (see `is_separable`).
        images_at_once: Most images of a piece.
    """

    def __init__(self, network: KNet, images_at_once: int) -> None:
        super().__init__()
        self.network = network
        self._images_at_once = images_at_once

    def forward(self, images: Tensor) -> KNetOutput:
        """Predict for images (B, 3, H, W), as the network does."""
        return join(
            [
                checkpoint(self.network, piece, use_reentrant=False)
                for piece in torch.split(images, self._images_at_once)
            ]
        )


def is_separable(network: nn.Module) -> bool:
    """Tell whether a network treats each image by itself: no batch statistics are in use."""
    return not any(isinstance(m, _BatchNorm) and m.training for m in network.modules())


def join(outputs: Sequence[KNetOutput]) -> KNetOutput:
    """Return the outputs for pieces of a batch as that of the batch."""
    first = outputs[0]
    if len(outputs) == 1:
        return first
    stages = zip(*(output.stages for output in outputs), strict=True)
    return KNetOutput(
        stages=tuple(
            StageOutput(
                masks=torch.cat([piece.masks for piece in stage]),
                class_logits=_cat([piece.class_logits for piece in stage]),
                kernels=torch.cat([piece.kernels for piece in stage]),
            )
            for stage in stages
        ),
        semantic=_cat([output.semantic for output in outputs]),
        padded_size=first.padded_size,
    )


def _cat(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None
