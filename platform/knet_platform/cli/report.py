"""`knet report`: the ablation table of a sweep, finished or not, and its page."""

import argparse
import sys
from pathlib import Path

from knet_platform.home import knet_home, storage_uri
from knet_platform.planning import load_sweep
from knet_platform.suggestions import recall

EXAMPLES = """\
examples:
  knet report sweeps/stages.yaml --scale laptop
  knet report sweeps/stages.yaml --scale laptop --format latex > table.tex
  knet report sweeps/stages.yaml --scale laptop --json
  knet report sweeps/stages.yaml --seeds 3 --out pages/stages"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("sweep", type=Path, help="the sweep file")
    parser.add_argument("overrides", nargs="*", metavar="k=v", help="as given to `knet run`")
    parser.add_argument("--scale", help="as given to `knet run`")
    parser.add_argument("--seeds", type=int, help="as given to `knet run`")
    parser.add_argument(
        "--out", type=Path, help="folder of the files (default: KNET_HOME/reports/<sweep>)"
    )
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print the report as JSON")
    shape.add_argument(
        "--format", choices=("md", "latex", "csv"), help="print the table in this form"
    )


def run(args: argparse.Namespace) -> int:
    """Write the report's files and print the table."""
    from knet_platform.cli.output import result_console
    from knet_platform.report import FORMATS, Terminal, build_report, write_report
    from knet_platform.storage import Store

    sweep = load_sweep(args.sweep, scale=args.scale, overrides=args.overrides, seeds=args.seeds)
    store = Store(storage_uri())
    report = build_report(recall(sweep, store), store, scale=args.scale)
    written = write_report(report, args.out or knet_home() / "reports" / sweep.name)
    shape = "json" if args.json else args.format
    if shape:
        sys.stdout.write(FORMATS[shape](report))
    else:
        result_console().print(Terminal(report))
        print(f"page: {written['html']}")
    return 0
