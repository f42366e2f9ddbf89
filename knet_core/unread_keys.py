"""What of a recipe nothing reads, because another value of it says so."""

from collections.abc import Iterator

from knet_core.config import Recipe

_OF_MASKS = (
    "model.num_kernels",
    "model.positional_encoding",
    "model.coordinates",
    "model.feature_branches",
    "loss.mask",
    "loss.dice",
    "loss.cls",
    "loss.seg",
    "loss.rank",
    "loss.points",
)
_OF_ATTENTION = ("model.num_heads", "model.ffn_channels")
_OF_UPDATES = (
    "model.update_channels",
    "model.adaptive_update",
    "model.interaction",
    "model.grouping",
    *_OF_ATTENTION,
)
_OF_PANOPTIC_MAPS = ("eval.score_threshold", "eval.overlap_threshold", "eval.pasting")
_OF_FILES = ("data.root", "data.train", "data.val")


def unread(recipe: Recipe) -> dict[str, str]:
    """Return dotted keys, or whole sections, that have no effect, and what decides that.

    Recipes that differ in nothing else are trained to the same model, with the same metrics.
    """
    return dict(_unread(recipe))


def _unread(recipe: Recipe) -> Iterator[tuple[str, str]]:
    model, data, optim, train = recipe.model, recipe.data, recipe.optim, recipe.train
    if model.task == "semantic":
        by_task: tuple[str, ...] = (*_OF_MASKS, "eval.max_detections", *_OF_PANOPTIC_MAPS)
    elif model.task == "panoptic":
        by_task = ("model.semantic", "loss.ce", "loss.auxiliary", "eval.max_detections")
    else:
        by_task = ("model.semantic", "loss.ce", "loss.auxiliary", *_OF_PANOPTIC_MAPS)
    for key in by_task:
        yield key, f"model.task={model.task}"
    if model.stages == 0:
        for key in _OF_UPDATES:
            yield key, "model.stages=0"
    else:
        if not model.interaction:
            for key in _OF_ATTENTION:
                yield key, "model.interaction=false"
        if not model.adaptive_update:
            yield "model.update_channels", "model.adaptive_update=false"
    if model.task == "semantic" and not model.semantic.auxiliary:
        yield "loss.auxiliary", "model.semantic.auxiliary=false"
    for key in _OF_FILES if data.format == "shapes" else ("data.shapes",):
        yield key, f"data.format={data.format}"
    if data.format != "ade20k":
        yield "data.classes", f"data.format={data.format}"
    if data.crop is None:
        yield "data.crop_max_share", "data.crop=null"
    if train.iterations is not None:
        yield "train.epochs", f"train.iterations={train.iterations}"
    if not optim.decay_at:
        yield "optim.decay_factor", "optim.decay_at=[]"
    if optim.warmup_iterations == 0:
        yield "optim.warmup_factor", "optim.warmup_iterations=0"
    if optim.weight_decay == 0:
        yield "optim.decay_norms", "optim.weight_decay=0"
