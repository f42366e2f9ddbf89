"""`knet bench`: images per second of a recipe or a checkpoint, as papers time them."""

import argparse
import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from knet_platform.cli.inference import add_device, chosen_device
from knet_platform.errors import UsageError

if TYPE_CHECKING:
    from knet_core import KNet, Speed

EXAMPLES = """\
examples:
  knet bench sweeps/recipes/knet_r50_instance_1x.yaml
  knet bench sweeps/recipes/knet_r50_instance_1x.yaml model.stages=1 --size 512x512
  knet bench runs/mine/checkpoint_300 --iterations 100 --json

A recipe's weights are random: only its post-processing depends on them. Nothing is loaded from a
data set. Convolutions are prepared as for knet eval."""

CLASSES = {
    "coco": (80, 0),
    "coco_panoptic": (80, 53),
    "ade20k": (0, 150),
    "cityscapes": (8, 11),
    "shapes": (6, 4),
}
"""(things, stuff) of the data that a recipe names, since the data itself need not be there."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Kind:
    isthing: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "network", type=Path, metavar="RECIPE|CKPT", help="a recipe, or a folder checkpoint_<step>"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="k=v", help="recipe values that win over the file's"
    )
    parser.add_argument(
        "--size", type=_size, default=(800, 1216), metavar="HxW", help="pixels (default: 800x1216)"
    )
    parser.add_argument(
        "--iterations", type=_count, default=400, metavar="N", help="images per run (default: 400)"
    )
    parser.add_argument(
        "--runs", type=_count, default=3, metavar="N", help="runs to average (default: 3)"
    )
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure and print.

    Raises:
        UsageError: An override would change the model that a checkpoint holds, or there is no
            such device.
    """
    import torch

    from knet_core import keep_freed_memory, measure_speed, prepare_for_inference
    from knet_platform.cli.output import status

    device = chosen_device(args.device)
    keep_freed_memory()
    model = prepare_for_inference(_network(args.network, args.overrides).to(device))
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else _cpu(torch.get_num_threads())
    )
    with status(f"{args.runs} runs of {args.iterations} images on {name}"):
        speed = measure_speed(
            model, args.size, iterations=args.iterations, runs=args.runs, device=device
        )
    values = {
        "network": str(args.network),
        "classes": model.num_classes,
        "device": name,
        "torch": torch.__version__,
        "size": list(args.size),
        "iterations": args.iterations,
        "runs": args.runs,
        **dataclasses.asdict(speed),
    }
    if args.json:
        print(json.dumps(values, indent=2))
    else:
        _show(values, args.size, speed)
    return 0


def _network(path: Path, overrides: list[str]) -> "KNet":
    """Return the model of a checkpoint, or a recipe's with random weights."""
    from knet_core import build_model, load_model
    from knet_platform.config import load_recipe

    if path.is_dir():
        if overrides:
            raise UsageError(f"{overrides[0]}: a checkpoint's recipe is fixed; expected no k=v")
        return load_model(path)
    weights = ("model.backbone.pretrained=false", "model.backbone.checkpoint=null")
    recipe = load_recipe(path, overrides=[*overrides, *weights])
    things, stuff = CLASSES[recipe.data.format]
    if recipe.data.classes:
        stuff = len(recipe.data.classes)
    if recipe.model.task == "instance":
        stuff = 0
    return build_model(recipe, [_Kind(True)] * things + [_Kind(False)] * stuff)


def _show(values: dict[str, object], size: tuple[int, int], speed: "Speed") -> None:
    print(f"{values['network']} at {size[0]}x{size[1]}, one image at a time")
    print(f"{values['device']}, torch {values['torch']}")
    print(f"{values['runs']} runs of {values['iterations']} images, mean and standard deviation:")
    for text, rate in (("network alone", speed.forward), ("image to result", speed.result)):
        print(f"  {text:16} {rate.mean:8.3f} +- {rate.spread:.3f} images/s")
    print(f"  {'peak memory':16} {speed.peak_memory / 2**30:8.2f} GiB")


def _size(text: str) -> tuple[int, int]:
    """Parse HxW."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    height, width = (int(side) for side in found.groups()) if found else (0, 0)
    if min(height, width) < 32 or height % 32 or width % 32:
        raise argparse.ArgumentTypeError(
            f"expected HEIGHTxWIDTH in multiples of 32 such as 800x1216, got {text!r}"
        )
    return height, width


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number >= 1, got {text!r}")
    return int(text)


def _cpu(threads: int) -> str:
    """Return this processor's name; Linux alone tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {threads} threads"
