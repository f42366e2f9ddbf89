"""The few collectives that a run needs. With one process they cost nothing.

Every function here is collective: all workers call it, in the same order.
"""

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, distributed, nn

from knet_core.errors import ConfigError, KNetError

T = TypeVar("T")


def rank() -> int:
    """Return this worker's number, 0 for the first."""
    return distributed.get_rank() if _is_initialized() else 0


def world_size() -> int:
    """Return the number of workers."""
    return distributed.get_world_size() if _is_initialized() else 1


def mean_over_ranks(values: Tensor) -> Tensor:
    """Return the elementwise mean of all workers' tensors."""
    if world_size() == 1:
        return values
    total = values.clone()
    distributed.all_reduce(total)
    return total / world_size()


def sync_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Let the batch normalisations of a model share their statistics with the other workers'.

    Parameters, buffers and their names stay, and so does what the model computes in evaluation
    mode. timm's converter, unlike torch's, keeps the activations of its own normalisations.

    Args:
        model: Not a normalisation itself.
        device: Where it trains.

    Raises:
        ConfigError: There are several workers on CPUs, which torch cannot synchronise.
    """
    if world_size() > 1 and device.type == "cpu":
        raise ConfigError(
            f"train.sync_batch_norm: got true for {world_size()} workers on CPUs, expected GPUs "
            f"or one worker; set train.sync_batch_norm=false"
        )
    convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]


def take_buffers_of_zero(model: nn.Module) -> None:
    """Give every worker the first one's buffers, which a checkpoint holds.

    Batch normalisation counts its running statistics on each worker by itself.
    """
    if world_size() > 1:
        for buffer in model.buffers():
            distributed.broadcast(buffer, src=0)


def gather_on_zero(value: T) -> list[T]:
    """Return every worker's value in order of rank, on the first worker; nothing on the others."""
    if world_size() == 1:
        return [value]
    gathered: list[T | None] | None = [None] * world_size() if rank() == 0 else None
    distributed.gather_object(value, gathered)
    return [item for item in gathered or () if item is not None]


def on_rank_zero(work: Callable[[], T]) -> T:
    """Do `work` on the first worker while the others wait; all return its result.

    Raises:
        KNetError: The first worker's error, on every worker, so that none waits for ever.
    """
    if world_size() == 1:
        return work()
    outcome: list[T | KNetError | None] = [None]
    if rank() == 0:
        try:
            outcome = [work()]
        except KNetError as error:
            outcome = [error]
    distributed.broadcast_object_list(outcome)
    result = outcome[0]
    if isinstance(result, KNetError):
        raise result
    return cast(T, result)


def _is_initialized() -> bool:
    return distributed.is_available() and distributed.is_initialized()
