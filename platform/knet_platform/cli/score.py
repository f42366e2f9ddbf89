"""`knet score`: result files of any origin against ground truth."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from knet_platform.errors import UsageError

EXAMPLES = """\
examples:
  knet score panoptic --gt-json panoptic_val2017.json --gt-dir panoptic_val2017 \\
      --pred-json predictions/panoptic.json --pred-dir predictions/panoptic
  knet score instance --gt instances_val2017.json --pred predictions/instances.json
  knet score semantic --gt-dir annotations/validation --pred-dir predictions/semantic \\
      --num-classes 150 --reduce-zero-label --pred-from-one"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    panoptic = tasks.add_parser("panoptic", help="panoptic quality of COCO panoptic files")
    for side, what in (("gt", "ground truth"), ("pred", "predictions")):
        panoptic.add_argument(
            f"--{side}-json", type=Path, required=True, metavar="FILE", help=f"JSON of {what}"
        )
        panoptic.add_argument(
            f"--{side}-dir", type=Path, required=True, metavar="DIR", help=f"PNGs of {what}"
        )
    instance = tasks.add_parser("instance", help="average precision of COCO results")
    instance.add_argument(
        "--gt", type=Path, required=True, metavar="FILE", help="COCO instance JSON"
    )
    instance.add_argument(
        "--pred", type=Path, required=True, metavar="FILE", help="COCO results JSON"
    )
    instance.add_argument(
        "--iou-type", choices=("segm", "bbox"), default="segm", help="masks (default) or boxes"
    )
    semantic = tasks.add_parser("semantic", help="mean IoU of label PNGs of the same names")
    semantic.add_argument(
        "--gt-dir", type=Path, required=True, metavar="DIR", help="label PNGs of ground truth"
    )
    semantic.add_argument(
        "--pred-dir", type=Path, required=True, metavar="DIR", help="label PNGs of predictions"
    )
    semantic.add_argument(
        "--num-classes", type=int, required=True, metavar="N", help="labels are 0 to N - 1"
    )
    semantic.add_argument(
        "--ignore-index",
        type=int,
        default=255,
        metavar="LABEL",
        help="true label that does not count (default: 255)",
    )
    semantic.add_argument(
        "--reduce-zero-label",
        action="store_true",
        help="true pixels hold label + 1, 0 does not count (ADE20K)",
    )
    semantic.add_argument(
        "--pred-from-one",
        action="store_true",
        help="predicted pixels hold label + 1, as knet writes them for ADE20K's server",
    )
    for task in (panoptic, instance, semantic):
        task.add_argument(
            "--workers", type=int, metavar="N", help="processes (default: one per core)"
        )
        task.add_argument("--json", action="store_true", help="print the scores as JSON")


def run(args: argparse.Namespace) -> int:
    """Score and print.

    Raises:
        DataError: A file cannot be used; one line for each problem.
        UsageError: An impossible number of processes.
    """
    from knet_core import score_instances, score_panoptic, score_semantic
    from knet_platform.cli.output import progress_bar

    if args.workers is not None and args.workers < 1:
        raise UsageError(f"--workers: {args.workers}; expected at least 1")
    scores: dict[str, Any]
    with progress_bar("scoring") as advance:
        if args.task == "panoptic":
            scores = score_panoptic(
                args.gt_json,
                args.gt_dir,
                args.pred_json,
                args.pred_dir,
                workers=args.workers,
                progress=advance,
            )
        elif args.task == "instance":
            scores = dict(
                score_instances(
                    args.gt,
                    args.pred,
                    iou_type=args.iou_type,
                    workers=args.workers,
                    progress=advance,
                )
            )
        else:
            scores = score_semantic(
                args.gt_dir,
                args.pred_dir,
                num_classes=args.num_classes,
                ignore_index=args.ignore_index,
                reduce_zero_label=args.reduce_zero_label,
                pred_from_one=args.pred_from_one,
                workers=args.workers,
                progress=advance,
            )
    if args.json:
        print(json.dumps(scores))
    elif args.task == "panoptic":
        _show_panoptic(scores)
    else:
        _show(scores)
    return 0


def _show_panoptic(scores: Mapping[str, Any]) -> None:
    """Print panopticapi's table, classes that occur below it."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from knet_platform.cli.output import result_console

    table = Table("", "PQ", "SQ", "RQ", "N", box=box.SIMPLE_HEAD)
    for name in ("All", "Things", "Stuff"):
        row = scores[name]
        table.add_row(name, *(f"{row[key]:.1f}" for key in ("PQ", "SQ", "RQ")), str(row["N"]))
    table.add_section()
    for number, row in scores["per_class"].items():
        if row["tp"] or row["fp"] or row["fn"]:
            values = (f"{row[key]:.1f}" for key in ("pq", "sq", "rq"))
            table.add_row(Text(row["name"] or number), *values, "")
    result_console().print(table)


def _show(scores: Mapping[str, Any]) -> None:
    """Print one score a line, in percent."""
    for name, value in scores.items():
        if name != "per_class":
            print(f"{name:6} {'-' if value is None else f'{100 * value:5.1f}'}")
    for label, value in enumerate(scores.get("per_class", ())):
        if value is not None:
            print(f"IoU of class {label}: {100 * value:.1f}")
