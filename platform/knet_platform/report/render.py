"""The tables as text: terminal, Markdown and LaTeX, for people.

All three share one grid of strings, so that they cannot disagree.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table as RichTable
from rich.text import Text

from knet_platform.report.table import Cell, Column, Report, Row, Table
from knet_platform.report.trials import TrialLine

NOTHING = "-"
ONE_SEED = "one seed"
TERMINAL_WIDTH = 100
MIN_ARM_WIDTH = 14
"""Columns an arm's name keeps however many metrics there are."""
_GAP = 2
_MOST_NAMES = 10
"""Trials or arms named in one note; CSV and JSON name all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Strip:
    """One column of a printed table."""

    heading: str
    texts: list[str]
    """One for each row."""
    rank: int = 0
    """A terminal too narrow for all shows those of low rank; 0 is always shown."""

    @property
    def width(self) -> int:
        """Characters of the longest text."""
        return max(map(len, (self.heading, *self.texts)))


def number(value: float | None, digits: int, *, sign: bool = False) -> str:
    """Return a rounded number, with its sign if asked, or a dash for None."""
    if value is None:
        return NOTHING
    rounded = round(value, digits) + 0.0  # -0.04 prints as +0.0, not -0.0
    return f"{rounded:{'+' if sign else ''}.{digits}f}"


def estimate(mean: float | None, ci95: float | None, digits: int, *, sign: bool = False) -> str:
    """Return `mean ± half-width`, the mean alone where there is no interval, or a dash."""
    text = number(mean, digits, sign=sign)
    return text if ci95 is None else f"{text} ± {number(ci95, digits)}"


def value(cell: Cell, digits: int) -> str:
    """Return a cell's mean with its interval, or with the words that say why it has none."""
    text = estimate(cell.mean, cell.ci95, digits)
    return f"{text} ({ONE_SEED})" if cell.n == 1 else text


def delta(cell: Cell, digits: int) -> str:
    """Return a cell's difference to the baseline with its interval."""
    ours = cell.difference
    return estimate(ours.mean, ours.ci95, digits, sign=True) if ours else NOTHING


def p_value(cell: Cell) -> str:
    """Return the p of a cell's difference to the baseline."""
    p = cell.difference.p if cell.difference else None
    if p is None:
        return NOTHING
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def seeds(row: Row, cell: Cell) -> str:
    """Return how many seeds measured a cell: `3`, or `2 of 3` where some are missing."""
    return str(cell.n) if cell.n == row.seeds else f"{cell.n} of {row.seeds}"


def grid(report: Report, table: Table) -> list[Strip]:
    """Return a table's columns.

    The sweep's metric comes with its interval, seeds and differences; every other metric with its
    mean and the paper's value. The page, CSV and JSON have all of all.
    """
    rows = table.rows
    names = [f"{row.arm} (baseline)" if row.is_baseline else row.arm for row in rows]
    strips = [Strip(heading=report.axis, texts=names)]
    for position, column in enumerate(report.columns):
        cells = [row.cells[position] for row in rows]
        if position == 0:
            strips += _main_strips(rows, cells, column)
        else:
            strips += _companion_strips(cells, column)
    for heading, totals in (
        ("GPU h", [row.gpu_hours for row in rows]),
        ("USD", [row.usd for row in rows]),
    ):
        if any(totals):
            texts = [number(total, 2) for total in totals]
            strips.append(Strip(heading=heading, texts=texts, rank=1))
    return [*strips, Strip(heading="status", texts=[row.fate for row in rows])]


def _main_strips(rows: Sequence[Row], cells: Sequence[Cell], column: Column) -> list[Strip]:
    digits = column.digits
    strips = [
        Strip(heading=column.heading, texts=[value(cell, digits) for cell in cells]),
        Strip(heading="seeds", texts=[seeds(*pair) for pair in zip(rows, cells, strict=True)]),
        Strip(heading="Δ base", texts=[delta(cell, digits) for cell in cells]),
        Strip(heading="p", texts=[p_value(cell) for cell in cells], rank=3),
    ]
    if not column.in_paper:
        return strips
    to_paper = [number(cell.delta_paper, digits, sign=True) for cell in cells]
    of_deltas = [number(cell.delta_of_deltas, digits, sign=True) for cell in cells]
    return [
        *strips,
        Strip(heading="paper", texts=[number(cell.paper, digits) for cell in cells]),
        Strip(heading="Δ paper", texts=to_paper, rank=4),
        Strip(heading="ΔΔ", texts=of_deltas),
        Strip(heading="trend", texts=[cell.trend or NOTHING for cell in cells]),
    ]


def _companion_strips(cells: Sequence[Cell], column: Column) -> list[Strip]:
    strips = [(column.heading, [number(cell.mean, column.digits) for cell in cells], 2)]
    if column.in_paper:
        strips.append(("paper", [number(cell.paper, column.digits) for cell in cells], 4))
    return [Strip(heading=heading, texts=texts, rank=rank) for heading, texts, rank in strips]


def notes(report: Report) -> list[str]:
    """Return what must be known to read the tables, one sentence or trial per line."""
    lines = [f"ours: {report.data}; {report.training}; {report.hardware}"]
    if report.paper_source:
        lines.append(f"paper: {report.paper_source}")
    lines += [*method(report), *report.notes]
    lines += [f"flagged: {names}: {detail}" for names, detail in reduced(report)]
    lines += [f"missing: {names}: {detail}" for names, detail in missing(report)]
    return lines


def method(report: Report) -> list[str]:
    """Return how the numbers were made."""
    lines = [
        "±: half-width of the 95 % confidence interval over seeds (Student's t)",
        "Δ base: mean difference to the baseline on shared seeds; ± and p: paired t-test, "
        "not corrected for the number of arms",
    ]
    if any(column.in_paper for column in report.columns):
        lines.append(
            "ΔΔ: Δ base minus the paper's; trend: whether the interval of Δ base lies on the "
            "paper's side of zero (holds), on the other (contradicts) or around it (unclear)"
        )
    return lines


def reduced(report: Report) -> list[tuple[str, str]]:
    """Return the trials that ran otherwise than asked, as (names, what)."""
    memory = (
        (
            line,
            f"out of memory, so trained with micro-batches of {line.micro_batch} "
            "(the same images per step)",
        )
        for line in report.trials
        if line.micro_batch is not None
    )
    elastic = (
        (
            line,
            f"elastic, trained with {', then '.join(map(str, line.earlier_workers))}, "
            f"then {line.workers} workers (the same images per step)",
        )
        for line in report.trials
        if line.earlier_workers
    )
    return _together(report, chain(memory, elastic))


def missing(report: Report) -> list[tuple[str, str]]:
    """Return the trials without a value, those with the same fate together, as (names, fate)."""
    first, *others = report.columns
    fates = [(line, line.detail) for line in report.unfinished]
    for line in report.trials:
        lacking = [column.heading for column in others if column.metric not in line.metrics]
        if lacking and first.metric in line.metrics:
            fates.append((line, f"finished without {', '.join(lacking)}"))
    return _together(report, fates)


def _together(report: Report, fates: Iterable[tuple[TrialLine, str]]) -> list[tuple[str, str]]:
    """Name trials of one fate together: whole arms by themselves, a long list by its start."""
    groups: dict[str, dict[str, list[int]]] = {}
    for line, fate in fates:
        groups.setdefault(fate, {}).setdefault(line.arm, []).append(line.seed)
    planned = {row.arm: row.seeds for row in report.rows}
    found = []
    for fate, arms in groups.items():
        names: list[str] = []
        for arm, of_arm in arms.items():
            whole = len(of_arm) == planned[arm] > 1
            names += [f"{arm} (every seed)"] if whole else [f"{arm}/{seed}" for seed in of_arm]
        if len(names) > _MOST_NAMES:
            names = [*names[: _MOST_NAMES - 1], f"{len(names) - _MOST_NAMES + 1} more"]
        found.append((", ".join(names), fate))
    return found


@dataclass(frozen=True, slots=True)
class Terminal:
    """The tables for a rich console: as many columns as fit its width, and the others named.

    Long arm names fold; numbers are never cut.
    """

    report: Report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield each table, then the notes."""
        width = max(options.max_width, TERMINAL_WIDTH)
        for table in self.report.tables:
            heading = table.reason or _title(self.report)
            yield from _terminal_table(self.report, table, heading, width)
            yield Text()
        for line in notes(self.report):
            yield Text(line, style="dim")


def _terminal_table(report: Report, table: Table, heading: str, width: int) -> RenderResult:
    strips, left_out = _fitting(grid(report, table), width)
    others = sum(strip.width + _GAP for strip in strips[1:])
    arm_width = min(strips[0].width, max(MIN_ARM_WIDTH, width - others))
    printed = RichTable(
        title=Text(heading, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        width=arm_width + others,  # rich would shorten numbers to fit a narrow terminal
    )
    for position, strip in enumerate(strips):
        justify: Literal["left", "right"] = "right" if position else "left"
        wide = strip.width if position else arm_width
        printed.add_column(Text(strip.heading), justify=justify, width=wide, overflow="fold")
    for row, texts in zip(table.rows, zip(*(s.texts for s in strips), strict=True), strict=True):
        style = "bold" if row.is_baseline else None
        printed.add_row(*(Text(text) for text in texts), style=style)
    yield printed
    if left_out:
        yield Text(f"more columns on the page: {', '.join(left_out)}", style="dim")


def _fitting(strips: list[Strip], width: int) -> tuple[list[Strip], list[str]]:
    """Return the columns of a terminal this wide, by rank, and the headings of the others."""
    free = width - min(strips[0].width, MIN_ARM_WIDTH)
    free -= sum(strip.width + _GAP for strip in strips[1:] if strip.rank == 0)
    left_out = set()
    for position in sorted(range(len(strips)), key=lambda position: strips[position].rank):
        strip = strips[position]
        if strip.rank == 0:
            continue
        if strip.width + _GAP <= free:
            free -= strip.width + _GAP
        else:
            left_out.add(position)
    kept = [strip for position, strip in enumerate(strips) if position not in left_out]
    return kept, list(dict.fromkeys(strips[position].heading for position in sorted(left_out)))


def markdown(report: Report) -> str:
    """Return padded Markdown tables, as readable raw as rendered."""
    lines = [f"### {_markdown_escape(_title(report))}", ""]
    for table in report.tables:
        if table.reason:
            lines += [f"#### {_markdown_escape(table.reason)}", ""]
        lines += [*_markdown_table(grid(report, table)), ""]
    return "\n".join([*lines, *(f"- {_markdown_escape(note)}" for note in notes(report)), ""])


def _markdown_table(strips: Sequence[Strip]) -> list[str]:
    columns = []
    for position, strip in enumerate(strips):
        texts = [_markdown_escape(text) for text in (strip.heading, *strip.texts)]
        width = max(3, *map(len, texts))
        padded = [text.rjust(width) if position else text.ljust(width) for text in texts]
        rule = "-" * (width - 1) + ":" if position else ":" + "-" * (width - 1)
        columns.append([padded[0], rule, *padded[1:]])
    return [f"| {' | '.join(cells)} |" for cells in zip(*columns, strict=True)]


def latex(report: Report) -> str:
    """Return `tabular` environments for the booktabs package."""
    comments = [r"\usepackage{booktabs}", _title(report), *notes(report)]
    lines = [f"% {comment}" for comment in comments]
    for table in report.tables:
        lines += ["", f"% {table.reason}"] if table.reason else []
        lines += _latex_table(grid(report, table), [row.is_baseline for row in table.rows])
    return "\n".join([*lines, ""])


def _latex_table(strips: Sequence[Strip], bold: Sequence[bool]) -> list[str]:
    body = []
    for is_bold, texts in zip(bold, zip(*(s.texts for s in strips), strict=True), strict=True):
        first, *others = map(_latex_escape, texts)
        body.append(" & ".join([rf"\textbf{{{first}}}" if is_bold else first, *others]) + r" \\")
    return [
        rf"\begin{{tabular}}{{l{'r' * (len(strips) - 1)}}}",
        r"\toprule",
        " & ".join(_latex_escape(strip.heading) for strip in strips) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]


def _title(report: Report) -> str:
    scale = f" [scale {report.scale}]" if report.scale else ""
    return f"{report.sweep}: {report.title}{scale}" if report.title else report.sweep + scale


def _markdown_escape(text: str) -> str:
    return re.sub(r"([\\|`*_<>\[\]~$&#])", r"\\\1", text).replace("\n", " ")


_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "Δ": r"$\Delta$",
    **{char: rf"\{char}" for char in "&%$#_"},
}


def _latex_escape(text: str) -> str:
    if re.fullmatch(r"[+-][\d.]+( ± [\d.]+)?", text):  # a minus, not a hyphen
        return f"${text.replace('±', chr(92) + 'pm')}$"
    return "".join(_LATEX.get(char, char) for char in text)
