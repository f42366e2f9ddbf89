"""`knet import-official`: a published checkpoint becomes one of this project."""

import argparse
import json
from pathlib import Path

EXAMPLES = """\
examples:
  knet import-official knet_s3_r50_fpn_ms-3x_coco-panoptic.pth models/knet_r50_panoptic
  knet import-official my_model.pth models/my_model --things 12
  knet import-official ablation.pth models/ablation --recipe sweeps/recipes/ablation.yaml --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("file", type=Path, metavar="FILE", help="a published .pth")
    parser.add_argument("out", type=Path, metavar="OUT", help="the checkpoint folder to write")
    parser.add_argument(
        "--recipe",
        type=Path,
        metavar="RECIPE",
        help="take the model from this file, where the weights' shapes leave a choice",
    )
    parser.add_argument(
        "--things",
        type=int,
        metavar="N",
        help="countable classes, for data sets other than COCO (default: 80 of COCO's 133)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Import and print what the file was."""
    from knet_core import import_official
    from knet_platform.cli.output import result_console, status
    from knet_platform.config import load_recipe

    recipe = None if args.recipe is None else load_recipe(args.recipe)
    with status(f"importing {args.file}"):
        imported = import_official(args.file, args.out, recipe, things=args.things)
    model = imported.recipe.model
    if args.json:
        result = {
            "checkpoint": str(imported.directory),
            "model": imported.recipe.to_dict()["model"],
            "categories": [category.name for category in imported.categories],
            "num_keys": imported.num_keys,
            "num_parameters": imported.num_parameters,
            "num_trainable": imported.num_trainable,
            "notes": list(imported.notes),
        }
        print(json.dumps(result, indent=2))
        return 0
    console = result_console()
    kernels = len(imported.categories) if model.task == "semantic" else model.num_kernels
    console.print(
        f"{imported.directory}: {model.task}, {model.backbone.name}, {kernels} kernels, "
        f"{model.stages} updates, {len(imported.categories)} classes; "
        f"{imported.num_keys} weights, {imported.num_parameters / 1e6:.2f} M parameters "
        f"({imported.num_trainable / 1e6:.2f} M trainable)"
    )
    for note in imported.notes:
        console.print(f"note: {note}")
    return 0
