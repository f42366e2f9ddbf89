"""The segmentation core. This module is the only door: platform code imports nothing below it.

Configuration and errors load at once and cost no torch; everything that needs torch is resolved
on first use (PEP 562), so that `knet --help` and `knet plan` stay fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from knet_core.config import (
    BackboneConfig,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    ShapesConfig,
    SplitConfig,
    TrainConfig,
)
from knet_core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DiskFullError,
    KNetError,
    NonFiniteError,
)

if TYPE_CHECKING:
    from knet_core.checkpoint import load_model
    from knet_core.checkpoint_state import CheckpointState, load_recipe, parse_state, read_state
    from knet_core.data import build_dataset, data_fingerprint, make_shapes
    from knet_core.engine import fit
    from knet_core.evaluation import evaluate
    from knet_core.metrics.mask_ap import MaskAP
    from knet_core.models.knet import KNet, build_model
    from knet_core.progress import Callback, FitResult, Point, Report
    from knet_core.schedule import plan_schedule
    from knet_core.structures import Batch, ImageInfo, Instances, KNetOutput, LossTerms, Targets
    from knet_core.visualize import draw_instances

_LAZY = {
    "Batch": "knet_core.structures",
    "Callback": "knet_core.progress",
    "CheckpointState": "knet_core.checkpoint_state",
    "FitResult": "knet_core.progress",
    "ImageInfo": "knet_core.structures",
    "Instances": "knet_core.structures",
    "KNet": "knet_core.models.knet",
    "KNetOutput": "knet_core.structures",
    "LossTerms": "knet_core.structures",
    "MaskAP": "knet_core.metrics.mask_ap",
    "Point": "knet_core.progress",
    "Report": "knet_core.progress",
    "Targets": "knet_core.structures",
    "build_dataset": "knet_core.data",
    "build_model": "knet_core.models.knet",
    "data_fingerprint": "knet_core.data",
    "draw_instances": "knet_core.visualize",
    "evaluate": "knet_core.evaluation",
    "fit": "knet_core.engine",
    "load_model": "knet_core.checkpoint",
    "load_recipe": "knet_core.checkpoint_state",
    "make_shapes": "knet_core.data",
    "parse_state": "knet_core.checkpoint_state",
    "plan_schedule": "knet_core.schedule",
    "read_state": "knet_core.checkpoint_state",
}

__all__ = [
    "BackboneConfig",
    "Batch",
    "Callback",
    "CheckpointError",
    "CheckpointState",
    "ConfigError",
    "DataConfig",
    "DataError",
    "DiskFullError",
    "EvalConfig",
    "FitResult",
    "ImageInfo",
    "Instances",
    "KNet",
    "KNetError",
    "KNetOutput",
    "LossConfig",
    "LossTerms",
    "MaskAP",
    "ModelConfig",
    "NonFiniteError",
    "OptimConfig",
    "Point",
    "Recipe",
    "Report",
    "ShapesConfig",
    "SplitConfig",
    "Targets",
    "TrainConfig",
    "build_dataset",
    "build_model",
    "data_fingerprint",
    "draw_instances",
    "evaluate",
    "fit",
    "load_model",
    "load_recipe",
    "make_shapes",
    "parse_state",
    "plan_schedule",
    "read_state",
]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
