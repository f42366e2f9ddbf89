"""The HTML page: one file that opens offline, with the table, curves and probe pictures."""

import base64
from collections import defaultdict
from html import escape
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.colors import qualitative
from plotly.offline import get_plotlyjs

from knet_platform.report import render
from knet_platform.report.table import Column, Report, Row

FPS = "bench/fps"
PALETTE = qualitative.D3
"""Ten hues that hold on white and on black; more arms repeat them with another dash."""
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross", "hexagon")


def html(report: Report) -> str:
    """Return the page; every name in it is escaped."""
    environment = Environment(
        loader=PackageLoader("knet_platform.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = render.number
    environment.globals.update(estimate=render.estimate, seeds=render.seeds)
    figures = [
        (caption, Markup(figure.to_html(full_html=False, include_plotlyjs=False, config=_CONFIG)))
        for caption, figure in (
            (_curves_caption(report), curves(report)),
            (_scatter_caption(report), speed_scatter(report)),
        )
        if figure is not None
    ]
    return environment.get_template("ablation.html.j2").render(
        report=report,
        figures=figures,
        pictures=[
            (row, row.picture, base64.b64encode(row.picture.png).decode("ascii"))
            for row in report.rows
            if row.picture
        ],
        missing=render.missing(report),
        finished=sum(line.status == "finished" for row in report.rows for line in row.trials),
        planned=sum(len(row.trials) for row in report.rows),
        plotly_js=Markup(get_plotlyjs()),  # a library file, not text from a user
    )


_CONFIG = {"displaylogo": False, "responsive": True}


def curves(report: Report) -> go.Figure | None:
    """Plot the sweep's metric over iterations: mean over seeds, band from lowest to highest."""
    figure = go.Figure()
    for position, row in enumerate(report.rows):
        values: dict[int, list[float]] = defaultdict(list)
        for line in row.trials:
            for point in line.curve:
                values[point.step].append(point.value)
        if not values:
            continue
        steps = sorted(values)
        means = [sum(values[step]) / len(values[step]) for step in steps]
        style = _style(position)
        if any(len(found) > 1 for found in values.values()):
            figure.add_trace(
                go.Scatter(
                    x=steps + steps[::-1],
                    y=[max(values[step]) for step in steps]
                    + [min(values[step]) for step in reversed(steps)],
                    fill="toself",
                    fillcolor=style["color"],
                    opacity=0.18,
                    line={"width": 0},
                    hoverinfo="skip",
                    legendgroup=str(position),
                    showlegend=False,
                )
            )
        figure.add_trace(
            go.Scatter(
                x=steps,
                y=means,
                customdata=[len(values[step]) for step in steps],
                name=escape(_label(row)),
                mode="lines+markers",
                line={**style, "width": 4 if row.is_baseline else 2},
                marker={"symbol": SYMBOLS[position % len(SYMBOLS)], "size": 8},
                legendgroup=str(position),
                hovertemplate="step %{x}: %{y:.2f} (n=%{customdata})"
                "<extra>%{fullData.name}</extra>",
            )
        )
    if not figure.data:
        return None
    _finish(figure, "iteration", report.columns[0], rangemode="tozero", legend_title=report.axis)
    return figure


def speed_scatter(report: Report) -> go.Figure | None:
    """Plot the sweep's metric against images per second, one point per arm."""
    metrics = [column.metric for column in report.columns]
    if FPS not in metrics[1:]:
        return None
    speed = metrics.index(FPS)
    figure = go.Figure()
    for position, row in enumerate(report.rows):
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
    _finish(figure, report.columns[speed].heading, report.columns[0], rangemode="normal")
    return figure


def _finish(
    figure: go.Figure, x_title: str, y: Column, *, rangemode: str, legend_title: str = ""
) -> None:
    """Neutral colours: the page's script sets the text colour for light and dark."""
    axis = {"gridcolor": "rgba(128,128,128,0.25)", "zeroline": False, "rangemode": rangemode}
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


def _curves_caption(report: Report) -> str:
    return (
        f"{report.columns[0].heading} over training iterations. Line: mean over seeds; "
        "band: lowest to highest seed."
    )


def _scatter_caption(report: Report) -> str:
    return (
        f"{report.columns[0].heading} against inference speed. "
        "Bars: 95 % confidence intervals over seeds."
    )
