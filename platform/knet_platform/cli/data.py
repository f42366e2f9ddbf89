"""`knet data`: data sets on disk."""

import argparse
import json
from pathlib import Path

EXAMPLES = """\
examples:
  knet data make-shapes demo/shapes
  knet data make-shapes demo/shapes --train 1000 --val 200 --size 128 --seed 0"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    shapes = actions.add_parser(
        "make-shapes",
        help="write the synthetic set",
        description="Write the synthetic set: COCO instances, COCO panoptic and ADE20K-style "
        "semantic layouts at once; the same bytes for the same seed.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shapes.add_argument("directory", type=Path, metavar="DIR", help="a new or empty folder")
    shapes.add_argument("--train", type=int, default=256, help="training images (default: 256)")
    shapes.add_argument("--val", type=int, default=64, help="validation images (default: 64)")
    shapes.add_argument("--size", type=int, default=128, help="pixels a side (default: 128)")
    shapes.add_argument("--seed", type=int, default=0, help="another seed, another set")
    shapes.add_argument("--json", action="store_true", help="print what was written as JSON")


def run(args: argparse.Namespace) -> int:
    """Write the set with a progress bar."""
    from knet_core import make_shapes
    from knet_platform.cli.output import progress_bar

    with progress_bar("shapes") as advance:
        make_shapes(
            args.directory,
            num_train=args.train,
            num_val=args.val,
            size=args.size,
            seed=args.seed,
            progress=advance,
        )
    if args.json:
        written = {"directory": str(args.directory), "train": args.train, "val": args.val}
        print(json.dumps({**written, "size": args.size, "seed": args.seed}))
    else:
        print(f"{args.directory}: {args.train} training and {args.val} validation images")
    return 0
