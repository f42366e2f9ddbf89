"""One optimizer step of one worker: accumulation, mixed precision, clipping, the NaN guard."""

import io
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from knet_core.config import Recipe
from knet_core.distributed import (
    gather_on_zero,
    on_rank_zero,
    rank,
    sync_batch_norm,
    world_size,
)
from knet_core.errors import NonFiniteError
from knet_core.models.knet import KNet
from knet_core.optim import build_optimizer, set_learning_rate
from knet_core.pieces import InPieces
from knet_core.structures import Batch, KNetOutput, LossTerms

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SMALLEST_SCALE = 1.0
"""fp16 gradients that overflow even at this loss scale will not be saved by a smaller one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one step measured, still on the device."""

    losses: dict[str, Tensor]
    """Every loss term of `LossTerms.named`, the mean over this worker's micro-batches."""
    grad_norm: Tensor
    """L2 norm of all gradients before clipping; infinite where fp16 overflowed."""
    lr: float
    """Learning rate of everything but the backbone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Losses:
    """What is kept of one micro-batch: nothing that holds its activations."""

    terms: dict[str, Tensor]
    """Of `LossTerms.named`, detached."""
    costs: Sequence[Tensor]


class Trainer:
    """Owns the model's replica, the optimizer and the loss scale.

    Args:
        model: Built with the same weights on every worker; moved to `device`.
        recipe: Its `optim` and `train` sections are used.
        num_iterations: Optimizer steps of the whole run.
        device: Where this worker computes.
        output_dir: Takes the dump of a step that went wrong.
        images_at_once: Most images that go through the network together, where memory is short;
            gradients stay those of the micro-batch (`InPieces`).

    Raises:
        ConfigError: `train.sync_batch_norm` is asked of several workers on CPUs.
    """

    def __init__(
        self,
        model: KNet,
        recipe: Recipe,
        *,
        num_iterations: int,
        device: torch.device,
        output_dir: Path,
        images_at_once: int | None = None,
    ) -> None:
        self._recipe = recipe
        self._num_iterations = num_iterations
        self._device = device
        self._output_dir = output_dir
        if recipe.train.sync_batch_norm:
            sync_batch_norm(model, device)
        layout = torch.channels_last if recipe.train.channels_last else torch.preserve_format
        self.model: KNet = model.to(  # type: ignore[call-overload]
            device=device, memory_format=layout
        )
        self._replica: nn.Module = self.model
        if images_at_once is not None:
            self._replica = InPieces(self.model, images_at_once)
        if world_size() > 1:
            # Steps do not read running statistics; who does shares them (`take_buffers_of_zero`).
            self._replica = DistributedDataParallel(self._replica, broadcast_buffers=False)
        self._network: Callable[[Tensor], KNetOutput] = self._replica
        if recipe.train.compile:
            self._network = torch.compile(self._replica)
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = build_optimizer(self.model, recipe.optim)
        autocast = _AUTOCAST.get(recipe.train.precision)
        # fp16 needs the loss scale, which torch has for GPUs.
        fits = device.type == "cuda" or autocast is torch.bfloat16
        self._autocast = autocast if fits else None
        self._scaler = torch.amp.GradScaler("cuda", enabled=self._autocast is torch.float16)

    @property
    def num_parameters(self) -> int:
        """Number of parameters that train."""
        return sum(parameter.numel() for parameter in self._parameters)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer and of the loss scale."""
        return {"optimizer": self._optimizer.state_dict(), "scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self._optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])

    def step(self, step: int, batches: Sequence[Batch]) -> StepResult:
        """Do one optimizer step on this worker's micro-batches of the global batch.

        Every micro-batch counts the same, and so does every worker; each loss term is a mean over
        one worker's micro-batch, except the class loss, which counts objects over all workers.

        Args:
            step: Steps done before, 0 for the first.
            batches: All micro-batches of the step, on the CPU.

        Raises:
            NonFiniteError: A cost, a loss or a gradient is not finite; no parameter was changed.
        """
        lr = set_learning_rate(self._optimizer, step, self._recipe.optim, self._num_iterations)
        losses: list[_Losses] = []
        for index, batch in enumerate(batches):
            with self._synchronised(last=index == len(batches) - 1):
                found = self._losses(step, batch)
                total = self._scaler.scale(found.total() / len(batches))
                total.backward()  # type: ignore[no-untyped-call]
            terms = {name: value.detach() for name, value in found.named().items()}
            losses.append(_Losses(terms=terms, costs=found.costs))
        self._scaler.unscale_(self._optimizer)
        norm = nn.utils.clip_grad_norm_(
            self._parameters, self._recipe.optim.clip_norm, foreach=True
        )
        self._require_finite(step, batches, losses, norm)
        self._scaler.step(self._optimizer)  # skips the step where fp16 gradients overflowed
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        means = {
            name: torch.stack([found.terms[name] for found in losses]).mean()
            for name in losses[0].terms
        }
        return StepResult(losses=means, grad_norm=norm, lr=lr)

    def _losses(self, step: int, batch: Batch) -> LossTerms:
        there = batch.to(self._device, channels_last=self._recipe.train.channels_last)
        with torch.autocast(
            self._device.type, dtype=self._autocast, enabled=self._autocast is not None
        ):
            output = self._network(there.images)
        try:
            return self.model.criterion(output, there.targets)
        except NonFiniteError as error:
            losses = _Losses(terms={}, costs=error.costs)
            raise self._failure(step, [batch], [losses], str(error)) from error

    def _synchronised(self, *, last: bool) -> AbstractContextManager[None]:
        """Exchange gradients with the other workers in the last backward pass of a step only."""
        if isinstance(self._replica, DistributedDataParallel) and not last:
            return self._replica.no_sync()
        return nullcontext()

    def _require_finite(
        self,
        step: int,
        batches: Sequence[Batch],
        losses: Sequence[_Losses],
        norm: Tensor,
    ) -> None:
        totals = torch.stack([torch.stack(list(found.terms.values())).sum() for found in losses])
        # The one wait for the device in a step; the matching has already waited for the forward.
        *finite, finite_norm = torch.cat([totals, norm[None]]).isfinite().tolist()
        fine_norm = finite_norm or self._overflowed()
        if all(finite) and fine_norm:
            return
        bad = [index for index, fine in enumerate(finite) if not fine]
        what = "the loss is not finite"
        if not fine_norm:
            # Gradients are shared, so every worker is here: name the guilty images on all.
            ids = gather_on_zero(_ids([batches[index] for index in bad]))
            elsewhere = on_rank_zero(lambda: [image for worker in ids for image in worker])
            if not bad:
                bad = list(range(len(batches)))
                what = "a gradient is not finite, although every loss is"
                if elsewhere:
                    what = f"the loss of images {elsewhere} of another worker is not finite"
        raise self._failure(step, [batches[i] for i in bad], [losses[i] for i in bad], what)

    def _overflowed(self) -> bool:
        """Tell whether fp16 overflow may explain the gradients: the step is skipped, not wrong."""
        return self._scaler.is_enabled() and self._scaler.get_scale() > _SMALLEST_SCALE

    def _failure(
        self,
        step: int,
        batches: Sequence[Batch],
        losses: Sequence[_Losses],
        what: str,
    ) -> NonFiniteError:
        suffix = f"_rank{rank()}" if world_size() > 1 else ""
        dump = self._output_dir / f"nonfinite_step{step + 1}{suffix}.pt"
        content = {
            "step": step + 1,
            "image_ids": _ids(batches),
            "images": [image for batch in batches for image in batch.images],
            "masks": [target.masks for batch in batches for target in batch.targets],
            "labels": [target.labels for batch in batches for target in batch.targets],
            "losses": [{n: value.item() for n, value in f.terms.items()} for f in losses],
            "costs": [[cost.cpu() for cost in found.costs] for found in losses],
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        try:
            dump.write_bytes(buffer.getvalue())
            outcome = f"saved in {dump}"
        except OSError as error:  # the failure itself must be heard even on a full disk
            outcome = f"not saved ({error})"
        return NonFiniteError(
            f"step {step + 1}: {what}; the images with ids {_ids(batches)} (in this order) are "
            f"{outcome}; lower optim.lr, or train.precision=fp32"
        )


def _ids(batches: Sequence[Batch]) -> list[int]:
    return [info.image_id for batch in batches for info in batch.infos]
