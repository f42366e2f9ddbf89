"""`knet retry --failed`: run the trials of a sweep that failed, and no others."""

import argparse

from knet_platform.cli.run import run_trials
from knet_platform.cli.sweeps import add_sweep_arguments

EXAMPLES = """\
examples:
  knet retry --failed sweeps/stages.yaml --scale laptop
  knet retry --failed sweeps/stages.yaml data.root=/data/coco --json

Give the same arguments as to `knet run`: they say which trials are meant. A trial that had saved
goes on from its last checkpoint."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_sweep_arguments(parser)
    parser.add_argument(
        "--failed", action="store_true", required=True, help="the trials that failed"
    )
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the failed trials, then print the sweep's table."""
    return run_trials(args, only_failed=True)
