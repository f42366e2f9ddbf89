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
    EvaluationMemoryError,
    KNetError,
    NewerFormatError,
    NonFiniteError,
    TrainingMemoryError,
)
from knet_core.unread_keys import unread

if TYPE_CHECKING:
    from knet_core.checkpoint import load_model
    from knet_core.checkpoint_manifest import (
        CONTENT_FILES,
        MANIFEST_FILE,
        parse_manifest,
        verify_checkpoint,
    )
    from knet_core.checkpoint_state import CheckpointState, load_recipe, parse_state, read_state
    from knet_core.data import (
        DATA_HOMES,
        build_dataset,
        data_fingerprint,
        data_home,
        image_batch,
        is_address,
        load_image,
        make_shapes,
        served_from,
    )
    from knet_core.data.check import check_data
    from knet_core.data.check_report import CHECK_ERRORS, CHECK_WARNINGS, CheckReport, Finding
    from knet_core.data.convert import coco_from_index_masks, coco_from_via, write_coco
    from knet_core.engine import fit
    from knet_core.evaluation import evaluate
    from knet_core.inference import keep_freed_memory, prepare_for_inference
    from knet_core.kernel_maps import draw_kernel_maps, mean_activations
    from knet_core.metrics.mask_ap import MaskAP
    from knet_core.models.knet import KNet, build_model
    from knet_core.official import Imported, import_official
    from knet_core.prediction import predict, predict_stages
    from knet_core.progress import Callback, FitResult, Point, Report
    from knet_core.results import ResultWriter, new_folder
    from knet_core.schedule import plan_schedule
    from knet_core.scoring.instances import score_instances
    from knet_core.scoring.panoptic import score_panoptic
    from knet_core.scoring.semantic import score_semantic
    from knet_core.speed import Rate, Speed, measure_speed
    from knet_core.structures import (
        Batch,
        ImageInfo,
        ImageSize,
        Instances,
        KNetOutput,
        LossTerms,
        PanopticMap,
        SemanticMap,
        StageOutput,
        Targets,
    )
    from knet_core.visualize import contact_sheet, draw, draw_instances

_LAZY = {
    "Batch": "knet_core.structures",
    "CHECK_ERRORS": "knet_core.data.check_report",
    "CHECK_WARNINGS": "knet_core.data.check_report",
    "Callback": "knet_core.progress",
    "CheckReport": "knet_core.data.check_report",
    "CheckpointState": "knet_core.checkpoint_state",
    "Finding": "knet_core.data.check_report",
    "FitResult": "knet_core.progress",
    "ImageInfo": "knet_core.structures",
    "ImageSize": "knet_core.structures",
    "Imported": "knet_core.official",
    "Instances": "knet_core.structures",
    "KNet": "knet_core.models.knet",
    "KNetOutput": "knet_core.structures",
    "LossTerms": "knet_core.structures",
    "MaskAP": "knet_core.metrics.mask_ap",
    "PanopticMap": "knet_core.structures",
    "Point": "knet_core.progress",
    "Rate": "knet_core.speed",
    "Report": "knet_core.progress",
    "ResultWriter": "knet_core.results",
    "SemanticMap": "knet_core.structures",
    "Speed": "knet_core.speed",
    "StageOutput": "knet_core.structures",
    "Targets": "knet_core.structures",
    "build_dataset": "knet_core.data",
    "coco_from_index_masks": "knet_core.data.convert",
    "coco_from_via": "knet_core.data.convert",
    "build_model": "knet_core.models.knet",
    "check_data": "knet_core.data.check",
    "contact_sheet": "knet_core.visualize",
    "data_fingerprint": "knet_core.data",
    "data_home": "knet_core.data",
    "DATA_HOMES": "knet_core.data",
    "draw": "knet_core.visualize",
    "draw_instances": "knet_core.visualize",
    "draw_kernel_maps": "knet_core.kernel_maps",
    "evaluate": "knet_core.evaluation",
    "fit": "knet_core.engine",
    "image_batch": "knet_core.data",
    "import_official": "knet_core.official",
    "is_address": "knet_core.data",
    "keep_freed_memory": "knet_core.inference",
    "load_image": "knet_core.data",
    "load_model": "knet_core.checkpoint",
    "load_recipe": "knet_core.checkpoint_state",
    "make_shapes": "knet_core.data",
    "mean_activations": "knet_core.kernel_maps",
    "measure_speed": "knet_core.speed",
    "new_folder": "knet_core.results",
    "CONTENT_FILES": "knet_core.checkpoint_manifest",
    "MANIFEST_FILE": "knet_core.checkpoint_manifest",
    "parse_manifest": "knet_core.checkpoint_manifest",
    "verify_checkpoint": "knet_core.checkpoint_manifest",
    "parse_state": "knet_core.checkpoint_state",
    "plan_schedule": "knet_core.schedule",
    "predict": "knet_core.prediction",
    "predict_stages": "knet_core.prediction",
    "prepare_for_inference": "knet_core.inference",
    "read_state": "knet_core.checkpoint_state",
    "served_from": "knet_core.data",
    "score_instances": "knet_core.scoring.instances",
    "score_panoptic": "knet_core.scoring.panoptic",
    "score_semantic": "knet_core.scoring.semantic",
    "write_coco": "knet_core.data.convert",
}

__all__ = [
    "CHECK_ERRORS",
    "CHECK_WARNINGS",
    "CONTENT_FILES",
    "DATA_HOMES",
    "MANIFEST_FILE",
    "BackboneConfig",
    "Batch",
    "Callback",
    "CheckReport",
    "CheckpointError",
    "CheckpointState",
    "ConfigError",
    "DataConfig",
    "DataError",
    "DiskFullError",
    "EvalConfig",
    "EvaluationMemoryError",
    "Finding",
    "FitResult",
    "ImageInfo",
    "ImageSize",
    "Imported",
    "Instances",
    "KNet",
    "KNetError",
    "KNetOutput",
    "LossConfig",
    "LossTerms",
    "MaskAP",
    "ModelConfig",
    "NewerFormatError",
    "NonFiniteError",
    "OptimConfig",
    "PanopticMap",
    "Point",
    "Rate",
    "Recipe",
    "Report",
    "ResultWriter",
    "SemanticMap",
    "ShapesConfig",
    "Speed",
    "SplitConfig",
    "StageOutput",
    "Targets",
    "TrainConfig",
    "TrainingMemoryError",
    "build_dataset",
    "build_model",
    "check_data",
    "coco_from_index_masks",
    "coco_from_via",
    "contact_sheet",
    "data_fingerprint",
    "data_home",
    "draw",
    "draw_instances",
    "draw_kernel_maps",
    "evaluate",
    "fit",
    "image_batch",
    "import_official",
    "is_address",
    "keep_freed_memory",
    "load_image",
    "load_model",
    "load_recipe",
    "make_shapes",
    "mean_activations",
    "measure_speed",
    "new_folder",
    "parse_manifest",
    "parse_state",
    "plan_schedule",
    "predict",
    "predict_stages",
    "prepare_for_inference",
    "read_state",
    "score_instances",
    "score_panoptic",
    "score_semantic",
    "served_from",
    "unread",
    "verify_checkpoint",
    "write_coco",
]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
