"""Multi-scale features from timm, with the stages that the published recipe freezes."""

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from knet_core.config import BackboneConfig
from knet_core.errors import ConfigError

STRIDES = (4, 8, 16, 32)


class Backbone(nn.Module):
    """Four feature maps at strides 4, 8, 16 and 32.

    Freezing and evaluation-mode normalisation follow the published recipe: gradients stop before
    the first `frozen_stages` stages, and with `norm_eval` no batch normalisation updates its
    statistics (their scale and shift still train in the other stages).

    Raises:
        ConfigError: timm does not know the name, the model has no such features, or its weights
            cannot be had.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.norm_eval = config.norm_eval
        self.trunk = _create(config)
        info: Any = self.trunk.feature_info  # timm's own table of what each output is
        self._stage_names: list[str] = info.module_name()
        self.channels: tuple[int, ...] = tuple(info.channels())
        if tuple(info.reduction()) != STRIDES:
            raise ConfigError(
                f"model.backbone.name: {config.name!r} has strides {info.reduction()}, "
                f"K-Net needs {list(STRIDES)}; choose a hierarchical model such as resnet50"
            )
        if config.checkpoint is not None:
            _load_weights(self.trunk, Path(config.checkpoint))
        self._freeze(config.frozen_stages)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return four maps of images (B, 3, H, W), finest first."""
        features: list[Tensor] = self.trunk(images)
        return features

    def train(self, mode: bool = True) -> "Backbone":
        """Switch modes; with `norm_eval` batch normalisation stays in evaluation mode."""
        super().train(mode)
        if self.norm_eval:
            for module in self.trunk.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def _freeze(self, frozen_stages: int) -> None:
        if frozen_stages == 0:
            return
        last = self._stage_names[frozen_stages - 1]
        for name, child in self.trunk.named_children():
            child.requires_grad_(False)
            if name == last:
                return
        raise ConfigError(
            f"model.backbone.frozen_stages: cannot tell the stages of this model apart "
            f"(no child named {last!r}); set it to 0"
        )


def _create(config: BackboneConfig) -> nn.Module:
    try:
        trunk: nn.Module = timm.create_model(
            config.name,
            pretrained=config.pretrained,
            features_only=True,
            out_indices=(-4, -3, -2, -1),
        )
    except RuntimeError as error:
        hint = timm.list_models(f"{config.name[:6]}*")[:4]
        raise ConfigError(
            f"model.backbone.name: timm cannot build {config.name!r} ({_first_line(error)}); "
            f"similar names: {', '.join(hint) or 'none'}"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"model.backbone.pretrained: no weights for {config.name!r} "
            f"({_first_line(error)}); set model.backbone.pretrained=false and "
            f"model.backbone.checkpoint=FILE"
        ) from error
    return trunk


def _load_weights(trunk: nn.Module, file: Path) -> None:
    key = "model.backbone.checkpoint"
    try:
        if file.suffix == ".safetensors":
            weights = load_file(file)
        else:
            weights = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, SafetensorError, EOFError) as error:
        raise ConfigError(f"{key}: cannot read {file}: {_first_line(error)}") from error
    # A classifier's weights are expected to be left over; a missing trunk weight never is.
    missing = trunk.load_state_dict(weights, strict=False).missing_keys
    if missing:
        raise ConfigError(
            f"{key}: {file} lacks {len(missing)} of the backbone's weights, first {missing[0]!r}; "
            f"expected timm's names"
        )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
