"""How long trials will take and how much memory they need.

From trials already run, else from a probe on this machine, else from the model's arithmetic.
"""

import functools
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from knet_core import ModelConfig, Recipe, data_home, is_address
from knet_platform.staging import num_train_images
from knet_platform.sweep import Trial
from knet_platform.sweep_file import Resources

# Forward pass of K-Net R50 at 800 x 1216, in GFLOP, counted part by part (docs of the paper's
# peers: 376 in all with three update heads). Training costs three forward passes.
_PIXELS = 800 * 1216
_BACKBONE, _FPN, _SEMANTIC, _UPDATE_HEADS = 158.5, 110.2, 85.8, 15.0
_TRAINING = 3.0


@dataclass(frozen=True, slots=True)
class _Backbone:
    gmacs: float
    """Multiply-adds at 224 x 224 (10^9) as timm lists them; only ratios to resnet50 are used."""
    parameters: float
    """In millions, without the classifier."""
    activations: float
    """MB that training keeps per million pixels of input, in fp32."""


# Activations of test_resnet, resnet18, 50, 101 and swin_tiny are counted (bytes that autograd
# saves at 256 x 256, the neck's 920 MB taken off); the others follow from them by depth and width.
_BACKBONES = {
    "test_resnet": _Backbone(0.2, 0.4, 95),
    "resnet10t": _Backbone(1.1, 4.9, 120),
    "resnet14t": _Backbone(1.7, 9.6, 250),
    "resnet18": _Backbone(1.8, 11.2, 165),
    "resnet26": _Backbone(2.4, 14.0, 480),
    "resnet34": _Backbone(3.7, 21.3, 300),
    "resnet50": _Backbone(4.1, 23.5, 970),
    "resnet50c": _Backbone(4.4, 23.5, 1000),
    "resnet101": _Backbone(7.8, 42.5, 1790),
    "resnet152": _Backbone(11.6, 58.1, 2600),
    "swin_tiny_patch4_window7_224": _Backbone(4.5, 27.5, 2420),
    "swin_large_patch4_window7_224": _Backbone(34.5, 195.0, 8000),
}
_NECK_ACTIVATIONS, _STAGE_ACTIVATIONS = 500.0, 140.0
_NECK_PARAMETERS, _STAGE_PARAMETERS = 7.7, 2.05

# Sustained, not peak. A CPU core reaches about 145 GFLOP/s on large maps (4.2 s for a training
# step of two 512 x 512 images) and less than half of that on small ones. The GPUs' figures are
# cautious shares of their peaks in fp32, not measured; autocast doubles them.
CPU_GFLOPS = 60.0
GPU_GFLOPS = {"L4": 6000.0, "A10G": 8000.0, "A100": 12000.0, "H100": 25000.0}
OTHER_GPU_GFLOPS = 8000.0
AUTOCAST_SPEEDUP = 2.0
START_SECONDS = 20.0
"""Ray, its workers and their imports, before the first step."""

PROCESS_GB = 0.5
"""Of a worker that has loaded torch, or of a CUDA context."""
BYTES_PER_PARAMETER = 16
"""Weight, gradient and the two moments of AdamW, in fp32."""

MODEL_BAND = 3.0
SAME_ARM_BAND = 1.25
OTHER_ARM_BAND = 1.6
PROBE_BAND = 1.5
"""A probe sees a few steps of one worker: no communication, no evaluation."""
MEMORY_MODEL_BAND = 1.6

Source = Literal["history", "probe", "model", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """Training already paid for by one trial: optimizer steps and their seconds."""

    step: int
    seconds: float
    peak_memory_gb: float | None = None
    """Of its first worker; None where it is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Seconds still to train, with the factor by which the truth may be off either way."""

    seconds: float
    band: float
    source: Source


class Pace:
    """Tells the time that trials of one sweep still need."""

    def __init__(
        self,
        trials: Sequence[Trial],
        resources: Resources,
        history: Mapping[str, Done],
        *,
        probes: Mapping[str, float] | None = None,
        gpu: str = "",
    ) -> None:
        """Sum up what is known.

        Args:
            trials: All trials of the sweep.
            resources: What each runs on.
            history: Steps and seconds by trial hash, of finished and of partial trials.
            probes: Measured seconds per optimizer step, by arm.
            gpu: Name of the GPU, for the model's arithmetic.
        """
        self._resources = resources
        self._history = history
        self._probes = probes or {}
        self._gpu = gpu
        ran = [(trial, history[trial.hash]) for trial in trials if trial.hash in history]
        ran = [(trial, done) for trial, done in ran if done.step > 0]
        paces: dict[str, list[float]] = {}
        for trial, done in ran:
            paces.setdefault(trial.arm, []).append(done.seconds / done.step)
        self._by_arm = {arm: sum(seconds) / len(seconds) for arm, seconds in paces.items()}
        by_work = [done.seconds / done.step / step_gflop(trial.recipe) for trial, done in ran]
        self._per_gflop = sum(by_work) / len(by_work) if by_work else None

    def estimate(self, trial: Trial) -> Estimate:
        """Return the time that `trial` still needs."""
        total = num_iterations(trial.recipe)
        if total is None:
            return Estimate(seconds=0.0, band=1.0, source="unknown")
        own = self._history.get(trial.hash)
        left = max(0, total - (own.step if own else 0))
        seconds, band, source = self._per_step(trial)
        return Estimate(seconds=START_SECONDS + left * seconds, band=band, source=source)

    def _per_step(self, trial: Trial) -> tuple[float, float, Source]:
        if trial.arm in self._by_arm:
            return self._by_arm[trial.arm], SAME_ARM_BAND, "history"
        if trial.arm in self._probes:
            return self._probes[trial.arm], PROBE_BAND, "probe"
        if self._per_gflop is not None:
            return self._per_gflop * step_gflop(trial.recipe), OTHER_ARM_BAND, "history"
        return _model_seconds(trial.recipe, self._resources, self._gpu), MODEL_BAND, "model"


def num_iterations(recipe: Recipe) -> int | None:
    """Return the optimizer steps of a run; None where the training images cannot be counted."""
    if recipe.train.iterations is not None:
        return recipe.train.iterations
    images = _num_train_images(recipe)
    if images is None:
        return None
    return math.ceil(recipe.train.epochs * images / recipe.train.batch_size)


def forward_gflop(recipe: Recipe) -> float:
    """Return the cost of one image's forward pass at training size."""
    return _model_gflop(recipe.model) * _num_pixels(recipe) / _PIXELS


def step_gflop(recipe: Recipe) -> float:
    """Return the cost of one optimizer step over all workers."""
    return _TRAINING * forward_gflop(recipe) * recipe.train.batch_size


def peak_memory_gb(recipe: Recipe, resources: Resources) -> float:
    """Return what a worker's training step needs: parameters, optimizer and activations."""
    model = recipe.model
    backbone = _backbone(model)
    width = model.channels / 256
    neck = (_NECK_PARAMETERS + _STAGE_PARAMETERS * model.stages) * width**2
    parameters = (backbone.parameters + neck) * 1e6
    neck_activations = (_NECK_ACTIVATIONS + _STAGE_ACTIVATIONS * model.stages) * width
    autocast = recipe.train.precision != "fp32"
    per_pixel = (backbone.activations + neck_activations) / (2 if autocast else 1)
    images = recipe.train.micro_batch or recipe.train.batch_size / resources.least_workers
    activations = per_pixel * images * _num_pixels(recipe)
    return PROCESS_GB + (parameters * BYTES_PER_PARAMETER + activations) / 1e9


def _num_pixels(recipe: Recipe) -> float:
    if recipe.data.crop is not None:
        return recipe.data.crop**2
    short = recipe.data.short_edge[1]
    return short * min(recipe.data.long_edge, short * 1216 / 800)


def _model_seconds(recipe: Recipe, resources: Resources, gpu: str) -> float:
    if resources.gpus_per_worker:
        autocast = recipe.train.precision != "fp32"
        rate = resources.gpus_per_worker * GPU_GFLOPS.get(gpu, OTHER_GPU_GFLOPS)
        rate *= AUTOCAST_SPEEDUP if autocast else 1.0
    else:
        rate = max(1.0, resources.cpus_per_worker) * CPU_GFLOPS
    return step_gflop(recipe) / (rate * resources.least_workers)


def _model_gflop(model: ModelConfig) -> float:
    backbone = _backbone(model).gmacs / _BACKBONES["resnet50"].gmacs
    necks = _FPN + _SEMANTIC + _UPDATE_HEADS * model.stages / 3
    return _BACKBONE * backbone + necks * (model.channels / 256) ** 2


def _backbone(model: ModelConfig) -> _Backbone:
    return _BACKBONES.get(model.backbone.name.partition(".")[0], _BACKBONES["resnet50"])


def _num_train_images(recipe: Recipe) -> int | None:
    data = recipe.data
    if data.format == "shapes":
        return data.shapes.num_train
    if is_address(data.root):
        return num_train_images(data)
    root = data_home() / data.root
    folder = next((root / name for name in data.train.images if (root / name).is_dir()), None)
    # An empty folder: the images are on the machines that will train.
    return _num_files(folder, folder.stat().st_mtime_ns) or None if folder else None


@functools.lru_cache(maxsize=16)
def _num_files(folder: Path, mtime_ns: int) -> int:
    """Count once what every trial asks for, in Cityscapes' folders by city too.

    Every file counts as an image: reading COCO's annotations would take longer than a plan may.
    """
    return sum(len(files) for _, _, files in os.walk(folder))
