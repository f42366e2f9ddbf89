"""Data sets (COCO, COCO panoptic, ADE20K, synthetic shapes), their loading and fingerprint.

Finding and fingerprinting files and rendering shapes work without torch; everything else is
imported on first use, so that planning a sweep stays fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from knet_core.data.paths import DATA_HOMES, data_fingerprint, data_home, resolve_root
from knet_core.data.storage import is_address, served_from

if TYPE_CHECKING:
    from knet_core.data.dataset import Sample, SegmentationDataset, build_dataset, collate
    from knet_core.data.export import make_shapes
    from knet_core.data.files import image_batch, load_image
    from knet_core.data.loading import TrainStream, eval_loader, train_loader
    from knet_core.data.source import Category

_HOME = {
    "Category": "source",
    "Sample": "dataset",
    "SegmentationDataset": "dataset",
    "TrainStream": "loading",
    "build_dataset": "dataset",
    "collate": "dataset",
    "eval_loader": "loading",
    "image_batch": "files",
    "load_image": "files",
    "make_shapes": "export",
    "train_loader": "loading",
}

__all__ = [
    "DATA_HOMES",
    "Category",
    "Sample",
    "SegmentationDataset",
    "TrainStream",
    "build_dataset",
    "collate",
    "data_fingerprint",
    "data_home",
    "eval_loader",
    "image_batch",
    "is_address",
    "load_image",
    "make_shapes",
    "resolve_root",
    "served_from",
    "train_loader",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
