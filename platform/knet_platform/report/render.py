"""The table in the forms people read: terminal, Markdown, LaTeX, CSV, JSON and the HTML page.

The terminal, Markdown and LaTeX share one grid of strings, so that they cannot disagree.
"""

import csv
import dataclasses
import io
import json
import re
from typing import Any, Literal

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from knet_platform.report.table import Cell, Column, Report, Row

NOTHING = "-"
TERMINAL_WIDTH = 100
MIN_ARM_WIDTH = 14
"""Columns an arm's name keeps however many metrics there are."""


def number(value: float | None, digits: int, *, sign: bool = False) -> str:
    """Return a rounded number, with its sign if asked, or a dash for None."""
    if value is None:
        return NOTHING
    rounded = round(value, digits) + 0.0  # -0.04 prints as +0.0, not -0.0
    return f"{rounded:{'+' if sign else ''}.{digits}f}"


def estimate(cell: Cell, digits: int) -> str:
    """Return `mean ± half-width`, the mean alone for one seed, or a dash."""
    if cell.ci95 is None:
        return number(cell.mean, digits)
    return f"{number(cell.mean, digits)} ± {number(cell.ci95, digits)}"


def seeds(row: Row, cell: Cell) -> str:
    """Return `n=3`, or `n=2 of 3` where seeds are missing."""
    planned = len(row.trials)
    return f"n={cell.n}" if cell.n == planned else f"n={cell.n} of {planned}"


def grid(report: Report) -> tuple[list[str], list[list[str]]]:
    """Return the headings and one list of strings per arm.

    The sweep's metric comes with its interval, seeds and differences; every other column with its
    mean and the paper's value, so that the table fits a terminal. The page, CSV and JSON have all.
    """
    headings = [report.axis]
    table = [[f"{row.arm} (baseline)" if row.is_baseline else row.arm] for row in report.rows]
    for position, column in enumerate(report.columns):
        first = position == 0
        headings += [column.heading, *(("seeds", "Δ base") if first else ())]
        if column.in_paper:
            headings += ["paper", *(("Δ paper",) if first else ())]
        for row, strings in zip(report.rows, table, strict=True):
            strings += _grid_cells(row, row.cells[position], column, full=first)
    return headings, table


def _grid_cells(row: Row, cell: Cell, column: Column, *, full: bool) -> list[str]:
    digits = column.digits
    strings = [estimate(cell, digits) if full else number(cell.mean, digits)]
    if full:
        strings += [seeds(row, cell), number(cell.delta_baseline, digits, sign=True)]
    if column.in_paper:
        strings.append(number(cell.paper, digits))
        if full:
            strings.append(number(cell.delta_paper, digits, sign=True))
    return strings


def notes(report: Report) -> list[str]:
    """Return what must be known to read the table, one sentence or trial per line."""
    lines = [f"ours: {report.data}; {report.training}; {report.hardware}"]
    if report.paper_source:
        lines.append(f"paper: {report.paper_source}")
    lines.append("±: half-width of the 95 % confidence interval over seeds (Student's t)")
    lines += [f"missing: {names}: {detail}" for names, detail in missing(report)]
    return lines


def missing(report: Report) -> list[tuple[str, str]]:
    """Return the unfinished trials, those with the same fate together, as (names, fate)."""
    fates: dict[str, list[str]] = {}
    for row, line in report.unfinished:
        fates.setdefault(line.detail, []).append(f"{row.arm}/{line.seed}")
    return [(", ".join(names), detail) for detail, names in fates.items()]


def terminal(report: Report) -> Group:
    """Return a rich renderable. Long arm names fold towards 100 columns; numbers are never cut."""
    headings, rows = grid(report)
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    gaps = 2 * (len(widths) - 1)
    widths[0] = min(widths[0], max(MIN_ARM_WIDTH, TERMINAL_WIDTH - sum(widths[1:]) - gaps))
    table = Table(
        title=Text(_title(report), style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        width=sum(widths) + gaps,  # rich would shorten numbers to fit a narrow terminal
    )
    for position, (heading, width) in enumerate(zip(headings, widths, strict=True)):
        justify: Literal["left", "right"] = "right" if position else "left"
        table.add_column(Text(heading), justify=justify, width=width, overflow="fold")
    for row, strings in zip(report.rows, rows, strict=True):
        style = "bold" if row.is_baseline else None
        table.add_row(*(Text(string) for string in strings), style=style)
    return Group(table, Text(), *(Text(line, style="dim") for line in notes(report)))


def markdown(report: Report) -> str:
    """Return a padded Markdown table, as readable raw as rendered."""
    headings, rows = grid(report)
    cells = [[_markdown_escape(text) for text in line] for line in (headings, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(texts: list[str]) -> str:
        padded = [
            text.ljust(width) if position == 0 else text.rjust(width)
            for position, (text, width) in enumerate(zip(texts, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = "|".join(
        ":" + "-" * (width + 1) if position == 0 else "-" * (width + 1) + ":"
        for position, width in enumerate(widths)
    )
    body = [line(cells[0]), f"|{rule}|", *(line(texts) for texts in cells[1:])]
    remarks = [f"- {_markdown_escape(note)}" for note in notes(report)]
    return "\n".join([f"### {_markdown_escape(_title(report))}", "", *body, "", *remarks, ""])


def latex(report: Report) -> str:
    """Return a `tabular` for the booktabs package."""
    headings, rows = grid(report)
    body = [
        r"\textbf{" + texts[0] + "} & " + " & ".join(texts[1:])
        if row.is_baseline
        else " & ".join(texts)
        for row, texts in zip(report.rows, map(_latex_cells, rows), strict=True)
    ]
    return "\n".join(
        [
            r"% \usepackage{booktabs}",
            *(f"% {note}" for note in (_title(report), *notes(report))),
            rf"\begin{{tabular}}{{l{'r' * (len(headings) - 1)}}}",
            r"\toprule",
            " & ".join(_latex_cells(headings)) + r" \\",
            r"\midrule",
            *(rf"{text} \\" for text in body),
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def csv_text(report: Report) -> str:
    """Return one line per arm and metric, at full precision."""
    fields = [field.name for field in dataclasses.fields(Cell)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["arm", "baseline", "metric", "heading", *fields, "seeds", "missing"])
    for row in report.rows:
        lacking = "; ".join(
            f"{line.seed}: {line.detail}" for line in row.trials if line.status != "finished"
        )
        for column, cell in zip(report.columns, row.cells, strict=True):
            writer.writerow(
                [
                    row.arm,
                    str(row.is_baseline).lower(),
                    column.metric,
                    column.heading,
                    *(getattr(cell, name) for name in fields),
                    len(row.trials),
                    lacking,
                ]
            )
    return out.getvalue()


def json_text(report: Report) -> str:
    """Return everything but the pictures; docs/design/report.md describes the fields."""
    values: dict[str, Any] = {"format": 1, **dataclasses.asdict(report)}
    for row in values["rows"]:
        picture = row.pop("picture")
        row["picture"] = picture and {"seed": picture["seed"], "step": picture["step"]}
        row["cells"] = {
            column.metric: cell for column, cell in zip(report.columns, row["cells"], strict=True)
        }
    return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


FORMATS = {"md": markdown, "latex": latex, "csv": csv_text, "json": json_text}


def _title(report: Report) -> str:
    scale = f" [scale {report.scale}]" if report.scale else ""
    return f"{report.sweep}: {report.title}{scale}" if report.title else report.sweep + scale


def _markdown_escape(text: str) -> str:
    return re.sub(r"([\\|`*_<>\[\]])", r"\\\1", text).replace("\n", " ")


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


def _latex_cells(texts: list[str]) -> list[str]:
    return [
        f"${text}$"  # a minus, not a hyphen
        if re.fullmatch(r"[+-][\d.]+", text)
        else "".join(_LATEX.get(char, char) for char in text)
        for text in texts
    ]
