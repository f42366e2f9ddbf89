"""`knet plan`: arms x seeds, what is done, and how long the rest takes. Touches nothing."""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knet_platform.home import storage_uri
from knet_platform.pace import Done, Estimate, estimate, num_iterations
from knet_platform.planning import Sweep, Trial, load_sweep
from knet_platform.storage import Status, Store, TrialStore

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLES = """\
examples:
  knet plan sweeps/stages.yaml --scale laptop
  knet plan sweeps/stages.yaml data.root=/data/coco --seeds 3
  knet plan sweeps/stages.yaml --scale laptop train.iterations=1000 --json"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    trial: Trial
    status: Status
    step: int
    reason: str | None
    estimate: Estimate | None
    """None for a finished trial."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("sweep", type=Path, help="sweep file, such as sweeps/stages.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="recipe values that win over all files"
    )
    parser.add_argument("--scale", metavar="NAME", help="a file in scales/ beside the sweep")
    parser.add_argument("--seeds", type=int, metavar="N", help="run seeds 0 to N-1")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the plan."""
    sweep = load_sweep(args.sweep, scale=args.scale, overrides=args.overrides, seeds=args.seeds)
    rows = _rows(sweep, Store(storage_uri()))
    if args.json:
        print(json.dumps(_as_json(sweep, rows), indent=2))
    else:
        _show(sweep, rows)
    return 0


def _rows(sweep: Sweep, store: Store) -> list[_Row]:
    found = [_look_up(store.trial(trial.hash)) for trial in sweep.trials]
    pairs = list(zip(sweep.trials, found, strict=True))
    history = {trial.hash: done for trial, (_, done, _) in pairs if done is not None}
    return [
        _Row(
            trial=trial,
            status=status,
            step=done.step if done else 0,
            reason=reason,
            estimate=None
            if status == "finished"
            else estimate(trial, sweep.resources, history, sweep.trials),
        )
        for trial, (status, done, reason) in pairs
    ]


def _look_up(store: TrialStore) -> tuple[Status, Done | None, str | None]:
    status = store.status()
    if status == "new":
        return status, None, None
    if status == "finished" and (result := store.result()):
        return status, Done(step=result.step, seconds=result.seconds), None
    failure = store.failure()
    state = store.state()
    done = Done(step=state.step, seconds=state.seconds) if state else None
    return status, done, f"{failure.kind}: {failure.message}" if failure else None


def _total(rows: Sequence[_Row]) -> tuple[float, float, float, str]:
    """Return seconds, their low and high end, and where they come from."""
    estimates = [row.estimate for row in rows if row.estimate]
    seconds = sum(item.seconds for item in estimates)
    low = sum(item.seconds / item.band for item in estimates)
    high = sum(item.seconds * item.band for item in estimates)
    return seconds, low, high, " + ".join(sorted({item.source for item in estimates}))


def _as_json(sweep: Sweep, rows: Sequence[_Row]) -> dict[str, Any]:
    seconds, low, high, source = _total(rows)
    recipe = sweep.trials[0].recipe
    return {
        "sweep": sweep.name,
        "title": sweep.title,
        "metric": sweep.metric.name,
        "baseline": sweep.baseline,
        "workers": sweep.resources.workers,
        "batch_size": recipe.train.batch_size,
        "batch_size_per_worker": recipe.train.batch_size // sweep.resources.workers,
        "trials": [
            {
                "arm": row.trial.arm,
                "seed": row.trial.seed,
                "hash": row.trial.hash,
                "status": row.status,
                "step": row.step,
                "iterations": num_iterations(row.trial.recipe),
                "reason": row.reason,
                "seconds": row.estimate.seconds if row.estimate else 0.0,
                "source": row.estimate.source if row.estimate else None,
            }
            for row in rows
        ],
        "total": {
            "trials": len(rows),
            "finished": sum(row.status == "finished" for row in rows),
            "seconds": seconds,
            "seconds_low": low,
            "seconds_high": high,
            "gpu_hours": _gpu_hours(sweep, seconds),
            "source": source,
        },
    }


def _show(sweep: Sweep, rows: Sequence[_Row]) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    recipe = sweep.trials[0].recipe
    workers = sweep.resources.workers
    share = recipe.train.batch_size // workers
    console.print(f"{sweep.name}: {sweep.title}", markup=False)
    console.print(
        f"{len(sweep.arms)} arms x {len(sweep.seeds)} seeds = {len(rows)} trials, "
        f"judged by {sweep.metric.name}"
    )
    console.print(
        f"batch of {recipe.train.batch_size} images = {workers} workers x {share}, "
        f"learning rate {recipe.optim.lr:g} as stated"
    )
    console.print(_table(sweep, rows))
    for row in rows:
        if row.reason:
            console.print(f"{row.trial.name} failed: {row.reason}", markup=False)
    finished = sum(row.status == "finished" for row in rows)
    seconds, low, high, source = _total(rows)
    if finished == len(rows):
        console.print(f"all {len(rows)} trials are finished; see knet report {sweep.path}")
        return
    console.print(
        f"{finished} finished, {len(rows) - finished} to run: {_duration(seconds)} one after "
        f"another ({_duration(low)} to {_duration(high)}, from {source})"
    )
    if sweep.resources.gpus_per_worker:
        console.print(f"{_gpu_hours(sweep, seconds):.1f} GPU hours")


def _table(sweep: Sweep, rows: Sequence[_Row]) -> "Table":
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for title in ("arm", "seed", "trial", "status", "time left"):
        table.add_column(title, justify="right" if title in ("seed", "time left") else "left")
    for row in rows:
        baseline = " (baseline)" if row.trial.arm == sweep.baseline else ""
        table.add_row(
            escape(row.trial.arm + baseline),
            str(row.trial.seed),
            row.trial.hash,
            escape(_status(row)),
            _time_left(row.estimate),
        )
    return table


def _status(row: _Row) -> str:
    if row.status in ("new", "finished"):
        return row.status
    return f"{row.status}, step {row.step}/{num_iterations(row.trial.recipe) or '?'}"


def _time_left(item: Estimate | None) -> str:
    if item is None:
        return "-"
    return "unknown" if item.source == "unknown" else f"~{_duration(item.seconds)}"


def _gpu_hours(sweep: Sweep, seconds: float) -> float:
    return seconds / 3600 * sweep.resources.workers * sweep.resources.gpus_per_worker


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{math.ceil(seconds)} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
