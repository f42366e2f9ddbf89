"""`knet run`: start or continue a sweep, on the Ray cluster in use or on one started here."""

import argparse
import json
import shutil
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knet_core import DiskFullError
from knet_platform.cli.sweeps import add_sweep_arguments, load_priced_sweep
from knet_platform.cluster import prepare_environment, ray_address
from knet_platform.errors import BudgetError, TrialsFailedError
from knet_platform.forecast import look_up, make_forecast, require_budget
from knet_platform.home import (
    knet_home,
    nearest_existing,
    require_writable,
    storage_uri,
    tracking_uri,
)
from knet_platform.storage import Store
from knet_platform.suggestions import recall
from knet_platform.sweep import Sweep

if TYPE_CHECKING:
    from knet_platform.tracking import JournaledTracker, NoTracker
    from knet_platform.tuner import SweepOutcome

EXAMPLES = """\
examples:
  knet run sweeps/stages.yaml --scale laptop
  knet run sweeps/stages.yaml data=sweeps/data/coco.yaml data.root=/data/coco --seeds 3
  knet run sweeps/stages.yaml --instance g5.12xlarge --spot --max-usd 200
  RAY_ADDRESS=10.0.0.5:6379 knet run sweeps/stages.yaml --json

The same command continues an interrupted sweep. Finished trials are never run again, failed ones
are; `knet retry --failed` runs those alone."""

LEAST_FREE_GIB = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_sweep_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the sweep, then print its table."""
    return run_trials(args, only_failed=False)


def run_trials(args: argparse.Namespace, *, only_failed: bool) -> int:
    """Run what is not finished, or only what failed, then print the table."""
    sweep, price = load_priced_sweep(args)
    home = knet_home()
    store = Store(storage_uri())
    ray_address()
    _require_room(home, store)
    sweep = recall(sweep, store)
    if only_failed and sweep.search:
        sweep = replace(sweep, search=sweep.search.closed())
    rows = look_up(sweep, store, gpu=price.gpu)
    if only_failed:
        rows = [row if row.state == "failed" else replace(row, estimate=None) for row in rows]
    require_budget(sweep, make_forecast(sweep, rows, price))
    states = {row.trial.hash: row.state for row in rows}
    finished = sum(state == "finished" for state in states.values())
    prepare_environment()

    from knet_platform.progress import open_progress
    from knet_platform.tracking import open_tracker
    from knet_platform.tuner import run_sweep

    # Ray prints its warnings on stdout, which is for results.
    with redirect_stdout(sys.stderr), open_progress(sweep, finished) as progress:
        if finished:
            progress.note(
                f"{finished} of {len(states)} trials were finished before and are not run again "
                f"(found by their hashes, whatever the sweep was called)"
            )
        if only_failed and "failed" not in states.values():
            progress.note("no trial failed: there is nothing to retry")
        tracker = open_tracker(
            sweep.name,
            tracking_uri(),
            home,
            warn=lambda problem: progress.note(f"tracking: {problem} (training goes on)"),
        )
        outcome = run_sweep(
            sweep,
            store,
            tracker,
            progress,
            home=home,
            scale=args.scale,
            price=price,
            only_failed=only_failed,
        )
    if args.json:
        print(json.dumps(_as_json(sweep, outcome, tracker), indent=2))
    else:
        _show(outcome, tracker)
    if left := tracker.left():
        print(f"tracking: {left}", file=sys.stderr)
    if to_go := len(outcome.paused) + outcome.unsuggested:
        raise BudgetError(
            f"{sweep.path}: budget: reached with {to_go} trials to go; the same "
            f"command with a higher --max-usd or budget: goes on from their checkpoints"
        )
    return TrialsFailedError.exit_code if outcome.failed else 0


def _require_room(home: Path, store: Store) -> None:
    """Refuse to start on a disk that takes nothing, or that the first checkpoint would fill."""
    for folder in (home, *(() if "://" in store.uri else (Path(store.uri),))):
        require_writable(folder)
        free = shutil.disk_usage(nearest_existing(folder)).free / 2**30
        if free < LEAST_FREE_GIB:
            raise DiskFullError(
                f"{folder}: {free:.2f} GiB free, expected at least {LEAST_FREE_GIB:g}; free some, "
                f"or point KNET_HOME or KNET_STORAGE at a larger disk"
            )


def _show(outcome: "SweepOutcome", tracker: "JournaledTracker | NoTracker") -> None:
    from knet_platform.cli.output import result_console
    from knet_platform.report import Terminal

    result_console().print(Terminal(outcome.report))
    for trial, reason in outcome.failed:
        print(f"failed: {trial.name}: {reason}")
    print(f"page: {outcome.files['html']}")
    for link in outcome.report.links:
        print(f"MLflow, {link.name}: {link.url}")
    if outcome.report.links and tracking_uri().startswith("sqlite"):
        print("these pages are there while `knet ui` runs")


def _as_json(
    sweep: Sweep, outcome: "SweepOutcome", tracker: "JournaledTracker | NoTracker"
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
        "paused": [
            {"arm": trial.arm, "seed": trial.seed, "trial_hash": trial.hash}
            for trial in outcome.paused
        ],
        "pruned": [
            {"arm": trial.arm, "seed": trial.seed, "trial_hash": trial.hash}
            for trial in outcome.pruned
        ],
        "unsuggested": outcome.unsuggested,
        "files": {name: str(path) for name, path in outcome.files.items()},
        "sweep_url": tracker.sweep_url(),
        "compare_url": tracker.compare_url(),
        "tracking_updates_waiting": tracker.waiting,
        "tracking_updates_lost": tracker.lost,
    }
