"""The three tasks: what a model's output is trained on, and what is read from it.

The network is the same for all of them; a task is the part that differs, given to it when built.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

from knet_core.config import Compat, EvalConfig, LossConfig, Recipe
from knet_core.criterion import kernel_criterion
from knet_core.panoptic_paste import panoptic_maps
from knet_core.postprocess import instances, semantic_maps
from knet_core.semantic_criterion import semantic_criterion
from knet_core.structures import ImageSize, KNetOutput, LossTerms, Prediction, StageOutput, Targets

_FIRST_UPDATE = 1
_PUBLISHED_RANK = 0.1
"""Weight of the rank loss in the panoptic recipes; the instance recipes have none (spec 3.4)."""


class TaskHead(Protocol):
    """Losses and results of one task."""

    takes_views: ClassVar[bool]
    """Whether results may be averaged over scales, flips and windows of an image."""

    def criterion(self, output: KNetOutput, targets: Sequence[Targets]) -> LossTerms:
        """Return the weighted losses of a batch."""

    def postprocess(
        self, output: KNetOutput, sizes: Sequence[ImageSize], stage: int
    ) -> Sequence[Prediction]:
        """Return each image's result after one stage; -1 is the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceTask:
    """Masks of countable things, each with a class and a score."""

    takes_views: ClassVar[bool] = False

    num_things: int
    loss: LossConfig
    evaluation: EvalConfig
    compat: Compat

    def criterion(self, output: KNetOutput, targets: Sequence[Targets]) -> LossTerms:
        """Return the losses of matched kernels."""
        return kernel_criterion(
            output, targets, self.loss, num_things=self.num_things, compat=self.compat
        )

    def postprocess(
        self, output: KNetOutput, sizes: Sequence[ImageSize], stage: int
    ) -> Sequence[Prediction]:
        """Return the best (kernel, class) pairs of each image."""
        return instances(
            _with_classes(output, stage), sizes, max_detections=self.evaluation.max_detections
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PanopticTask:
    """Every pixel belongs to one thing or one kind of stuff."""

    takes_views: ClassVar[bool] = False

    num_things: int
    loss: LossConfig
    evaluation: EvalConfig
    compat: Compat

    def criterion(self, output: KNetOutput, targets: Sequence[Targets]) -> LossTerms:
        """Return the losses of matched kernels and of stuff kernels."""
        return kernel_criterion(
            output, targets, self.loss, num_things=self.num_things, compat=self.compat
        )

    def postprocess(
        self, output: KNetOutput, sizes: Sequence[ImageSize], stage: int
    ) -> Sequence[Prediction]:
        """Return one map of segments an image."""
        return panoptic_maps(
            _with_classes(output, stage),
            sizes,
            self.evaluation,
            num_things=self.num_things,
            compat=self.compat,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SemanticTask:
    """Every pixel belongs to one class."""

    takes_views: ClassVar[bool] = True

    loss: LossConfig

    def criterion(self, output: KNetOutput, targets: Sequence[Targets]) -> LossTerms:
        """Return the cross-entropies of all stages and of the auxiliary classifier."""
        return semantic_criterion(output, targets, self.loss)

    def postprocess(
        self, output: KNetOutput, sizes: Sequence[ImageSize], stage: int
    ) -> Sequence[Prediction]:
        """Return the likeliest class of each pixel."""
        return semantic_maps(output.stages[stage], sizes, padded_size=output.padded_size)


def build_task(recipe: Recipe, *, num_things: int) -> TaskHead:
    """Return the task that a recipe names."""
    if recipe.model.task == "semantic":
        return SemanticTask(loss=recipe.loss)
    panoptic = recipe.model.task == "panoptic"
    loss = recipe.loss
    if loss.rank is None:
        loss = replace(loss, rank=_PUBLISHED_RANK if panoptic else 0.0)
    kind = PanopticTask if panoptic else InstanceTask
    return kind(num_things=num_things, loss=loss, evaluation=recipe.eval, compat=recipe.compat)


def _with_classes(output: KNetOutput, stage: int) -> StageOutput:
    """Return a stage; static kernels predict no classes and borrow those of the first update.

    A kernel keeps its place through all stages, so these are the classes of what it found.
    """
    found = output.stages[stage]
    if found.class_logits is not None:
        return found
    return replace(found, class_logits=output.stages[_FIRST_UPDATE].class_logits)
