"""What a training run tells whoever started it: points of curves, reports, the final result.

Free of torch, so that the platform can read and draw progress without loading it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Metrics at one optimizer step."""

    step: int
    """Optimizer steps done, counted from 1."""
    time: float
    """Unix seconds."""
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What happened since the last report."""

    step: int
    epoch: float
    """Passes over the training images so far."""
    num_iterations: int
    """Optimizer steps of the whole run; the report with this step is the last."""
    points: tuple[Point, ...]
    """Training curves, averaged over workers; times and `sys/...` are this worker's."""
    evaluation: dict[str, float] | None
    """`val/...` of this step, in the last report with `bench/fps`."""
    eval_batch: int | None
    """Images of a worker at a time to which memory limited the evaluation; None: as asked."""
    picture: bytes | None
    """PNG of probe images, ground truth beside prediction; first worker, with an evaluation."""
    checkpoint: Path | None
    """Complete local directory `checkpoint_<step>`; first worker only."""
    stage_picture: bytes | None = None
    """PNG of the same images with the masks after every update; first worker, last evaluation."""
    kernel_maps: bytes | None = None
    """PNG of where every instance kernel looks on average; first worker, last evaluation."""


class Callback(Protocol):
    """The seam between training and whoever runs it."""

    def on_report(self, report: Report) -> None:
        """Take a report; called on every worker, at the same steps, in the same order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """A finished run."""

    step: int
    finished: bool
    """False if the run was asked to stop before its last step."""
    metrics: dict[str, float]
    """Of the last evaluation, with `bench/fps` and the last `train/loss`."""
    evaluations: tuple[Point, ...]
    checkpoint: Path
    num_parameters: int
    """Parameters that train."""
    seconds: float
    """Wall-clock seconds of training and evaluation, over all attempts."""
