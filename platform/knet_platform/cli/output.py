"""What verbs print: results on stdout, progress on stderr, so that stdout can be piped."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.status import Status
from rich.table import Table
from rich.text import Text

from knet_platform.metrics import find_metric

Advance = Callable[[int, int], None]
"""Takes (done, total)."""

PIPE_WIDTH = 100
"""Columns of output that does not go to a terminal."""


def result_console() -> Console:
    """Return the console for results: no markup in names, nothing cut to a narrow terminal."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(width=width, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress_bar(description: str) -> Iterator[Advance]:
    """Show one bar until the block ends; nothing is drawn where stderr is no terminal."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task(description, total=None)

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield advance


def status(text: str) -> Status:
    """Return a context that shows `text` and a spinner on stderr."""
    return Console(stderr=True, markup=False).status(Text(text))


def show_metrics(title: str, metrics: Mapping[str, float]) -> None:
    """Print metrics in the units a paper prints."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        info = find_metric(name)
        table.add_row(
            Text(info.title if info else name), info.show(value) if info else f"{value:.4g}"
        )
    console = result_console()
    console.print(Text(title, style="bold"))
    console.print(table)
