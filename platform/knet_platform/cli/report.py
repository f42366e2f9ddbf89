"""`knet report`: the ablation table of a sweep, finished or not, and its page.

With `--register`, the winner of the table as well, as a version of a model in MLflow's registry;
with `--serve`, the page on this machine alone, for as long as somebody wants to follow the sweep.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from knet_platform.errors import UsageError
from knet_platform.home import UNTRACKED, knet_home, storage_uri, tracking_uri
from knet_platform.planning import load_sweep
from knet_platform.suggestions import recall
from knet_platform.sweep import Sweep, Trial

if TYPE_CHECKING:
    from collections.abc import Callable

    from knet_platform.report import Report
    from knet_platform.storage import Store
    from knet_platform.tracking.models import Registered

EXAMPLES = """\
examples:
  knet report sweeps/stages.yaml --scale laptop
  knet report sweeps/stages.yaml --scale laptop --format latex > table.tex
  knet report sweeps/stages.yaml --scale laptop --serve       # follows a running sweep
  knet report sweeps/stages.yaml --scale laptop --json
  knet report sweeps/stages.yaml --seeds 3 --out pages/stages
  knet report sweeps/stages.yaml --register stages-winner     # then mlflow.pyfunc.load_model"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("sweep", type=Path, help="the sweep file")
    parser.add_argument("overrides", nargs="*", metavar="k=v", help="as given to `knet run`")
    parser.add_argument("--scale", help="as given to `knet run`")
    parser.add_argument("--seeds", type=int, help="as given to `knet run`")
    parser.add_argument(
        "--out", type=Path, help="folder of the files (default: KNET_HOME/reports/<sweep>)"
    )
    parser.add_argument(
        "--register",
        metavar="NAME",
        help="make the winner a version of this model in MLflow: of the arm with the best mean "
        "over its finished seeds, the best seed",
    )
    parser.add_argument("--port", type=int, help="port of --serve (default: 0, any free one)")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print the report as JSON")
    shape.add_argument(
        "--serve",
        action="store_true",
        help="then serve the page on this machine and keep it up to date, until Ctrl-C",
    )
    shape.add_argument(
        "--format", choices=("md", "latex", "csv"), help="print the table in this form"
    )


def run(args: argparse.Namespace) -> int:
    """Write the report's files, print the table, and register the winner if asked.

    Raises:
        UsageError: There is no winner yet, or nothing is tracked, or the port is taken.
        TrackingError: MLflow does not answer, or has no run of the winner.
    """
    from knet_platform.cli.output import result_console
    from knet_platform.report import FORMATS, Terminal, build_report, write_report
    from knet_platform.storage import Store

    if args.port is not None and not args.serve:
        raise UsageError("--port: is where --serve listens; add --serve, or leave it out")
    planned = load_sweep(args.sweep, scale=args.scale, overrides=args.overrides, seeds=args.seeds)
    store = Store(storage_uri())
    sweep = recall(planned, store)
    report = build_report(sweep, store, scale=args.scale)
    written = write_report(report, args.out or knet_home() / "reports" / sweep.name)
    shape = "json" if args.json else args.format
    if shape:
        sys.stdout.write(FORMATS[shape](report))
    else:
        result_console().print(Terminal(report))
        print(f"page: {written['html']}")
    if args.register:
        winner = _winner(sweep, report)
        registered = _register(args.register, winner, store)
        made = "registered" if registered.new else "is registered already"
        # What is piped elsewhere stays a table.
        print(f"{winner.name} {made}: {registered.uri}", file=sys.stderr if shape else sys.stdout)
    if args.serve:
        _serve(
            lambda: build_report(recall(planned, store), store, scale=args.scale), args.port or 0
        )
    return 0


def _serve(build: "Callable[[], Report]", port: int) -> None:
    from knet_platform.report.serving import HOST, LivePage, page_server

    with page_server(LivePage(build), port) as server:
        address = f"http://{HOST}:{server.server_address[1]}/"
        print(f"live: {address}  (stop with Ctrl-C)", flush=True)
        server.serve_forever()


def _winner(sweep: Sweep, report: "Report") -> Trial:
    """Return the best seed of the arm with the best mean, among those measured alike."""
    metric, sign = sweep.metric.name, 1 if sweep.metric.mode == "max" else -1
    rows = [row for row in report.tables[0].rows if row.cells[0].mean is not None]
    if not rows:
        raise UsageError(
            f"--register: {sweep.name} has no trial that finished with {metric}; expected at "
            f"least one: `knet run` first"
        )
    row = max(rows, key=lambda row: sign * (row.cells[0].mean or 0.0))
    lines = [line for line in row.trials if metric in line.metrics]
    best = max(lines, key=lambda line: sign * line.metrics[metric])
    return next(t for t in sweep.trials if (t.arm, t.seed) == (best.arm, best.seed))


def _register(name: str, trial: Trial, store: "Store") -> "Registered":
    uri = tracking_uri()
    if uri == UNTRACKED:
        raise UsageError(
            "--register: MLFLOW_TRACKING_URI is 'none', so there is no registry; expected an "
            "address, or unset"
        )
    # A registry without a server finds the models that it is told of by MLflow's own setting.
    os.environ["MLFLOW_TRACKING_URI"] = uri
    from knet_platform.tracking.mlflow import MLflowTracker

    return MLflowTracker(uri, artifacts=knet_home() / "mlartifacts").register(
        trial, store.trial(trial.hash), name
    )
