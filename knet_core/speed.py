"""How fast a network predicts, by the paper's protocol: 400 images one by one, mean of 3 runs."""

import resource
import statistics
import sys
import time
from dataclasses import dataclass

import torch

from knet_core.models.knet import KNet
from knet_core.structures import ImageSize

_WARM_UP = 5
"""Untimed passes before every run, as in mmdet's benchmark."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Images per second over several runs."""

    mean: float
    spread: float
    """Standard deviation over the runs; 0 for one run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What `measure_speed` found."""

    forward: Rate
    """The network alone."""
    result: Rate
    """The network and its post-processing, from image to final masks."""
    peak_memory: int
    """Bytes: what a GPU's allocator held at most, or the whole process on a CPU."""


@torch.inference_mode()
def measure_speed(
    model: KNet,
    size: tuple[int, int],
    *,
    iterations: int,
    runs: int,
    device: torch.device,
) -> Speed:
    """Time a model on one random image at a time; nothing is loaded meanwhile.

    Args:
        model: In evaluation mode, on `device`.
        size: (H, W) of the image, multiples of 32.
        iterations: Timed images of a run.
        runs: How often that is repeated.
        device: Where the model is.
    """
    height, width = size
    image = torch.randn(
        1, 3, height, width, device=device, generator=torch.Generator(device).manual_seed(0)
    )
    sizes = [ImageSize(input_size=size, original_size=size)]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    forward, result = [], []
    for _ in range(runs):
        network = everything = 0.0
        for iteration in range(_WARM_UP + iterations):
            _synchronize(device)
            start = time.perf_counter()
            output = model(image)
            _synchronize(device)
            between = time.perf_counter()
            model.postprocess(output, sizes)
            _synchronize(device)
            if iteration >= _WARM_UP:
                network += between - start
                everything += time.perf_counter() - start
        forward.append(iterations / network)
        result.append(iterations / everything)
    return Speed(forward=_rate(forward), result=_rate(result), peak_memory=_peak_memory(device))


def _rate(rates: list[float]) -> Rate:
    return Rate(
        mean=statistics.fmean(rates), spread=statistics.stdev(rates) if len(rates) > 1 else 0.0
    )


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
