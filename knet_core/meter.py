"""What steps measure, averaged into the points of the training curves."""

import os
import time
from pathlib import Path
from typing import Any

import pynvml
import torch
from torch import Tensor

from knet_core.distributed import mean_over_ranks
from knet_core.progress import Point
from knet_core.trainer import StepResult

_LOOK_SECONDS = 1.0
"""Between looks at the GPU: the driver itself averages over up to a second."""


class Meter:
    """Sums since the last point; losses stay on the device until one is due.

    Args:
        batch_size: Images per step over all workers.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self.restart()

    def restart(self) -> None:
        """Forget everything, also the time that passed."""
        self._steps = 0
        self._losses: dict[str, Tensor] = {}
        self._grad_norms: list[Tensor] = []
        self._lr = 0.0
        self._waited = 0.0
        self._busy: list[float] = []
        self._start = self._last_look = time.perf_counter()

    def add(self, result: StepResult, *, waited: float) -> None:
        """Take a step that waited so many seconds for its images."""
        self._steps += 1
        for name, value in result.losses.items():
            self._losses[name] = self._losses[name] + value if name in self._losses else value
        self._grad_norms.append(result.grad_norm)
        self._lr = result.lr
        self._waited += waited
        if time.perf_counter() - self._last_look >= _LOOK_SECONDS:
            self._look(result.grad_norm.device)

    def state_dict(self) -> dict[str, Any]:
        """Return the sums in plain values."""
        return {
            "steps": self._steps,
            "losses": {name: value.item() for name, value in self._losses.items()},
            "grad_norms": [value.item() for value in self._grad_norms],
            "lr": self._lr,
            "waited": self._waited,
            "seconds": time.perf_counter() - self._start,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on with the sums of `state_dict`, on the device of the steps to come."""
        self._steps = state["steps"]
        self._losses = {
            name: torch.tensor(value, device=device) for name, value in state["losses"].items()
        }
        self._grad_norms = [torch.tensor(value, device=device) for value in state["grad_norms"]]
        self._lr = state["lr"]
        self._waited = state["waited"]
        self._start = time.perf_counter() - state["seconds"]

    def point(self, step: int) -> Point:
        """Return the means over all workers since the last point, and start anew."""
        norms = torch.stack(self._grad_norms)
        norms = norms[norms.isfinite()]  # fp16 steps that overflowed were skipped
        sums = torch.stack(
            [*self._losses.values(), norms.sum() * self._steps / max(len(norms), 1)]
        )
        *losses, grad_norm = (mean_over_ranks(sums) / self._steps).tolist()
        seconds = time.perf_counter() - self._start
        if not self._busy:
            self._look(norms.device)
        metrics = {
            "train/loss": sum(losses),
            **{
                f"train/loss/{name}": value
                for name, value in zip(self._losses, losses, strict=True)
            },
            "train/grad_norm": grad_norm,
            "train/lr": self._lr,
            "sys/images_per_s": self._steps * self._batch_size / seconds,
            "sys/data_wait": self._waited / seconds,
            **_memory(norms.device),
        }
        if self._busy:
            metrics["sys/gpu_utilization"] = sum(self._busy) / len(self._busy)
        self.restart()
        return Point(step=step, time=time.time(), metrics=metrics)

    def _look(self, device: torch.device) -> None:
        """Note the share of the time that the GPU is busy, where its driver tells."""
        self._last_look = time.perf_counter()
        if device.type != "cuda":
            return
        try:
            self._busy.append(torch.cuda.utilization(device) / 100)
        except (ImportError, RuntimeError, pynvml.NVMLError):
            return  # a slice of a GPU, or a container without the driver's library


def _memory(device: torch.device) -> dict[str, float]:
    """Return this process's memory now, without data loaders, and the most of its GPU so far."""
    memory = {}
    statistics = Path("/proc/self/statm")  # Linux
    if statistics.exists():
        resident = int(statistics.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        memory["sys/host_memory_gb"] = resident / 1e9
    if device.type == "cuda":
        memory["sys/gpu_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return memory
