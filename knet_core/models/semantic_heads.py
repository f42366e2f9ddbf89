"""Dense classifiers whose class weights are the first kernels of semantic segmentation.

FCN, PSPNet, DeepLabV3 and UPerNet as the authors' semantic models use them (KNET_SPEC 6.3). The
classifier's weight rows are the static kernels, its logits the first masks.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from knet_core.config import ModelConfig, SemanticHead
from knet_core.errors import ConfigError
from knet_core.structures import StageOutput, StaticOutput

AUXILIARY_CHANNELS = 256


class ConvBatchNorm(nn.Sequential):
    """Convolution without bias, batch normalisation, ReLU; padding keeps the size.

    Args:
        kernel_size: Odd.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, dilation: int = 1
    ) -> None:
        conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            padding=dilation * (kernel_size // 2),
            dilation=dilation,
            bias=False,
        )
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        super().__init__(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))


class PooledConv(ConvBatchNorm):
    """Averages over `fields` x `fields` parts of a map, convolved and resized to it again."""

    def __init__(self, in_channels: int, out_channels: int, fields: int) -> None:
        super().__init__(in_channels, out_channels, 1)
        self.fields = fields

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, out_channels, h, w) of features (B, in_channels, h, w).

        Raises:
            ConfigError: One image's average would be normalised over itself, to nothing.
        """
        norm = self[1]
        single = len(features) * self.fields**2 == 1
        if single and norm.training and type(norm) is nn.BatchNorm2d:
            raise ConfigError(
                "train.micro_batch: the head normalises averages of images over the batch and got "
                "1 image in a training pass, expected 2 or more; raise train.micro_batch or "
                "train.batch_size"
            )
        pooled = F.adaptive_avg_pool2d(features, self.fields)
        for layer in self:
            pooled = layer(pooled)
        return _resized(pooled, features)


class FCNHead(nn.Module):
    """Two 3x3 convolutions on the coarsest map, joined with it (Long et al., CVPR 2015)."""

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            ConvBatchNorm(in_channels[-1], channels, 3), ConvBatchNorm(channels, channels, 3)
        )
        self.bottleneck = ConvBatchNorm(in_channels[-1] + channels, channels, 3)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Return the map (B, channels, h, w) at the coarsest map's size."""
        fused: Tensor = self.bottleneck(torch.cat([features[-1], self.convs(features[-1])], dim=1))
        return fused


class PSPNetHead(nn.Module):
    """The coarsest map joined with its averages over 1, 4, 9 and 36 fields (Zhao et al., 2017)."""

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        width = in_channels[-1]
        self.pools = nn.ModuleList(PooledConv(width, channels, fields) for fields in (1, 2, 3, 6))
        self.bottleneck = ConvBatchNorm(width + len(self.pools) * channels, channels, 3)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Return the map (B, channels, h, w) at the coarsest map's size."""
        coarsest = features[-1]
        pooled = [pool(coarsest) for pool in self.pools]
        fused: Tensor = self.bottleneck(torch.cat([coarsest, *pooled], dim=1))
        return fused


class DeepLabV3Head(nn.Module):
    """Four dilated convolutions of the coarsest map, and its average (Chen et al., 2017)."""

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        width = in_channels[-1]
        self.image_pool = PooledConv(width, channels, 1)
        self.branches = nn.ModuleList(
            [
                ConvBatchNorm(width, channels, 1),
                *(ConvBatchNorm(width, channels, 3, dilation=step) for step in (12, 24, 36)),
            ]
        )
        self.bottleneck = ConvBatchNorm((1 + len(self.branches)) * channels, channels, 3)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Return the map (B, channels, h, w) at the coarsest map's size."""
        coarsest = features[-1]
        parts = [self.image_pool(coarsest), *(branch(coarsest) for branch in self.branches)]
        fused: Tensor = self.bottleneck(torch.cat(parts, dim=1))
        return fused


class UPerNetHead(PSPNetHead):
    """A pyramid over all four maps, with pyramid pooling on top (Xiao et al., ECCV 2018).

    As the authors' it differs from `FPN`: bilinear on the way down, batch normalisation, and all
    levels joined at the finest.
    """

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__(in_channels, channels)
        finer = in_channels[:-1]
        self.laterals = nn.ModuleList(ConvBatchNorm(width, channels, 1) for width in finer)
        self.outputs = nn.ModuleList(ConvBatchNorm(channels, channels, 3) for _ in finer)
        self.fusion = ConvBatchNorm(len(in_channels) * channels, channels, 3)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Return the map (B, channels, h, w) at the finest map's size."""
        top = super().forward(features)
        levels = [top]
        for lateral, feature in reversed([*zip(self.laterals, features[:-1], strict=True)]):
            fine = lateral(feature)
            levels.insert(0, fine + _resized(levels[0], fine))
        outputs = [out(level) for out, level in zip(self.outputs, levels[:-1], strict=True)]
        coarser = [_resized(level, outputs[0]) for level in (*outputs[1:], top)]
        fused: Tensor = self.fusion(torch.cat([outputs[0], *coarser], dim=1))
        return fused


HEADS: Mapping[SemanticHead, type[nn.Module]] = {
    "fcn": FCNHead,
    "pspnet": PSPNetHead,
    "deeplabv3": DeepLabV3Head,
    "upernet": UPerNetHead,
}


def _resized(maps: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(maps, size=like.shape[2:], mode="bilinear", align_corners=False)


class Classifier(nn.Module):
    """Dropout of whole channels, then one logit per class."""

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout2d(dropout)
        self.conv = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv.weight, std=0.01)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, C, h, w) of features (B, D, h, w)."""
        logits: Tensor = self.conv(self.dropout(features))
        return logits


class DenseKernels(nn.Module):
    """A dense classifier as static part: one kernel and one mask per class."""

    def __init__(
        self, *, head: nn.Module, classifier: Classifier, auxiliary: nn.Module | None
    ) -> None:
        super().__init__()
        self.head = head
        self.classifier = classifier
        self.auxiliary = auxiliary

    def forward(self, features: Sequence[Tensor]) -> StaticOutput:
        """Predict from the backbone's maps, finest first.

        Kernels keep their gradient: the classifier learns from every update too.
        """
        fused = self.head(features)
        weight = self.classifier.conv.weight.flatten(1)
        stage = StageOutput(
            masks=self.classifier(fused),
            class_logits=None,
            kernels=weight.expand(len(fused), -1, -1),
        )
        auxiliary = None if self.auxiliary is None else self.auxiliary(features[-2])
        return StaticOutput(stage=stage, features=fused, semantic=auxiliary)


def build_semantic_head(
    config: ModelConfig, in_channels: Sequence[int], num_classes: int
) -> DenseKernels:
    """Return the static part of a semantic model over a backbone's channels."""
    semantic = config.semantic
    auxiliary = None
    if semantic.auxiliary:
        auxiliary = nn.Sequential(
            ConvBatchNorm(in_channels[-2], AUXILIARY_CHANNELS, 3),
            Classifier(AUXILIARY_CHANNELS, num_classes, semantic.dropout),
        )
    return DenseKernels(
        head=HEADS[semantic.head](in_channels, config.channels),
        classifier=Classifier(config.channels, num_classes, semantic.dropout),
        auxiliary=auxiliary,
    )
