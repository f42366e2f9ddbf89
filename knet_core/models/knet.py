"""K-Net (Zhang et al., NeurIPS 2021, arXiv:2106.14855), the same network for three tasks.

1. A backbone and a static part turn the image into features, first kernels and first masks.
2. Each round of kernel update regroups the features by the masks so far, and predicts anew.

What the tasks do not share comes built: the static part (instances and panoptic segmentation from
a pyramid, semantic segmentation from a dense classifier) and the task (losses and results).
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from knet_core.config import Recipe
from knet_core.errors import ConfigError
from knet_core.models.backbones import Backbone
from knet_core.models.fpn import FPN
from knet_core.models.kernel_head import PyramidKernels, StaticKernels
from knet_core.models.kernel_update import KernelUpdateHead
from knet_core.models.semantic_fpn import SemanticFPN
from knet_core.models.semantic_heads import DenseKernels, build_semantic_head
from knet_core.structures import ImageSize, KNetOutput, LossTerms, Prediction, Targets
from knet_core.tasks import TaskHead, build_task


class KNet(nn.Module):
    """The network with its task; parts come built (see `build_model`)."""

    def __init__(
        self,
        *,
        backbone: Backbone,
        static: PyramidKernels | DenseKernels,
        updates: Sequence[KernelUpdateHead],
        task: TaskHead,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.static = static
        self.updates = nn.ModuleList(updates)
        self.task = task
        self.num_classes = num_classes

    def forward(self, images: Tensor) -> KNetOutput:
        """Predict for normalised images (B, 3, H, W); H and W are multiples of 32."""
        static = self.static(self.backbone(images))
        stages = [static.stage]
        for update in self.updates:
            stages.append(update(static.features, stages[-1]))
        height, width = images.shape[-2:]
        return KNetOutput(
            stages=tuple(stages), semantic=static.semantic, padded_size=(height, width)
        )

    def criterion(self, output: KNetOutput, targets: Sequence[Targets]) -> LossTerms:
        """Return the weighted losses of a batch; see `knet_core.criterion`."""
        return self.task.criterion(output, targets)

    def postprocess(
        self,
        output: KNetOutput,
        sizes: Sequence[ImageSize | tuple[int, int]],
        *,
        stage: int = -1,
    ) -> Sequence[Prediction]:
        """Return each image's result; see `knet_core.postprocess`.

        Args:
            output: Prediction for a padded batch.
            sizes: One per image of the batch; (H0, W0) alone stands for an image without padding.
            stage: 0 the static kernels, s the s-th update, -1 the last stage.
        """
        known = [
            size
            if isinstance(size, ImageSize)
            else ImageSize(input_size=output.padded_size, original_size=size)
            for size in sizes
        ]
        return self.task.postprocess(output, known, stage)


class HasKind(Protocol):
    """A category, as far as the model must know it."""

    @property
    def isthing(self) -> bool:
        """Countable objects, not stuff."""


def build_model(recipe: Recipe, categories: Sequence[HasKind]) -> KNet:
    """Assemble K-Net from its recipe and its classes, things first.

    Raises:
        ConfigError: The backbone cannot be built, or the classes do not suit the task.
    """
    config = recipe.model
    num_classes = len(categories)
    num_things = sum(category.isthing for category in categories)
    num_stuff = num_classes - num_things
    if num_classes < 1:
        raise ConfigError("data: the data set has 0 categories, expected at least 1")
    if config.task == "instance" and num_stuff:
        raise ConfigError(
            f"model.task: instance segmentation knows no stuff, and {num_stuff} of the data set's "
            f"{num_classes} categories are stuff; use instance annotations or model.task=panoptic"
        )
    backbone = Backbone(config.backbone)
    static: PyramidKernels | DenseKernels
    if config.task == "semantic":
        static = build_semantic_head(config, backbone.channels, num_classes)
        num_scores = 0
    else:
        static = PyramidKernels(
            fpn=FPN(backbone.channels, config.channels),
            semantic_fpn=SemanticFPN(
                config.channels,
                positional_encoding=config.positional_encoding,
                coordinates=config.coordinates,
                branches=config.feature_branches,
            ),
            kernels=StaticKernels(config, num_classes=num_classes, num_stuff=num_stuff),
        )
        num_scores = num_classes
    return KNet(
        backbone=backbone,
        static=static,
        updates=[KernelUpdateHead(config, num_scores) for _ in range(config.stages)],
        task=build_task(recipe, num_things=num_things),
        num_classes=num_classes,
    )
