"""`knet sync`: send the tracking store what did not reach it while its sweeps ran."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

from knet_platform.errors import TrackingError
from knet_platform.home import knet_home, tracking_uri
from knet_platform.tracking import (
    Delivery,
    Journal,
    journals,
    open_store,
    pause,
    without_password,
)

EXAMPLES = """\
examples:
  knet sync
  knet sync stages
  MLFLOW_TRACKING_URI=http://mlflow.example:5000 knet sync stages --json

A run that loses its tracking store goes on, and keeps what it has to tell in KNET_HOME/tracking.
Run this once the store is back. A sweep that runs, or runs again, sends what waits by itself."""

ATTEMPTS = 4
"""Times in a row that the store may fail to answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one journal."""

    sweep: str
    sent: int = 0
    refused: int = 0
    """Updates that the store said no to."""
    waiting: int = 0
    """Updates that are still there."""
    problem: str | None = None
    """Why."""

    def __str__(self) -> str:
        refused = f", {self.refused} refused" if self.refused else ""
        waiting = f", {self.waiting} wait: {self.problem}" if self.problem else ""
        return f"{self.sweep}: {self.sent} updates sent{refused}{waiting}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "sweeps", nargs="*", metavar="SWEEP", help="names of sweeps (default: all that wait)"
    )
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")


def run(args: argparse.Namespace) -> int:
    """Send what waits; fail if some of it still does."""
    found = [_sync(path, args.sweeps) for path in journals(knet_home())]
    outcomes = [outcome for outcome in found if outcome is not None]
    if args.json:
        print(json.dumps([asdict(outcome) for outcome in outcomes], indent=2))
    else:
        print("\n".join(map(str, outcomes)) or "nothing waits")
    return TrackingError.exit_code if any(outcome.problem for outcome in outcomes) else 0


def _sync(path: Path, wanted: list[str]) -> Outcome | None:
    """Send what a journal holds; None if it holds nothing, or is of a sweep that is not wanted."""
    name = path.name.rsplit(".", 2)[0]
    try:
        journal = Journal(path, warn=_warn)
    except TrackingError as error:
        return Outcome(sweep=name, problem=str(error)) if not wanted or name in wanted else None
    with closing(journal):
        before, description = len(journal), journal.description()
        if not before or description is None:
            return None
        address, sweep = description
        if wanted and sweep.name not in wanted:
            return None
        if address != without_password(tracking_uri()):
            elsewhere = f"for {address}: set MLFLOW_TRACKING_URI to it"
            return Outcome(sweep=sweep.name, waiting=before, problem=elsewhere)
        tracker = open_store(tracking_uri(), knet_home())
        delivery = Delivery(journal, tracker, warn=_warn)
        problem = _send(delivery, lambda: tracker.start_sweep(sweep))
        return Outcome(
            sweep=sweep.name,
            sent=before - len(journal) - delivery.refused,
            refused=delivery.refused,
            waiting=len(journal),
            problem=problem,
        )


def _send(delivery: Delivery, start: Callable[[], None]) -> str | None:
    """Return why not everything arrived, if so."""
    failures, started = 0, False
    while True:
        try:
            if not started:
                start()
                started = True
            if not delivery.send_batch():
                return None
            failures = 0
        except TrackingError as error:
            failures += 1
            if failures == ATTEMPTS:
                return str(error)
            time.sleep(pause(failures))


def _warn(problem: str) -> None:
    print(f"warning: {problem}", file=sys.stderr)
