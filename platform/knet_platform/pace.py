"""How long trials will take: from trials already run, else from the model's arithmetic."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from knet_core import ModelConfig, Recipe, data_home
from knet_platform.planning import Resources, Trial

# Forward pass of K-Net R50 at 800 x 1216, in GFLOP, counted part by part (docs of the paper's
# peers: 376 in all with three update heads). Training costs three forward passes.
_PIXELS = 800 * 1216
_BACKBONE, _FPN, _SEMANTIC, _UPDATE_HEADS = 158.5, 110.2, 85.8, 15.0
_TRAINING = 3.0

# Multiply-adds at 224 x 224 (10^9) as timm lists them; only ratios to resnet50 are used.
_BACKBONE_GMACS = {
    "resnet10t": 1.1,
    "resnet14t": 1.7,
    "resnet18": 1.8,
    "resnet26": 2.4,
    "resnet34": 3.7,
    "resnet50": 4.1,
    "resnet50c": 4.4,
    "resnet101": 7.8,
    "resnet152": 11.6,
    "swin_tiny_patch4_window7_224": 4.5,
    "swin_large_patch4_window7_224": 34.5,
}

# Sustained, not peak. A CPU core reaches about 145 GFLOP/s on large maps (4.2 s for a training
# step of two 512 x 512 images) and less than half of that on small ones. The GPU's figure is a
# cautious one for fp32 on a data-centre card; autocast doubles it.
CPU_GFLOPS = 60.0
GPU_GFLOPS = 8000.0
AUTOCAST_SPEEDUP = 2.0
START_SECONDS = 20.0
"""Ray, its workers and their imports, before the first step."""

MODEL_BAND = 3.0
SAME_ARM_BAND = 1.25
OTHER_ARM_BAND = 1.6

Source = Literal["history", "model", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """Training already paid for by one trial: optimizer steps and their seconds."""

    step: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Seconds still to train, with the factor by which the truth may be off either way."""

    seconds: float
    band: float
    source: Source


def num_iterations(recipe: Recipe) -> int | None:
    """Return the optimizer steps of a run; None where the training images cannot be counted."""
    if recipe.train.iterations is not None:
        return recipe.train.iterations
    images = _num_train_images(recipe)
    if images is None:
        return None
    return max(1, round(recipe.train.epochs * images / recipe.train.batch_size))


def forward_gflop(recipe: Recipe) -> float:
    """Return the cost of one image's forward pass at training size."""
    short = recipe.data.short_edge[1]
    pixels = short * min(recipe.data.long_edge, short * 1216 / 800)
    return _model_gflop(recipe.model) * pixels / _PIXELS


def estimate(
    trial: Trial, resources: Resources, history: Mapping[str, Done], trials: Sequence[Trial]
) -> Estimate:
    """Return the time that `trial` still needs.

    Args:
        trial: The trial.
        resources: What it runs on.
        history: Steps and seconds by trial hash, of finished and of partial trials.
        trials: All trials of the sweep, to find those of the same arm.
    """
    total = num_iterations(trial.recipe)
    if total is None:
        return Estimate(seconds=0.0, band=1.0, source="unknown")
    own = history.get(trial.hash)
    left = max(0, total - (own.step if own else 0))
    per_step = _measured(trial, history, trials)
    if per_step is not None:
        seconds, band = per_step
        return Estimate(seconds=START_SECONDS + left * seconds, band=band, source="history")
    seconds = left * _step_seconds(trial.recipe, resources)
    return Estimate(seconds=START_SECONDS + seconds, band=MODEL_BAND, source="model")


def _measured(
    trial: Trial, history: Mapping[str, Done], trials: Sequence[Trial]
) -> tuple[float, float] | None:
    """Return seconds per step and their band: of this arm, else of others by their arithmetic."""
    ran = [(other, history[other.hash]) for other in trials if other.hash in history]
    ran = [(other, done) for other, done in ran if done.step > 0]
    same = [done.seconds / done.step for other, done in ran if other.arm == trial.arm]
    if same:
        return sum(same) / len(same), SAME_ARM_BAND
    cost = _step_gflop(trial.recipe)
    others = [done.seconds / done.step * cost / _step_gflop(other.recipe) for other, done in ran]
    return (sum(others) / len(others), OTHER_ARM_BAND) if others else None


def _step_gflop(recipe: Recipe) -> float:
    return _TRAINING * forward_gflop(recipe) * recipe.train.batch_size


def _step_seconds(recipe: Recipe, resources: Resources) -> float:
    if resources.gpus_per_worker:
        autocast = recipe.train.precision != "fp32"
        rate = resources.gpus_per_worker * GPU_GFLOPS * (AUTOCAST_SPEEDUP if autocast else 1.0)
    else:
        rate = max(1.0, resources.cpus_per_worker) * CPU_GFLOPS
    return _step_gflop(recipe) / (rate * resources.workers)


def _model_gflop(model: ModelConfig) -> float:
    name = model.backbone.name.partition(".")[0]
    backbone = _BACKBONE_GMACS.get(name, _BACKBONE_GMACS["resnet50"]) / _BACKBONE_GMACS["resnet50"]
    necks = _FPN + _SEMANTIC + _UPDATE_HEADS * model.stages / 3
    return _BACKBONE * backbone + necks * (model.channels / 256) ** 2


def _num_train_images(recipe: Recipe) -> int | None:
    data = recipe.data
    if data.format == "shapes":
        return data.shapes.num_train
    root = data_home() / data.root
    folder = next((root / name for name in data.train.images if (root / name).is_dir()), None)
    # Every file counts as an image: reading COCO's annotations would take longer than a plan may.
    return None if folder is None else sum(1 for _ in os.scandir(folder))
