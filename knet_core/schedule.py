"""When a run trains, logs, evaluates and saves. Steps are optimizer steps done, from 1."""

import math
from dataclasses import dataclass

from knet_core.config import TrainConfig
from knet_core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The rhythm of one run, derived from its recipe, its data and its number of workers."""

    num_iterations: int
    batch_size: int
    """Images per step over all workers."""
    micro_batch: int
    """Images per worker in one forward pass."""
    num_micro_batches: int
    """Forward passes per worker and step."""
    num_images: int
    """Images of the training split."""
    log_every: int
    eval_every: int
    checkpoint_every: int

    def epoch(self, step: int) -> float:
        """Return the passes over the training images after `step`."""
        return step * self.batch_size / self.num_images

    def evaluates(self, step: int) -> bool:
        """Tell whether `step` is followed by an evaluation; the last always is."""
        return step % self.eval_every == 0 or step == self.num_iterations

    def saves(self, step: int) -> bool:
        """Tell whether `step` is followed by a checkpoint; the last always is."""
        return step % self.checkpoint_every == 0 or step == self.num_iterations

    def logs(self, step: int) -> bool:
        """Tell whether the curves get a point at `step`.

        Every checkpoint ends a point: nothing half-averaged is lost when a run resumes from it.
        """
        return step % self.log_every == 0 or self.evaluates(step) or self.saves(step)


def plan_schedule(config: TrainConfig, *, num_images: int, world_size: int) -> Schedule:
    """Derive the schedule of a run.

    Args:
        config: The recipe's `train` section.
        num_images: Images of the training split.
        world_size: Number of workers.

    Raises:
        ConfigError: The batch cannot be divided evenly.
    """
    share = config.batch_size // world_size
    micro_batch = config.micro_batch or share
    if config.batch_size % world_size or share % micro_batch:
        passes = "" if config.micro_batch is None else f" x train.micro_batch = {micro_batch}"
        raise ConfigError(
            f"train.batch_size: {config.batch_size} images do not divide evenly over "
            f"{world_size} worker(s){passes}; set it to a multiple of "
            f"{world_size * (config.micro_batch or 1)}"
        )
    num_iterations = config.iterations or math.ceil(config.epochs * num_images / config.batch_size)
    eval_every = config.eval_every or max(1, round(num_images / config.batch_size))
    return Schedule(
        num_iterations=num_iterations,
        batch_size=config.batch_size,
        micro_batch=micro_batch,
        num_micro_batches=share // micro_batch,
        num_images=num_images,
        log_every=config.log_every,
        eval_every=eval_every,
        checkpoint_every=config.checkpoint_every or eval_every,
    )
