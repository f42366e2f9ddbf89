"""`knet eval`: a checkpoint measured on the val split of any data set with its categories."""

import argparse
import contextlib
import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from knet_core import CheckpointError
from knet_platform.cli.inference import (
    add_checkpoint,
    add_device,
    chosen_device,
    refused_overrides,
)
from knet_platform.errors import UsageError
from knet_platform.staging import staged

if TYPE_CHECKING:
    from knet_core import CheckpointState, Recipe

EXAMPLES = """\
examples:
  knet eval .knet/runs/0123456789abcdef/checkpoint_300 sweeps/data/shapes.yaml
  knet eval checkpoint_270000 sweeps/data/coco.yaml data.root=/data/coco eval.batch_size=4
  knet eval checkpoint_300 sweeps/data/shapes.yaml --json
  knet eval checkpoint_300 sweeps/data/shapes.yaml --per-stage
  knet eval checkpoint_300 sweeps/data/shapes.yaml --kernel-maps kernels.png
  knet eval checkpoint_300 sweeps/data/shapes.yaml --save-predictions predictions
  knet eval checkpoint_270000 sweeps/data/coco.yaml data.val.images=[test2017] \\
      data.val.annotations=[annotations/image_info_test-dev2017.json] --save-predictions test-dev
  knet eval checkpoint_80000 sweeps/data/ade20k.yaml eval.scales=[0.5,1,1.5] eval.flip=true"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_checkpoint(parser)
    parser.add_argument("data", type=Path, metavar="DATA", help="a file of sweeps/data")
    parser.add_argument(
        "overrides", nargs="*", metavar="k=v", help="data.* or eval.* of this evaluation"
    )
    parser.add_argument(
        "--per-stage",
        action="store_true",
        help="score the static kernels and every update too (paper, supplement C)",
    )
    parser.add_argument(
        "--kernel-maps",
        type=Path,
        metavar="PNG",
        help="draw where each instance kernel looks on average (paper, Fig. 4a)",
    )
    parser.add_argument(
        "--save-predictions",
        type=Path,
        metavar="DIR",
        help="write COCO results, COCO panoptic files or label PNGs into a new folder; data "
        "without annotations (test-dev) is predicted and not scored",
    )
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")


def run(args: argparse.Namespace) -> int:
    """Evaluate and print the metrics.

    Raises:
        CheckpointError: The checkpoint was trained on other categories than the data has. Data
            without annotations need not have them: results are in the checkpoint's.
        DataError: The data has no annotations, and more than saving predictions is asked.
        UsageError: An override would change the model that the checkpoint holds, there is no
            folder for the picture, the folder for predictions exists, or a semantic model is
            asked for its instance kernels.
    """
    from knet_core import read_state
    from knet_platform.config import load_recipe

    if problems := refused_overrides(args.overrides):
        raise UsageError("\n".join(problems))
    if args.kernel_maps is not None and not args.kernel_maps.absolute().parent.is_dir():
        raise UsageError(
            f"--kernel-maps: no folder {args.kernel_maps.parent}; make it, or name another file"
        )
    if args.save_predictions is not None and args.save_predictions.exists():
        raise UsageError(
            f"--save-predictions: {args.save_predictions} exists; remove it or choose another"
        )
    state = read_state(args.checkpoint)
    recipe = load_recipe(
        args.checkpoint / "recipe.yaml", overrides=[f"data={args.data}", *args.overrides]
    )
    with staged(recipe.data):
        return _evaluate(args, recipe, state)


def _evaluate(args: argparse.Namespace, recipe: "Recipe", state: "CheckpointState") -> int:
    from knet_core import (
        ResultWriter,
        build_dataset,
        draw_kernel_maps,
        evaluate,
        keep_freed_memory,
        load_model,
        mean_activations,
        new_folder,
        prepare_for_inference,
    )
    from knet_platform.cli.output import progress_bar, show_metrics, status

    dataset = build_dataset(recipe.data, "val", seed=recipe.seed, task=recipe.model.task)
    if args.kernel_maps is not None and recipe.model.task == "semantic":
        raise UsageError(
            f"--kernel-maps: {args.checkpoint} is a semantic model, with one kernel per class and "
            f"no instance kernels; leave it out"
        )
    if dataset.annotated:
        trained = [category.name for category in state.categories]
        _require_same(args.checkpoint, trained, args.data, [c.name for c in dataset.categories])
    scored = dataset.annotated or args.save_predictions is None or args.per_stage
    device = chosen_device(args.device)
    num_workers = recipe.data.num_workers
    keep_freed_memory()
    with contextlib.ExitStack() as stack:
        save = None
        if args.save_predictions is not None:
            folder = stack.enter_context(new_folder(args.save_predictions))
            save = stack.enter_context(ResultWriter(folder, state.categories)).add

        stack.enter_context(status(f"evaluating {len(dataset)} images on {device}"))
        loaded = load_model(args.checkpoint, device=device, evaluation=recipe.eval)
        model = prepare_for_inference(loaded)
        metrics, _ = evaluate(
            model,
            dataset,
            dataclasses.replace(recipe.eval, probe_images=0),
            device=device,
            num_workers=num_workers,
            per_stage=args.per_stage,
            scored=scored,
            on_prediction=save,
        )
    if args.kernel_maps is not None:
        with progress_bar("kernel maps") as advance:
            maps = mean_activations(
                model, dataset, device=device, num_workers=num_workers, progress=advance
            )
        args.kernel_maps.write_bytes(draw_kernel_maps(maps))
    if not scored:
        saved = {"folder": str(args.save_predictions), "images": len(dataset)}
        text = f"{args.save_predictions}: predictions of {len(dataset)} images"
        print(json.dumps(saved) if args.json else text)
    elif args.json:
        print(json.dumps(metrics, indent=2))
    else:
        title = f"{args.checkpoint} on {args.data}, {len(dataset)} images"
        (_show_stages if args.per_stage else show_metrics)(title, metrics)
    return 0


def _show_stages(title: str, metrics: Mapping[str, float]) -> None:
    """Print one row per stage; the last is the model's result."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from knet_platform.cli.output import result_console
    from knet_platform.metrics import METRICS

    names = [name for name in metrics if name in METRICS]
    table = Table("kernels", box=box.SIMPLE_HEAD)
    for name in names:
        table.add_column(METRICS[name].title, justify="right")
    for stage in range(len(metrics) // len(names) - 1):
        values = (metrics[name.replace("val/", f"val/stage{stage}/")] for name in names)
        shown = (METRICS[name].show(value) for name, value in zip(names, values, strict=True))
        table.add_row(f"update {stage}" if stage else "static", *shown)
    console = result_console()
    console.print(Text(title, style="bold"))
    console.print(table)


def _require_same(
    checkpoint: Path, trained: Sequence[str], data: Path, measured: Sequence[str]
) -> None:
    """Compare the classes of a checkpoint with those of a data set.

    Raises:
        CheckpointError: They differ; names the first that does.
    """
    for place, (ours, theirs) in enumerate(itertools.zip_longest(trained, measured), start=1):
        if ours != theirs:
            raise CheckpointError(
                f"{checkpoint}: trained on {_count(trained)}, but {data} has {_count(measured)}; "
                f"the first to differ, number {place}, is {ours or 'none'} there and "
                f"{theirs or 'none'} here; expected the same categories in the same order"
            )


def _count(names: Sequence[str]) -> str:
    return "1 category" if len(names) == 1 else f"{len(names)} categories"
