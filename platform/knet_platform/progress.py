"""What a person sees while a sweep runs: bars on a terminal, elsewhere one line per event."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from knet_platform.metrics import find_metric
from knet_platform.sweep import Sweep, Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """How far a trial has come."""

    step: int
    total: int
    loss: float | None
    metric: float | None
    """The sweep's metric as last measured."""


class Progress(Protocol):
    """Told what happens, in the order in which it happens."""

    def begin(self, trial: Trial, attempt: int) -> None:
        """A trial started, for the `attempt`-th time."""

    def update(self, trial: Trial, moment: Moment) -> None:
        """A trial came further."""

    def end(self, trial: Trial, outcome: str) -> None:
        """A trial ended; `outcome` is one line."""

    def note(self, text: str) -> None:
        """Something else is worth a line."""


@contextmanager
def open_progress(sweep: Sweep, finished: int) -> Iterator[Progress]:
    """Show progress on stderr until the block ends.

    Args:
        sweep: What runs.
        finished: Trials that were finished before.
    """
    console = Console(stderr=True, highlight=False, markup=False)
    if not console.is_terminal:
        yield PlainProgress(sweep, finished)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[values]}", markup=False),
    )
    with Bars(*columns, console=console) as bars:
        yield BarProgress(sweep, finished, bars)


class PlainProgress:
    """One line per event, for logs."""

    def __init__(self, sweep: Sweep, finished: int) -> None:
        self._sweep = sweep
        self._done = finished
        self._start = time.monotonic()

    def begin(self, trial: Trial, attempt: int) -> None:
        """Print that a trial started."""
        self.note(f"{trial.name}  {_started(attempt)}")

    def update(self, trial: Trial, moment: Moment) -> None:
        """Print how far it is."""
        values = _values(self._sweep, moment)
        self.note(f"{trial.name}  step {moment.step}/{moment.total}  {values}".rstrip())

    def end(self, trial: Trial, outcome: str) -> None:
        """Print how it ended."""
        self._done += 1
        self.note(f"{trial.name}  {outcome}  ({self._done}/{self._sweep.num_trials} trials)")

    def note(self, text: str) -> None:
        """Print a line."""
        minutes, seconds = divmod(int(time.monotonic() - self._start), 60)
        print(f"{minutes:3d}:{seconds:02d}  {text}", file=sys.stderr, flush=True)


class BarProgress:
    """One bar for the sweep and one for each running trial, for terminals."""

    def __init__(self, sweep: Sweep, finished: int, bars: Bars) -> None:
        self._sweep = sweep
        self._bars = bars
        self._all = bars.add_task(
            sweep.name, total=len(sweep.distinct_trials), completed=finished, values="trials"
        )
        self._tasks: dict[str, TaskID] = {}

    def begin(self, trial: Trial, attempt: int) -> None:
        """Add a bar."""
        if trial.hash not in self._tasks:
            self._tasks[trial.hash] = self._bars.add_task(trial.name, total=None, values="")
        self._bars.update(self._tasks[trial.hash], values=_started(attempt))

    def update(self, trial: Trial, moment: Moment) -> None:
        """Advance a bar."""
        self._bars.update(
            self._tasks[trial.hash],
            completed=moment.step,
            total=moment.total,
            values=_values(self._sweep, moment),
        )

    def end(self, trial: Trial, outcome: str) -> None:
        """Replace a bar by a line."""
        task = self._tasks.pop(trial.hash, None)
        if task is not None:
            self._bars.remove_task(task)
        self._bars.advance(self._all)
        self.note(f"{trial.name}  {outcome}")

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        self._bars.console.print(text)


def _started(attempt: int) -> str:
    return "starting" if attempt == 1 else f"starting, attempt {attempt}"


def _values(sweep: Sweep, moment: Moment) -> str:
    parts = [] if moment.loss is None else [f"loss {moment.loss:.3f}"]
    if moment.metric is not None:
        parts.append(show_metric(sweep.metric.name, moment.metric))
    return "  ".join(parts)


def show_metric(name: str, value: float) -> str:
    """Return a metric with its title, in the unit a paper prints."""
    info = find_metric(name)
    return f"{info.title} {info.show(value)}" if info else f"{name} {value:.4g}"
