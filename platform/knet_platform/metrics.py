"""Every metric name, once: how it is shown and which way is better."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from knet_core import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricInfo:
    """How one metric is shown in tables and plots."""

    title: str
    scale: float = 1.0
    """Factor from the stored value to the shown one: a stored AP of 0.341 is shown as 34.1."""
    digits: int = 1
    """Decimals shown."""
    higher_is_better: bool = True
    """Also decides which `mode` a sweep may state for it."""

    def show(self, value: float) -> str:
        """Return the stored `value` as it stands in a table."""
        return f"{value * self.scale:.{self.digits}f}"


def _share(title: str) -> MetricInfo:
    return MetricInfo(title=title, scale=100.0)


def _cost(title: str, digits: int) -> MetricInfo:
    return MetricInfo(title=title, digits=digits, higher_is_better=False)


METRICS: dict[str, MetricInfo] = {
    "val/AP": _share("AP"),
    "val/AP50": _share("AP50"),
    "val/AP75": _share("AP75"),
    "val/APs": _share("APs"),
    "val/APm": _share("APm"),
    "val/APl": _share("APl"),
    "val/PQ": _share("PQ"),
    "val/PQ_th": _share("PQ things"),
    "val/PQ_st": _share("PQ stuff"),
    "val/SQ": _share("SQ"),
    "val/SQ_th": _share("SQ things"),
    "val/SQ_st": _share("SQ stuff"),
    "val/RQ": _share("RQ"),
    "val/RQ_th": _share("RQ things"),
    "val/RQ_st": _share("RQ stuff"),
    "val/mIoU": _share("mIoU"),
    "val/mAcc": _share("Class accuracy"),
    "val/aAcc": _share("Pixel accuracy"),
    "bench/fps": MetricInfo(title="FPS"),
    "train/loss": _cost("Loss", 3),
    "train/lr": MetricInfo(title="Learning rate", digits=6),
    "train/grad_norm": _cost("Gradient norm", 2),
    "sys/images_per_s": MetricInfo(title="Images/s"),
    "sys/data_wait": MetricInfo(title="Waiting for data, %", scale=100.0, higher_is_better=False),
    "sys/host_memory_gb": _cost("Host memory, GB", 2),
    "sys/gpu_utilization": _share("GPU in use, %"),
    "sys/gpu_memory_gb": _cost("GPU memory, GB", 2),
    "sys/gpu_hours": _cost("GPU hours", 2),
    "cost/usd": _cost("USD", 2),
}

MAIN_METRIC = {"instance": "val/AP", "panoptic": "val/PQ", "semantic": "val/mIoU"}
"""What each task is judged by."""

_SCORES = {
    "instance": ("AP",),
    "panoptic": ("PQ", "SQ", "RQ"),
    "semantic": ("mIoU", "mAcc", "aAcc"),
}
"""What each task's scores begin with."""
_LOSS_TERM = re.compile(r"train/loss/(?P<term>[a-z0-9]+(/[a-z]+)?)")
_STAGE = re.compile(r"val/stage(?P<stage>\d+)/(?P<name>\w+)")


def unmeasured(name: str, recipe: "Recipe") -> str | None:
    """Return why no result of a recipe has a metric that is known; None if results have it."""
    task = recipe.model.task
    if _STAGE.fullmatch(name):
        return "knet eval --per-stage alone measures it"
    if name.startswith("val/") and not name.removeprefix("val/").startswith(_SCORES[task]):
        return f"model.task={task} is judged by {MAIN_METRIC[task]} and its like"
    if name == "bench/fps" and recipe.eval.fps_iterations == 0:
        return "eval.fps_iterations=0 leaves it out"
    if name.startswith("train/") and name != "train/loss":
        return "a result has train/loss of that kind, and no other"
    return None


def find_metric(name: str) -> MetricInfo | None:
    """Return what is known of a metric: a name above, `train/loss/<term>`, `val/stage<i>/...`."""
    if term := _LOSS_TERM.fullmatch(name):
        return _cost(f"Loss: {term['term']}", 3)
    if stage := _STAGE.fullmatch(name):
        info = METRICS.get(f"val/{stage['name']}")
        return info and MetricInfo(
            title=f"{info.title}, stage {stage['stage']}", scale=info.scale, digits=info.digits
        )
    return METRICS.get(name)
