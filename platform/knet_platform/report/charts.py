"""The page's charts, drawn by plotly; every name in them is escaped."""

from collections import defaultdict
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.colors import qualitative

from knet_platform.report.statistics import mean_and_ci
from knet_platform.report.table import Column, Report, Row, Table

FPS = "bench/fps"
PALETTE = qualitative.D3
"""Ten hues that hold on white and on black; more arms repeat them with another dash."""
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross", "hexagon")
CONFIG = {"displaylogo": False, "responsive": True}


def charts(report: Report) -> list[tuple[str, go.Figure]]:
    """Return captions and figures, those of one table after those of another."""
    found = []
    for table in report.tables:
        suffix = f" Rows apart: {table.reason}." if table.reason else ""
        for caption, figure in (
            (_CURVES_CAPTION, curves(report, table)),
            (_SPEED_CAPTION, speed_scatter(report, table)),
        ):
            if figure is not None:
                found.append((f"{report.columns[0].heading} {caption}{suffix}", figure))
    return found


_CURVES_CAPTION = (
    "over training iterations. Line: mean over the seeds that have come so far; band: its 95 % "
    "confidence interval, cut off beyond the values of single seeds where seeds are few."
)
_SPEED_CAPTION = "against inference speed. Bars: 95 % confidence intervals over seeds."


def curves(report: Report, table: Table) -> go.Figure | None:
    """Plot the sweep's metric over iterations: mean over seeds and its confidence interval."""
    figure = go.Figure()
    everything: list[float] = []
    for position, row in enumerate(table.rows):
        values: dict[int, list[float]] = defaultdict(list)
        for line in row.trials:
            for point in line.curve:
                values[point.step].append(point.value)
        if not values:
            continue
        everything += (value for found in values.values() for value in found)
        figure.add_traces(_curve(row, position, dict(sorted(values.items()))))
    if not everything:
        return None
    _finish(figure, "iteration", report.columns[0], legend_title=report.axis)
    # Two seeds have an interval of nine standard errors each way: it must not set the scale.
    margin = 0.05 * (max(everything) - min(min(everything), 0.0)) or 1.0
    low = min(everything) - margin if min(everything) < 0 else 0.0
    figure.update_yaxes(range=[low, max(everything) + margin])
    return figure


def _curve(row: Row, position: int, values: dict[int, list[float]]) -> list[go.Scatter]:
    """Return the band, where any step has two seeds, and the line."""
    style = _style(position)
    means, halves = zip(*map(mean_and_ci, values.values()), strict=True)
    line = go.Scatter(
        x=list(values),
        y=means,
        customdata=[
            (len(found), f" ± {half:.2f}" if half is not None else "")
            for found, half in zip(values.values(), halves, strict=True)
        ],
        name=escape(_label(row)),
        mode="lines+markers",
        line={**style, "width": 4 if row.is_baseline else 2},
        marker={"symbol": SYMBOLS[position % len(SYMBOLS)], "size": 8 if len(values) < 30 else 4},
        legendgroup=str(position),
        hovertemplate="step %{x}: %{y:.2f}%{customdata[1]} (n=%{customdata[0]})"
        "<extra>%{fullData.name}</extra>",
    )
    banded = [
        (step, mean - half, mean + half)
        for step, mean, half in zip(values, means, halves, strict=True)
        if half is not None
    ]
    if not banded:
        return [line]
    steps, lows, highs = (list(part) for part in zip(*banded, strict=True))
    band = go.Scatter(
        x=steps + steps[::-1],
        y=highs + lows[::-1],
        fill="toself",
        fillcolor=style["color"],
        opacity=0.15,
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        legendgroup=str(position),
        showlegend=False,
    )
    return [band, line]


def speed_scatter(report: Report, table: Table) -> go.Figure | None:
    """Plot the sweep's metric against images per second, one point per arm."""
    metrics = [column.metric for column in report.columns]
    if FPS not in metrics[1:]:
        return None
    speed = metrics.index(FPS)
    figure = go.Figure()
    for position, row in enumerate(table.rows):
        x, y = row.cells[speed], row.cells[0]
        if x.mean is None or y.mean is None:
            continue
        figure.add_trace(
            go.Scatter(
                x=[x.mean],
                y=[y.mean],
                error_x={"array": [x.ci95 or 0.0], "width": 3},
                error_y={"array": [y.ci95 or 0.0], "width": 3},
                name=escape(_label(row)),
                text=[escape(row.arm)],
                textposition="top right",
                mode="markers+text",
                marker={
                    "color": _style(position)["color"],
                    "symbol": SYMBOLS[position % len(SYMBOLS)],
                    "size": 14 if row.is_baseline else 10,
                },
                hovertemplate="%{y:.2f} at %{x:.1f} FPS<extra>%{fullData.name}</extra>",
                showlegend=False,
            )
        )
    if len(figure.data) < 2:
        return None
    _finish(figure, report.columns[speed].heading, report.columns[0])
    return figure


def _finish(figure: go.Figure, x_title: str, y: Column, *, legend_title: str = "") -> None:
    """Neutral colours: the page's script sets the text colour for light and dark."""
    axis = {"gridcolor": "rgba(128,128,128,0.25)", "zeroline": False}
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 56, "r": 16, "t": 40, "b": 48},
        height=420,
        xaxis={**axis, "title": {"text": escape(x_title)}},
        yaxis={**axis, "title": {"text": escape(y.heading)}},
        legend={"title": {"text": escape(legend_title)}},
        font={"family": "system-ui, sans-serif", "size": 13},
        hoverlabel={"namelength": -1},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#888888", "activecolor": "#2f81d8"},
    )


def _style(position: int) -> dict[str, Any]:
    return {
        "color": PALETTE[position % len(PALETTE)],
        "dash": DASHES[position // len(PALETTE) % len(DASHES)],
    }


def _label(row: Row) -> str:
    return f"{row.arm} (baseline)" if row.is_baseline else row.arm
