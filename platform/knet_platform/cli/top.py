"""`knet top`: a running sweep at a glance, from the store alone, on any machine that reads it."""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from knet_platform.cli.sweeps import add_sweep_arguments, load_priced_sweep
from knet_platform.home import storage_uri
from knet_platform.metrics import METRICS, MetricInfo, find_metric
from knet_platform.standing import Standing, State, TrialStanding, Watch, mean
from knet_platform.storage import Store
from knet_platform.suggestions import recall
from knet_platform.sweep import Sweep

EXAMPLES = """\
examples:
  knet top sweeps/stages.yaml --scale laptop
  knet top sweeps/stages.yaml | grep running      # one look, plain lines
  knet top sweeps/stages.yaml --json              # one look, every trial

It only reads the store, so it works from any machine that can. It ends when every trial has, or
with Ctrl-C; where the output is no terminal, after one look."""

_LEAST_SECONDS = 2.0
_SHARE = 0.1
"""Of one core that looking may take: the sweep may be training on the same machine."""
_LINES_AROUND = 7
"""Of a terminal, beside those of the arms."""
_ORDER: tuple[State, ...] = ("running", "quiet", "waiting", "failed", "pruned", "finished")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_sweep_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one look as JSON")


def run(args: argparse.Namespace) -> int:
    """Look once, or again and again where there is a terminal."""
    planned, price = load_priced_sweep(args)
    store = Store(storage_uri())
    watch = Watch(recall(planned, store), store, price)
    if args.json:
        print(json.dumps(_as_json(watch.sweep, watch.look(time.time())), indent=2))
    elif sys.stdout.isatty():
        _follow(watch, lambda: recall(planned, store))
    else:
        for line in lines(watch.sweep, watch.look(time.time())):
            print(line)
    return 0


def _follow(watch: Watch, again: Callable[[], Sweep]) -> None:
    console = Console(highlight=False, markup=False)
    with Live(console=console, auto_refresh=False) as live:
        while True:
            start = time.monotonic()
            watch.sweep = again()  # a search adds trials
            standing = watch.look(time.time())
            most = max(1, console.height - _LINES_AROUND)
            live.update(picture(watch.sweep, standing, most), refresh=True)
            if standing.is_over:
                return
            time.sleep(max(_LEAST_SECONDS, (time.monotonic() - start) / _SHARE))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One arm, its seeds together, as text."""

    arm: str
    share: float | None
    """Of its steps that are done, 0 to 1."""
    state: State
    """Of the seed that is worth most attention."""
    states: str
    metric: str
    difference: str
    loss: str
    speed: str
    wait: str
    memory: str
    left: str


def arms(sweep: Sweep, standing: Standing) -> list[Line]:
    """Return one line for each arm, those that run first, else in the sweep's order."""
    info = find_metric(sweep.metric.name)
    assert info is not None, "the sweep file was checked"
    found = []
    for arm in sweep.arms:
        seeds = [trial for trial in standing.trials if trial.trial.arm == arm]
        if seeds:
            found.append(_line(sweep, arm, seeds, info))
    return sorted(found, key=lambda line: _ORDER.index(line.state))


def _line(sweep: Sweep, arm: str, seeds: Sequence[TrialStanding], info: MetricInfo) -> Line:
    counts = {state: sum(seed.state == state for seed in seeds) for state in _ORDER}
    present = [state for state in _ORDER if counts[state]]
    running = [seed for seed in seeds if seed.state == "running"]
    speeds = [seed.images_per_s for seed in running if seed.images_per_s is not None]
    memory = [seed.memory_gb for seed in running if seed.memory_gb is not None]
    left = [seed.seconds_left for seed in running if seed.seconds_left is not None]
    difference = mean([seed.difference for seed in seeds])
    totals = [seed.total for seed in seeds]
    steps = sum(seed.step for seed in seeds)
    wait = mean([seed.data_wait for seed in running])
    metric = mean([seed.metric for seed in seeds])
    loss = mean([seed.loss for seed in running])
    whole = sum(total for total in totals if total is not None)
    return Line(
        arm=f"{arm} (baseline)" if arm == sweep.baseline else arm,
        share=steps / whole if whole and None not in totals else None,
        state=present[0],
        states=", ".join(f"{counts[state]} {state}" for state in present),
        metric="-" if metric is None else info.show(metric),
        difference="-" if difference is None else _signed(info, difference),
        loss="-" if loss is None else METRICS["train/loss"].show(loss),
        speed=f"{sum(speeds):.1f}" if speeds else "-",
        wait="-" if wait is None else f"{wait:.0%}",
        memory=f"{max(memory):.1f} GB" if memory else "-",
        left=duration(max(left)) if left else "-",
    )


def _signed(info: MetricInfo, difference: float) -> str:
    text = info.show(difference)
    return text if text.startswith("-") else f"+{text}"


def heading(sweep: Sweep, standing: Standing) -> list[str]:
    """Return how the whole sweep stands, in two lines."""
    parts = [f"{standing.count(state)} {state}" for state in _ORDER if standing.count(state)]
    left = "unknown" if standing.seconds_left is None else duration(standing.seconds_left)
    cost = f"{standing.gpu_hours:.2f} GPU-hours, {standing.usd:.2f} USD"
    if sweep.budget.usd is not None:
        cost += f" of {sweep.budget.usd:g}"
    if sweep.budget.gpu_hours is not None:
        cost += f" (budget: {sweep.budget.gpu_hours:g} GPU-hours)"
    return [
        f"{sweep.name}: {standing.count('finished')} of {len(standing.trials)} trials finished "
        f"({', '.join(parts)})",
        f"{standing.gpus:g} GPUs in use; {cost} up to the newest checkpoints; time left: {left}",
    ]


def lines(sweep: Sweep, standing: Standing) -> list[str]:
    """Return the whole picture as plain lines."""
    title = find_metric(sweep.metric.name)
    assert title is not None, "the sweep file was checked"
    found = heading(sweep, standing)
    for line in arms(sweep, standing):
        share = "" if line.share is None else f"  {line.share:.0%}"
        text = f"{line.arm}{share}  {line.states}  {title.title} {line.metric}"
        if line.difference != "-":
            text += f" ({line.difference} to the baseline)"
        if line.state == "running":
            text += (
                f"  loss {line.loss}  {line.speed} images/s  {line.wait} waiting for data"
                f"  {line.memory}  left {line.left}"
            )
        found.append(text)
    return found + _troubles(standing)


def _troubles(standing: Standing) -> list[str]:
    return [
        f"{trial.trial.name}: {trial.state}: {trial.reason}"
        if trial.state == "failed"
        else f"{trial.trial.name}: no word for {duration(trial.silent or 0.0)}"
        for trial in standing.trials
        if trial.state in ("failed", "quiet")
    ]


_COLOURS: dict[State, str] = {
    "running": "green",
    "quiet": "yellow",
    "waiting": "dim",
    "failed": "red",
    "pruned": "dim",
    "finished": "",
}


def picture(sweep: Sweep, standing: Standing, most: int) -> RenderableType:
    """Return the picture for a terminal, with at most so many arms."""
    info = find_metric(sweep.metric.name)
    assert info is not None, "the sweep file was checked"
    everything = arms(sweep, standing)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, expand=True)
    table.add_column("arm", ratio=2, overflow="ellipsis", no_wrap=True)
    table.add_column("progress", ratio=1, min_width=12)
    table.add_column("state", overflow="ellipsis", no_wrap=True)
    for name in (info.title, "Δ base", "loss", "images/s", "wait", "memory", "left"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in everything[:most]:
        bar: RenderableType = Text("?")
        if line.share is not None:
            bar = ProgressBar(total=1.0, completed=line.share)
        texts = (line.metric, line.difference, line.loss, line.speed, line.wait, line.memory)
        table.add_row(
            Text(line.arm, style="bold" if line.arm == f"{sweep.baseline} (baseline)" else ""),
            bar,
            Text(line.states, style=_COLOURS[line.state]),
            *(Text(text) for text in (*texts, line.left)),
        )
    first, *others = heading(sweep, standing)
    notes = [f"and {len(everything) - most} more arms"] if len(everything) > most else []
    notes += _troubles(standing)[:2]
    return Group(
        Text(first, style="bold"),
        *(Text(line, style="dim") for line in others),
        Text(),
        table,
        *(Text(note, style="yellow") for note in notes),
    )


def duration(seconds: float) -> str:
    """Return hours and minutes, or minutes and seconds below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"


def _as_json(sweep: Sweep, standing: Standing) -> dict[str, Any]:
    trials = []
    for found in standing.trials:
        names = [field.name for field in dataclasses.fields(found) if field.name != "trial"]
        values = {name: getattr(found, name) for name in names}
        identity = {"arm": found.trial.arm, "seed": found.trial.seed}
        trials.append({**identity, "trial_hash": found.trial.hash, **values})
    return {
        "sweep": sweep.name,
        "metric": sweep.metric.name,
        "seconds_left": standing.seconds_left,
        "gpus": standing.gpus,
        "gpu_hours": standing.gpu_hours,
        "usd": standing.usd,
        "trials": trials,
    }
