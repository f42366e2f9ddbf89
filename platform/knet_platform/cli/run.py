"""`knet run`: start or continue a sweep, on the Ray cluster in use or on one started here."""

import argparse
import json
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knet_core import DiskFullError
from knet_platform.cluster import prepare_environment, ray_address
from knet_platform.errors import TrialsFailedError
from knet_platform.home import knet_home, storage_uri, tracking_uri
from knet_platform.planning import Sweep, load_sweep
from knet_platform.storage import Store

if TYPE_CHECKING:
    from knet_platform.tracking import BackgroundTracker
    from knet_platform.tuner import SweepOutcome

EXAMPLES = """\
examples:
  knet run sweeps/stages.yaml --scale laptop
  knet run sweeps/stages.yaml data=sweeps/data/coco.yaml data.root=/data/coco --seeds 3
  RAY_ADDRESS=10.0.0.5:6379 knet run sweeps/stages.yaml --json

The same command continues an interrupted sweep; finished trials are never run again."""

LEAST_FREE_GIB = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("sweep", type=Path, help="sweep file, such as sweeps/stages.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="recipe values that win over all files"
    )
    parser.add_argument("--scale", metavar="NAME", help="a file in scales/ beside the sweep")
    parser.add_argument("--seeds", type=int, metavar="N", help="run seeds 0 to N-1")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the sweep, then print its table."""
    sweep = load_sweep(args.sweep, scale=args.scale, overrides=args.overrides, seeds=args.seeds)
    home = knet_home()
    store = Store(storage_uri())
    ray_address()
    _require_space(home, store)
    finished = sum(
        store.trial(trial.hash).status() == "finished" for trial in sweep.distinct_trials
    )
    prepare_environment()

    from knet_platform.progress import open_progress
    from knet_platform.tracking import BackgroundTracker
    from knet_platform.tracking.mlflow import MLflowTracker
    from knet_platform.tuner import run_sweep

    # Ray prints its warnings on stdout, which is for results.
    with redirect_stdout(sys.stderr), open_progress(sweep, finished) as progress:
        tracker = BackgroundTracker(
            MLflowTracker(tracking_uri(), artifacts=home / "mlartifacts"),
            warn=lambda problem: progress.note(f"tracking: {problem} (training goes on)"),
        )
        outcome = run_sweep(sweep, store, tracker, progress, home=home, scale=args.scale)
    if args.json:
        print(json.dumps(_as_json(sweep, outcome, tracker), indent=2))
    else:
        _show(outcome, tracker)
    if tracker.lost:
        print(
            f"tracking: {tracker.lost} updates did not arrive ({tracker.problem}); every result "
            f"is in the store, and the same command brings MLflow up to date",
            file=sys.stderr,
        )
    return TrialsFailedError.exit_code if outcome.failed else 0


def _require_space(home: Path, store: Store) -> None:
    """Refuse to start on a disk that the first checkpoint would fill."""
    for folder in {home, *(() if "://" in store.uri else (Path(store.uri),))}:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free / 2**30
        if free < LEAST_FREE_GIB:
            raise DiskFullError(
                f"{folder}: {free:.2f} GiB free, expected at least {LEAST_FREE_GIB:g}; free some, "
                f"or point KNET_HOME or KNET_STORAGE at a larger disk"
            )


def _show(outcome: "SweepOutcome", tracker: "BackgroundTracker") -> None:
    from knet_platform.cli.output import result_console
    from knet_platform.report import Terminal

    result_console().print(Terminal(outcome.report))
    for trial, reason in outcome.failed:
        print(f"failed: {trial.name}: {reason}")
    print(f"page: {outcome.files['html']}")
    print(f"runs: knet ui, then {tracker.compare_url()}")


def _as_json(
    sweep: Sweep, outcome: "SweepOutcome", tracker: "BackgroundTracker"
) -> dict[str, Any]:
    return {
        "sweep": sweep.name,
        "finished": [
            {"arm": trial.arm, "seed": trial.seed, "trial_hash": trial.hash}
            for trial in outcome.finished
        ],
        "failed": [
            {"arm": trial.arm, "seed": trial.seed, "trial_hash": trial.hash, "reason": reason}
            for trial, reason in outcome.failed
        ],
        "files": {name: str(path) for name, path in outcome.files.items()},
        "compare_url": tracker.compare_url(),
        "tracking_updates_lost": tracker.lost,
    }
