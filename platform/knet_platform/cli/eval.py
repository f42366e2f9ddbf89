"""`knet eval`: a checkpoint measured on the val split of any data set with its categories."""

import argparse
import json
from pathlib import Path

from knet_core import CheckpointError
from knet_platform.errors import UsageError

EXAMPLES = """\
examples:
  knet eval .knet/runs/0123456789abcdef/checkpoint_300 sweeps/data/shapes.yaml
  knet eval checkpoint_270000 sweeps/data/coco.yaml data.root=/data/coco eval.batch_size=4
  knet eval checkpoint_300 sweeps/data/shapes.yaml --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="folder checkpoint_<step>")
    parser.add_argument("data", type=Path, metavar="DATA", help="a file of sweeps/data")
    parser.add_argument(
        "overrides", nargs="*", metavar="k=v", help="data.* or eval.batch_size of this evaluation"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON")


def run(args: argparse.Namespace) -> int:
    """Evaluate and print the metrics.

    Raises:
        CheckpointError: The checkpoint was trained on other categories than the data has.
        UsageError: An override would change the model that the checkpoint holds.
    """
    import torch

    from knet_core import build_dataset, evaluate, load_model, read_state
    from knet_platform.cli.output import show_metrics, status
    from knet_platform.config import load_recipe

    for item in args.overrides:
        if not item.startswith(("data.", "eval.batch_size=")):
            raise UsageError(
                f"{item}: a checkpoint's recipe is fixed; expected data.<key>=... or "
                f"eval.batch_size=..."
            )
    state = read_state(args.checkpoint)
    recipe = load_recipe(
        args.checkpoint / "recipe.yaml", overrides=[f"data={args.data}", *args.overrides]
    )
    dataset = build_dataset(recipe.data, "val", seed=recipe.seed)
    trained = [category.name for category in state.categories]
    measured = [category.name for category in dataset.categories]
    if trained != measured:
        raise CheckpointError(
            f"{args.checkpoint}: trained on {_list(trained)}, but {args.data} has "
            f"{_list(measured)}; expected the same categories in the same order"
        )
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with status(f"evaluating {len(dataset)} images on {device}"):
        model = load_model(args.checkpoint, device=device)
        metrics, _ = evaluate(
            model, dataset, recipe.eval, device=device, num_workers=recipe.data.num_workers
        )
    if args.json:
        print(json.dumps(metrics, indent=2))
    else:
        show_metrics(f"{args.checkpoint} on {args.data}, {len(dataset)} images", metrics)
    return 0


def _list(names: list[str]) -> str:
    """Return the number of names and the first few."""
    count = "1 category" if len(names) == 1 else f"{len(names)} categories"
    return f"{count} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
