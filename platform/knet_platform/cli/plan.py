"""`knet plan`: arms x seeds, what is done, and what the rest costs. Touches nothing."""

import argparse
import json
import math
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from knet_platform.cli.sweeps import add_sweep_arguments, load_priced_sweep
from knet_platform.errors import UsageError
from knet_platform.forecast import (
    Band,
    Forecast,
    PlannedTrial,
    look_up,
    make_forecast,
    require_budget,
)
from knet_platform.home import storage_uri
from knet_platform.pace import Estimate
from knet_platform.planning import worker_counts
from knet_platform.search import Search
from knet_platform.storage import Store
from knet_platform.suggestions import recall
from knet_platform.sweep import Sweep

if TYPE_CHECKING:
    from rich.table import Table

EXAMPLES = """\
examples:
  knet plan sweeps/stages.yaml --scale laptop
  knet plan sweeps/stages.yaml data.root=/data/coco --instance p4d.24xlarge --spot --max-usd 500
  knet plan sweeps/stages.yaml --scale laptop --probe
  knet plan sweeps/stages.yaml --scale laptop train.iterations=1000 --json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_sweep_arguments(parser)
    parser.add_argument(
        "--instances", type=int, metavar="N", help="size of the cluster, for the wall-clock time"
    )
    parser.add_argument(
        "--probe", action="store_true", help="train a few steps of each arm here and measure them"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the plan; then refuse it if it passes the budget."""
    if args.instances is not None and args.instances < 1:
        raise UsageError(f"--instances: got {args.instances}, expected at least 1")
    sweep, price = load_priced_sweep(args)
    store = Store(storage_uri())
    sweep = recall(sweep, store)
    probes = None
    rows = look_up(sweep, store, gpu=price.gpu)
    if args.probe:
        from knet_platform.probe import probe_arms

        probes = probe_arms(sweep, {row.trial.arm for row in rows if row.estimate})
        rows = look_up(sweep, store, gpu=price.gpu, probes=probes)
    forecast = make_forecast(sweep, rows, price, instances=args.instances, probes=probes)
    if args.json:
        print(json.dumps(_as_json(sweep, rows, forecast), indent=2))
    else:
        _show(sweep, rows, forecast, _report_command(args))
    require_budget(sweep, forecast)
    return 0


def _as_json(sweep: Sweep, rows: Sequence[PlannedTrial], forecast: Forecast) -> dict[str, Any]:
    recipe = sweep.trials[0].recipe
    return {
        "sweep": sweep.name,
        "title": sweep.title,
        "metric": sweep.metric.name,
        "baseline": sweep.baseline,
        "workers": sweep.resources.workers,
        "batch_size": recipe.train.batch_size,
        "batch_size_per_worker": recipe.train.batch_size // sweep.resources.least_workers,
        "notes": list(sweep.notes),
        "search": _search_as_json(sweep.search),
        "trials": [
            {
                "arm": row.trial.arm,
                "seed": row.trial.seed,
                "trial_hash": row.trial.hash,
                "state": row.state,
                "step": row.done.step if row.done else 0,
                "iterations": row.iterations,
                "reason": row.reason,
                "seconds": row.estimate.seconds if row.estimate else 0.0,
                "source": row.estimate.source if row.estimate else None,
            }
            for row in rows
        ],
        "forecast": {
            "gpu_hours": _as_list(forecast.gpu_hours),
            "usd": _as_list(forecast.usd),
            "wall_hours": _as_list(forecast.wall_hours),
            "peak_memory_gb": forecast.peak_memory_gb.mid,
            "peak_memory_gb_band": _as_list(forecast.peak_memory_gb),
            "source": forecast.source,
            "uncounted_trials": forecast.uncounted,
            "memory_source": forecast.memory_source,
            "concurrent_trials": forecast.concurrent,
            "price": forecast.price.basis,
            "price_assumed": forecast.price.assumed,
        },
        "spent": {"gpu_hours": forecast.spent_gpu_hours, "usd": forecast.spent_usd},
        "budget": {"gpu_hours": sweep.budget.gpu_hours, "usd": sweep.budget.usd},
    }


def _search_as_json(search: Search | None) -> dict[str, Any] | None:
    if search is None:
        return None
    return {
        "id": search.id,
        "trials": search.spec.trials,
        "suggested": len(search.suggested),
        "to_come": search.to_come,
    }


def _shares(sweep: Sweep) -> str:
    """Say how workers share a batch of the first trial."""
    recipe, resources = sweep.trials[0].recipe, sweep.resources
    counts = worker_counts(recipe, resources)
    if len(counts) == 1:
        return f"{counts[0]} workers x {recipe.train.batch_size // counts[0]}"
    *most, last = map(str, counts)
    micro = recipe.train.micro_batch
    return f"{', '.join(most)} or {last} workers (elastic) x passes of {micro}"


def _as_list(band: Band) -> list[float]:
    return [band.low, band.mid, band.high]


def _report_command(args: argparse.Namespace) -> str:
    """Return the command that reports on what was planned."""
    words = ["knet", "report", str(args.sweep)]
    words += ["--scale", args.scale] if args.scale else []
    words += ["--seeds", str(args.seeds)] if args.seeds else []
    return shlex.join([*words, *args.overrides])


def _show(
    sweep: Sweep, rows: Sequence[PlannedTrial], forecast: Forecast, report_command: str
) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True, markup=False)
    recipe = sweep.trials[0].recipe
    console.print(f"{sweep.name}: {sweep.title}")
    to_come = sweep.search.to_come if sweep.search else 0
    suggestions = f" and {to_come} still to be suggested" if to_come else ""
    total = len(rows) + to_come * len(sweep.seeds)
    console.print(
        f"{len(sweep.arms)} arms{suggestions} x {len(sweep.seeds)} seeds = {total} trials, "
        f"judged by {sweep.metric.name}"
    )
    console.print(
        f"batch of {recipe.train.batch_size} images = {_shares(sweep)}, "
        f"learning rate {recipe.optim.lr:g} as stated"
    )
    console.print(_table(sweep, rows))
    for row in rows:
        if row.state == "failed":
            console.print(f"{row.trial.name} failed: {row.reason}")
    for note in sweep.notes:
        console.print(f"note: {note}")
    finished = sum(row.state == "finished" for row in rows)
    pruned = sum(row.state == "pruned" for row in rows)
    left = total - finished - pruned
    settled = f"{finished} finished" + (f", {pruned} pruned" if pruned else "")
    if not left:
        everything = f"all {len(rows)} trials are finished"
        over = f"{settled}, nothing left to run" if pruned else everything
        console.print(f"{over}; see {report_command}")
        return
    console.print(f"{settled}, {left} to run: {_wall_clock(forecast)}")
    if forecast.uncounted:
        console.print(
            f"not counted: {forecast.uncounted} trials of unknown length, as no training images "
            f"are here; data.root=FOLDER or train.iterations=N tells it"
        )
    if sweep.scheduler:
        console.print("counted as if asha stopped nothing")
    if to_come:
        console.print(
            f"{to_come} suggestions are not known yet: counted as the mean of the ends of "
            f"search.space"
        )
    gpu_hours, usd, memory = forecast.gpu_hours, forecast.usd, forecast.peak_memory_gb
    if gpu_hours.mid:
        console.print(
            f"{gpu_hours.mid:.1f} GPU hours ({gpu_hours.low:.1f} to {gpu_hours.high:.1f})"
        )
    if forecast.seconds.high:
        assumed = "; --instance names yours" if forecast.price.assumed else ""
        console.print(
            f"{usd.mid:.2f} USD ({usd.low:.2f} to {usd.high:.2f}; {forecast.price.basis}{assumed})"
        )
    if forecast.spent_usd:
        console.print(f"spent so far: {forecast.spent_usd:.2f} USD")
    console.print(
        f"peak memory {memory.mid:.1f} GB a worker ({memory.low:.1f} to {memory.high:.1f}, "
        f"from {forecast.memory_source})"
    )
    if sweep.resources.gpus_per_worker and memory.mid > forecast.price.gpu_memory_gb:
        console.print(
            f"warning: {forecast.price.gpu} has {forecast.price.gpu_memory_gb:g} GB; "
            f"train.micro_batch=1 or train.precision=bf16 need less"
        )


def _wall_clock(forecast: Forecast) -> str:
    wall = forecast.wall_hours.times(3600)
    if not wall.high:
        return "for how long is unknown"
    at_once = (
        f"{forecast.concurrent} at a time" if forecast.concurrent > 1 else "one after another"
    )
    return (
        f"{_duration(wall.mid)} {at_once} "
        f"({_duration(wall.low)} to {_duration(wall.high)}, from {forecast.source})"
    )


def _table(sweep: Sweep, rows: Sequence[PlannedTrial]) -> "Table":
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for title in ("arm", "seed", "trial", "state", "time left"):
        table.add_column(title, justify="right" if title in ("seed", "time left") else "left")
    for row in rows:
        baseline = " (baseline)" if row.trial.arm == sweep.baseline else ""
        table.add_row(
            escape(row.trial.arm + baseline),
            str(row.trial.seed),
            row.trial.hash,
            escape(_state(row)),
            _time_left(row.estimate),
        )
    return table


def _state(row: PlannedTrial) -> str:
    if row.state in ("new", "finished"):
        return row.state
    if row.state == "pruned" and row.reason:
        return row.reason
    return f"{row.state}, step {row.done.step if row.done else 0}/{row.iterations or '?'}"


def _time_left(item: Estimate | None) -> str:
    if item is None:
        return "-"
    return "unknown" if item.source == "unknown" else f"~{_duration(item.seconds)}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{math.ceil(seconds)} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
