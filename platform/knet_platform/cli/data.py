"""`knet data`: data sets on disk."""

import argparse
import json
from pathlib import Path

from knet_platform.cli.data_check import add_check, run_check

EXAMPLES = """\
examples:
  knet data make-shapes demo/shapes
  knet data check sweeps/data/coco.yaml data.root=/data/coco
  knet data convert via balloon/train/via_region_data.json balloon/annotations/instances_train.json
  knet data check --help"""

SHAPES_EXAMPLES = """\
examples:
  knet data make-shapes demo/shapes
  knet data make-shapes demo/shapes --train 1000 --val 200 --size 128 --seed 0"""

CONVERT_EXAMPLES = """\
examples:
  knet data convert via balloon/train/via_region_data.json balloon/annotations/instances_train.json
  knet data convert index-masks cells/images cells/masks cells/annotations/instances_train.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    shapes = actions.add_parser(
        "make-shapes",
        help="write the synthetic set",
        description="Write the synthetic set: COCO instances, COCO panoptic and ADE20K-style "
        "semantic layouts at once; the same bytes for the same seed.",
        epilog=SHAPES_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shapes.add_argument("directory", type=Path, metavar="DIR", help="a new or empty folder")
    for option, default, what in (
        ("--train", 256, "training images"),
        ("--val", 64, "validation images"),
        ("--size", 128, "height and width in pixels"),
        ("--seed", 0, "another seed, another set"),
    ):
        shapes.add_argument(
            option, type=int, default=default, metavar="N", help=f"{what} (default: {default})"
        )
    shapes.add_argument("--json", action="store_true", help="print what was written as JSON")
    _add_convert(actions)
    add_check(actions)


def _add_convert(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    convert = actions.add_parser(
        "convert",
        help="write annotations of another format as COCO JSON",
        description="Write annotations of another format as a COCO instance file. Images stay "
        "where they are: data.root and data.train.images have to lead there.",
        epilog=CONVERT_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = convert.add_subparsers(dest="kind", required=True, metavar="KIND")
    via = kinds.add_parser("via", help="polygons of the VGG Image Annotator (VIA)")
    via.add_argument("source", type=Path, metavar="FILE", help="VIA's JSON, beside the images")
    via.add_argument(
        "--class-attribute",
        metavar="NAME",
        help="region attribute that holds the class (default: all are one class)",
    )
    masks = kinds.add_parser("index-masks", help="masks whose pixels hold the object's number")
    masks.add_argument("images", type=Path, metavar="IMAGES", help="folder of the images")
    masks.add_argument(
        "masks", type=Path, metavar="MASKS", help="folder of the masks, named like the images"
    )
    for kind in (via, masks):
        kind.add_argument("out", type=Path, metavar="OUT", help="the COCO file to write")
        kind.add_argument(
            "--name", default="object", help="name of the only class (default: object)"
        )
        kind.add_argument("--json", action="store_true", help="print what was written as JSON")


def run(args: argparse.Namespace) -> int:
    """Do what the action says."""
    if args.action == "check":
        return run_check(args)
    return _convert(args) if args.action == "convert" else _make_shapes(args)


def _convert(args: argparse.Namespace) -> int:
    from knet_core import coco_from_index_masks, coco_from_via, write_coco

    if args.kind == "via":
        document = coco_from_via(args.source, class_attribute=args.class_attribute, name=args.name)
    else:
        document = coco_from_index_masks(args.images, args.masks, name=args.name)
    write_coco(document, args.out)
    counts = {key: len(document[key]) for key in ("images", "annotations", "categories")}
    if args.json:
        print(json.dumps({"file": str(args.out), **counts}))
    else:
        print(f"{args.out}: " + ", ".join(f"{count} {key}" for key, count in counts.items()))
    return 0


def _make_shapes(args: argparse.Namespace) -> int:
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
