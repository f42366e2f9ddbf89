"""Multi-scale features from timm, with the stages that the published recipes freeze."""

import logging
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from knet_core.config import BackboneConfig
from knet_core.errors import ConfigError
from knet_core.models.deformable import make_deformable
from knet_core.models.swin import pad_before_roll

STRIDES = {32: (4, 8, 16, 32), 8: (4, 8, 8, 8)}
"""Of the four maps, by output stride."""

_OFFSETS = ".conv_offset."


class Backbone(nn.Module):
    """Four feature maps at strides 4, 8, 16 and 32, or 4, 8, 8 and 8.

    Freezing and evaluation-mode normalisation follow the published recipes: gradients stop before
    the first `frozen_stages` stages, and with `norm_eval` no batch normalisation updates its
    statistics (their scale and shift still train in the other stages).

    Raises:
        ConfigError: timm does not know the name, the model has no such features or variants, or
            its weights cannot be had.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.norm_eval = config.norm_eval
        self.trunk = _create(config)
        info: Any = self.trunk.feature_info  # timm's own table of what each output is
        # timm joins the names of nested children.
        names = tuple(name.replace(".", "_") for name in info.module_name())
        self.channels: tuple[int, ...] = tuple(info.channels())
        _check_features(self.trunk, config)
        self.nhwc = getattr(self.trunk, "output_fmt", "NCHW") == "NHWC"
        if _is_swin(config.name):
            pad_before_roll(self.trunk)
        if config.deformable and not make_deformable(self.trunk, names[1:]):
            raise ConfigError(
                f"model.backbone.deformable: {config.name!r} has no bottlenecks; "
                f"choose a model such as resnet101"
            )
        if config.checkpoint is not None:
            _load_weights(self.trunk, Path(config.checkpoint))
        self.output_norms = (
            nn.ModuleList(nn.LayerNorm(width) for width in self.channels)
            if config.output_norm
            else None
        )
        self._freeze(config.frozen_stages, names)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return four maps of images (B, 3, H, W), finest first."""
        features: list[Tensor] = self.trunk(images)
        if self.output_norms is None and not self.nhwc:
            return features
        if not self.nhwc:
            features = [feature.permute(0, 2, 3, 1) for feature in features]
        if self.output_norms is not None:
            features = [
                norm(feature) for norm, feature in zip(self.output_norms, features, strict=True)
            ]
        return [feature.permute(0, 3, 1, 2) for feature in features]

    def train(self, mode: bool = True) -> "Backbone":
        """Switch modes; with `norm_eval` batch normalisation stays in evaluation mode."""
        super().train(mode)
        if self.norm_eval:
            for module in self.trunk.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def _freeze(self, frozen_stages: int, names: tuple[str, ...]) -> None:
        if frozen_stages == 0:
            return
        last = names[frozen_stages - 1]
        for name, child in self.trunk.named_children():
            child.requires_grad_(False)
            if name == last:
                return
        raise ConfigError(
            f"model.backbone.frozen_stages: cannot tell the stages of this model apart "
            f"(no child named {last!r}); set it to 0"
        )


def _is_swin(name: str) -> bool:
    known: bool = timm.models.is_model_in_modules(name, ["swin_transformer"])
    return known


def _create(config: BackboneConfig) -> nn.Module:
    options: dict[str, Any] = {}
    if config.output_stride != 32:
        options["output_stride"] = config.output_stride
    if config.drop_path:
        options["drop_path_rate"] = config.drop_path
    if _is_swin(config.name):
        options |= {
            "drop_path_rate": config.drop_path,  # timm's own default is not 0
            "strict_img_size": False,
            "always_partition": True,
            "embed_layer": partial(PatchEmbed, dynamic_img_pad=True),
        }
    try:
        with _quiet_hub():
            trunk: nn.Module = timm.create_model(
                config.name,
                pretrained=config.pretrained,
                features_only=True,
                out_indices=(-4, -3, -2, -1),
                **options,
            )
    except TypeError as error:  # an option that this model has not
        key = re.search(r"output_stride|drop_path", str(error))
        raise ConfigError(
            f"model.backbone.{key[0] if key else 'name'}: timm cannot build {config.name!r} so "
            f"({_first_line(error)}); leave the option out or choose a model such as resnet50"
        ) from error
    except (RuntimeError, IndexError, AssertionError) as error:
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


@contextmanager
def _quiet_hub() -> Iterator[None]:
    """Keep the hub's client from a line for each time that it tries again; the error says it."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_features(trunk: nn.Module, config: BackboneConfig) -> None:
    info: Any = trunk.feature_info
    expected = STRIDES[config.output_stride]
    if tuple(info.reduction()) != expected:
        raise ConfigError(
            f"model.backbone.name: {config.name!r} has strides {info.reduction()}, "
            f"K-Net needs {list(expected)}; choose a hierarchical model such as resnet50"
        )
    weights: Any = getattr(trunk, "pretrained_cfg", None) or {}  # timm's description of them
    if weights.get("fixed_input_size") and not _is_swin(config.name):
        raise ConfigError(
            f"model.backbone.name: {config.name!r} takes images of one size only; "
            f"choose a model such as resnet50 or swin_tiny_patch4_window7_224"
        )


def _load_weights(trunk: nn.Module, file: Path) -> None:
    key = "model.backbone.checkpoint"
    try:
        if file.suffix == ".safetensors":
            weights: Any = load_file(file)
        else:
            weights = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConfigError(f"{key}: cannot read {file} ({error.strerror or error})") from error
    except (RuntimeError, SafetensorError, EOFError, pickle.UnpicklingError) as error:
        # torch's own words advise to run the file's code; they stay in the traceback's cause.
        raise ConfigError(
            f"{key}: {file} is cut short, damaged or holds more than weights; expected a complete "
            f"file of torch.save or .safetensors; fetch it again"
        ) from error
    for wrapper in ("model", "state_dict"):
        if isinstance(weights, Mapping) and isinstance(weights.get(wrapper), Mapping):
            weights = weights[wrapper]
    if not isinstance(weights, Mapping):
        raise ConfigError(f"{key}: {file} holds a {type(weights).__name__}, expected weights")
    try:
        # A classifier's weights are expected to be left over; a missing trunk weight never is.
        missing = trunk.load_state_dict(_timm_names(trunk, weights), strict=False).missing_keys
    except RuntimeError as error:
        shapes = str(error).splitlines()
        raise ConfigError(
            f"{key}: {file} is of another model: {shapes[min(1, len(shapes) - 1)].strip()}"
        ) from error
    # Plain weights start a deformable model: without offsets it is the plain one.
    missing = [name for name in missing if _OFFSETS not in name]
    if missing:
        raise ConfigError(
            f"{key}: {file} lacks {len(missing)} of the backbone's weights, first {missing[0]!r}; "
            f"expected timm's names"
        )


def _timm_names(trunk: nn.Module, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return weights under the trunk's names, which join those of two nested children.

    Swin's authors keep a merging layer with the stage before it, timm with the one after.
    """
    children = {name for name, _ in trunk.named_children()}
    merging_first = "layers.0.downsample.reduction.weight" in weights
    renamed = {}
    for name, weight in weights.items():
        if merging_first and (found := re.match(r"layers\.(\d+)\.(downsample\..+)", name)):
            name = f"layers.{int(found[1]) + 1}.{found[2]}"
        parent, _, rest = name.partition(".")
        child, _, tail = rest.partition(".")
        joined = f"{parent}_{child}"
        renamed[f"{joined}.{tail}" if joined in children else name] = weight
    return renamed


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
