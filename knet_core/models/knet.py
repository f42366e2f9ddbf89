"""K-Net (Zhang et al., NeurIPS 2021, arXiv:2106.14855) for instance segmentation.

1. A backbone and two pyramids turn the image into instance and semantic features at stride 8.
2. Static kernels make a first mask each and take up the features under it.
3. Each round of kernel update regroups the features by the masks so far, and predicts anew.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from knet_core.config import EvalConfig, LossConfig, ModelConfig
from knet_core.criterion import criterion
from knet_core.errors import ConfigError
from knet_core.models.backbones import Backbone
from knet_core.models.fpn import FPN
from knet_core.models.kernel_head import StaticKernels
from knet_core.models.kernel_update import KernelUpdateHead
from knet_core.models.semantic_fpn import SemanticFPN
from knet_core.postprocess import instances
from knet_core.structures import ImageInfo, Instances, KNetOutput, LossTerms, Targets


class KNet(nn.Module):
    """The model with its loss and its post-processing; parts come built (see `build_model`)."""

    def __init__(
        self,
        *,
        backbone: Backbone,
        fpn: FPN,
        semantic_fpn: SemanticFPN,
        static_kernels: StaticKernels,
        updates: Sequence[KernelUpdateHead],
        loss: LossConfig,
        evaluation: EvalConfig,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.fpn = fpn
        self.semantic_fpn = semantic_fpn
        self.static_kernels = static_kernels
        self.updates = nn.ModuleList(updates)
        self.loss = loss
        self.evaluation = evaluation

    @property
    def num_classes(self) -> int:
        """Number of classes that the model tells apart."""
        return self.static_kernels.semantic.out_channels

    def forward(self, images: Tensor) -> KNetOutput:
        """Predict for normalised images (B, 3, H, W); H and W are multiples of 32."""
        pyramid = self.fpn(self.backbone(images))
        instance_features, semantic_features = self.semantic_fpn(pyramid)
        stage, features, semantic = self.static_kernels(instance_features, semantic_features)
        stages = [stage]
        for update in self.updates:
            stages.append(update(features, stages[-1]))
        return KNetOutput(stages=tuple(stages), semantic=semantic)

    def criterion(self, output: KNetOutput, targets: Sequence[Targets]) -> LossTerms:
        """Return the weighted losses of a batch; see `knet_core.criterion`."""
        return criterion(output, targets, self.loss)

    def postprocess(self, output: KNetOutput, infos: Sequence[ImageInfo]) -> list[Instances]:
        """Return the instances of each image, from the last stage."""
        return instances(output.stages[-1], infos, self.evaluation.max_detections)


def build_model(
    config: ModelConfig, loss: LossConfig, evaluation: EvalConfig, *, num_classes: int
) -> KNet:
    """Assemble K-Net from its configuration.

    Raises:
        ConfigError: The backbone cannot be built, or there is no class to learn.
    """
    if num_classes < 1:
        raise ConfigError(f"data: the data set has {num_classes} categories, expected at least 1")
    backbone = Backbone(config.backbone)
    return KNet(
        backbone=backbone,
        fpn=FPN(backbone.channels, config.channels),
        semantic_fpn=SemanticFPN(
            config.channels,
            positional_encoding=config.positional_encoding,
            coordinates=config.coordinates,
        ),
        static_kernels=StaticKernels(config.channels, config.num_kernels, num_classes),
        updates=[KernelUpdateHead(config, num_classes) for _ in range(config.stages)],
        loss=loss,
        evaluation=evaluation,
    )
