"""The page's charts, drawn by plotly; every name in them is escaped.

Colours of text, lines and grounds come from the page, which has a light and a dark side.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

import numpy as np
import plotly.graph_objects as go
from plotly.colors import qualitative

from knet_platform.metrics import find_metric
from knet_platform.report.statistics import mean_and_ci
from knet_platform.report.table import Column, Report, Row, Table
from knet_platform.report.thinning import thin
from knet_platform.report.trials import CurvePoint, TrialLine

FPS = "bench/fps"
PALETTE = tuple(hue for hue in qualitative.D3 if hue != "#7F7F7F")
"""Hues that hold on white and on black. The baseline has the first; grey is for other arms."""
OTHERS = "#8a929b"
"""Of arms beyond the palette: fifty hues would tell nobody anything."""
SYMBOLS = (
    *("circle", "square", "diamond", "triangle-up", "x", "star", "cross", "hexagon"),
    "triangle-down",
)
CONFIG = {
    "displaylogo": False,
    "displayModeBar": "hover",
    "responsive": True,
    # No others: some lead to plotly's own servers.
    "modeBarButtons": [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
}
BAND, SEED = 0.13, 0.4
"""Opacity of a confidence band and of a single seed's line."""
_LEAST_SEEDS = 3
"""For a band or a bar: of two it is nine standard deviations each way and hides all else."""
_HEIGHT, _LONG_NAME = 420, 24
"""Pixels of a chart, and characters of a name beyond which the legend stands below it."""
_LONGEST_NAME = 48
_MOST_POINTS, _MOST_OF_A_CURVE, _LEAST_OF_A_CURVE = 60_000, 1000, 100
"""Points of a chart and of each of its curves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A figure and what must be known to read it."""

    title: str
    caption: str
    figure: go.Figure
    whole: bool = False
    """Whether it takes the width of two."""
    layers: bool = False
    """Whether it has curves, whose single seeds and bands the page can hide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """How an arm is told from others, the same in every chart of its table."""

    colour: str
    symbol: str
    named: bool
    """Whether it stands in the legend by itself; others are grey and stand there together."""


@dataclass(frozen=True, slots=True)
class _Trace:
    """Values of one arm over steps, averaged over seeds."""

    steps: Sequence[int]
    counts: Sequence[int]
    """Seeds that have come so far."""
    means: Sequence[float]
    halves: Sequence[float]
    """Half-widths of the 95 % interval; NaN for one seed."""


def charts(report: Report) -> list[Chart]:
    """Return the charts for which there are numbers, those of one table after another's."""
    found = []
    for table in report.tables:
        looks = _looks(report, table)
        for draw in (differences, curves, losses, training_cost, speed):
            chart = draw(report, table, looks)
            if chart is not None:
                suffix = f" Rows apart: {table.reason}." if table.reason else ""
                found.append(replace(chart, caption=chart.caption + suffix))
    return found


def _looks(report: Report, table: Table) -> dict[str, _Look]:
    """Give the baseline and the best arms a hue each, in the table's order."""
    better = 1 if _higher_is_better(report.columns[0]) else -1

    def merit(row: Row) -> tuple[bool, float]:
        value = row.cells[0].mean
        if value is None:
            value = max((line.curve[-1].value for line in row.trials if line.curve), default=None)
        return (row.is_baseline, -np.inf if value is None else better * value)

    first = 0 if any(row.is_baseline for row in table.rows) else 1  # its hue is nobody else's
    best = sorted(table.rows, key=merit, reverse=True)[: len(PALETTE) - first]
    named = {row.arm for row in best}
    places = [row.arm for row in table.rows if row.arm in named and not row.is_baseline]
    places = [row.arm for row in table.rows if row.is_baseline] + places
    looks = {row.arm: _Look(colour=OTHERS, symbol="circle", named=False) for row in table.rows}
    for place, arm in enumerate(places, start=first):
        looks[arm] = _Look(colour=PALETTE[place], symbol=SYMBOLS[place], named=True)
    return looks


def differences(report: Report, table: Table, looks: Mapping[str, _Look]) -> Chart | None:
    """Plot every arm's difference to the baseline, ours beside the paper's."""
    column, scale = report.columns[0], _scale(report.columns[0])
    baseline = {
        line.seed: line.metrics[column.metric] * scale
        for row in table.rows
        if row.is_baseline
        for line in row.trials
        if column.metric in line.metrics
    }
    rows = [row for row in table.rows if row.cells[0].difference is not None]
    if not rows:
        return None
    figure = go.Figure()
    seeds = [
        (row, line.seed, line.metrics[column.metric] * scale - baseline[line.seed])
        for row in rows
        for line in row.trials
        if column.metric in line.metrics and line.seed in baseline
    ]
    figure.add_trace(
        go.Scatter(
            x=[value for _, _, value in seeds],
            y=[_text(row.arm) for row, _, _ in seeds],
            customdata=[seed for _, seed, _ in seeds],
            mode="markers",
            marker={"color": OTHERS, "symbol": "line-ns-open", "size": 9},
            name="single seeds",
            hovertemplate="%{y}, seed %{customdata}: %{x:+.2f}<extra></extra>",
        )
    )
    ours = [row.cells[0].difference for row in rows]
    figure.add_trace(
        go.Scatter(
            x=[found.mean for found in ours if found],
            y=[_text(row.arm) for row in rows],
            error_x={
                "array": [found.ci95 or 0.0 for found in ours if found],
                "color": OTHERS,
                "thickness": 1.5,
                "width": 4,
            },
            text=[
                (f" ± {found.ci95:.2f}" if found.ci95 is not None else "") + f" (n={found.n})"
                for found in ours
                if found
            ],
            mode="markers",
            marker={
                "color": [looks[row.arm].colour for row in rows],
                "symbol": [looks[row.arm].symbol for row in rows],
                "size": 11,
            },
            name="ours",
            showlegend=False,
            hovertemplate="%{y}: %{x:+.2f}%{text}<extra>ours</extra>",
        )
    )
    printed = [(row, row.cells[0].paper_difference) for row in rows]
    printed = [(row, value) for row, value in printed if value is not None]
    if printed:
        figure.add_trace(
            go.Scatter(
                x=[value for _, value in printed],
                y=[_text(row.arm) for row, _ in printed],
                mode="markers",
                marker={"symbol": "star-diamond-open", "size": 13, "color": "#d97706"},
                name="paper",
                hovertemplate="%{y}: %{x:+.2f}<extra>paper</extra>",
            )
        )
    _finish(figure, f"{column.heading} minus the baseline's", report.axis)
    every = [value for _, _, value in seeds] + [value or 0.0 for _, value in printed] + [0.0]
    halves = [(found.mean, found.ci95 or 0.0) for found in ours if found]
    figure.update_layout(
        height=150 + 26 * len(rows),
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
    )
    figure.update_xaxes(range=_range(every, halves), zeroline=True, zerolinecolor=OTHERS)
    figure.update_yaxes(
        type="category",
        range=[len(rows) - 0.4, -0.6],
        tickmode="array",
        tickvals=[_text(row.arm) for row in rows],
        ticktext=[_text(_short(row.arm)) for row in rows],
        ticks="",
    )
    caption = (
        "Bars: 95 % confidence intervals (paired t); those of few seeds may go on beyond the "
        "picture. Left of zero the arm scores lower than the baseline."
    )
    return Chart(title="Difference to the baseline", caption=caption, figure=figure, whole=True)


def curves(report: Report, table: Table, looks: Mapping[str, _Look]) -> Chart | None:
    """Plot the sweep's metric over iterations."""
    figure = _over_steps(table, looks, lambda line: line.curve)
    if figure is None:
        return None
    heading = report.columns[0].heading
    _finish(figure, "iteration", heading)
    return Chart(title=f"{heading} over training", caption=_LAYERS, figure=figure, layers=True)


def losses(report: Report, table: Table, looks: Mapping[str, _Look]) -> Chart | None:
    """Plot the training loss over iterations, logarithmically."""
    figure = _over_steps(table, looks, lambda line: line.loss)
    if figure is None:
        return None
    _finish(figure, "iteration", "training loss")
    values = [point.value for line in report.trials for point in line.loss if point.value > 0]
    if values:
        limits = _range(np.log10(values).tolist())
        # The format: between powers of ten plotly would write 20 as 2.
        figure.update_yaxes(type="log", range=limits, dtick="D2", tickformat="~g")
    return Chart(title="Loss over training", caption=_LAYERS, figure=figure, layers=True)


_LAYERS = (
    "Strong line: mean over the seeds that have come so far; thin lines: single seeds; band, of "
    "three seeds and more: 95 % confidence interval of the mean. Long curves are drawn with fewer "
    "points; peaks stay."
)


def _over_steps(
    table: Table, looks: Mapping[str, _Look], points: Callable[[TrialLine], Sequence[CurvePoint]]
) -> go.Figure | None:
    """Draw a curve for each arm: band, single seeds, mean."""
    traces = {row.arm: _trace([points(line) for line in row.trials]) for row in table.rows}
    drawn = [row for row in table.rows if traces[row.arm].steps]
    if not drawn:
        return None
    num_curves = sum(1 + looks[row.arm].named * len(row.trials) for row in drawn)
    most = max(_LEAST_OF_A_CURVE, min(_MOST_OF_A_CURVE, _MOST_POINTS // num_curves))
    figure = go.Figure(layout={"height": _HEIGHT})
    grey = [row for row in drawn if not looks[row.arm].named]
    # The last is drawn on top.
    for row in sorted(drawn, key=lambda row: (looks[row.arm].named, row.is_baseline)):
        look, trace = looks[row.arm], traces[row.arm]
        group = _text(row.arm) if look.named else ""
        if look.named:
            figure.add_traces(_band(trace, look, group, most))
            figure.add_traces(_seeds(row, points, look, group, most))
        place = thin(most, trace.means)
        notes = [
            (f" ± {trace.halves[i]:.3g}" if trace.counts[i] > 1 else "")
            + f" (n={trace.counts[i]})"
            for i in place
        ]
        figure.add_trace(
            go.Scatter(
                x=np.asarray(trace.steps, dtype=np.int32)[place],
                y=np.asarray(trace.means, dtype=np.float32)[place],
                text=notes,
                meta=[_text(row.arm)],  # a layer's is no list: an arm may be called "band"
                name=_text(_short(_label(row))) if look.named else f"{len(grey)} other arms",
                mode="lines+markers" if look.named and len(trace.steps) < 30 else "lines",
                line={"color": look.colour, "width": _width(row, look, len(place))},
                marker={"symbol": look.symbol, "size": 7},
                legendgroup=group,
                legendrank=1 if row.is_baseline else 2 if look.named else 3,
                showlegend=look.named or row is grey[0],
                hovertemplate="%{y:.4g}%{text}<extra>%{meta[0]}</extra>",
            )
        )
    figure.update_layout(hovermode="closest" if grey else "x unified")
    names = [_short(_label(row)) for row in drawn if looks[row.arm].named]
    if max(map(len, names)) > _LONG_NAME:
        figure.update_layout(
            height=_HEIGHT + 22 * (len(names) // 2 + 1),  # two names in a line
            legend={"orientation": "h", "y": -0.2, "yanchor": "top", "font": {"size": 11}},
            legend_entrywidth=0.48,
            legend_entrywidthmode="fraction",
        )
    values = [point.value for row in drawn for line in row.trials for point in points(line)]
    figure.update_yaxes(range=_range(values))
    return figure


def _trace(curves: Sequence[Sequence[CurvePoint]]) -> _Trace:
    values: dict[int, list[float]] = defaultdict(list)
    for curve in curves:
        for point in curve:
            values[point.step].append(point.value)
    steps = sorted(values)
    pairs = [mean_and_ci(values[step]) for step in steps]
    return _Trace(
        steps,
        [len(values[step]) for step in steps],
        [mean for mean, _ in pairs if mean is not None],
        [np.nan if half is None else half for _, half in pairs],
    )


def _band(trace: _Trace, look: _Look, group: str, most: int) -> list[go.Scatter]:
    enough = np.asarray(trace.counts) >= _LEAST_SEEDS
    if not enough.any():
        return []
    means, halves = np.asarray(trace.means)[enough], np.asarray(trace.halves)[enough]
    lows, highs = means - halves, means + halves
    place = thin(most, lows, highs)
    steps = np.asarray(trace.steps, dtype=np.int32)[enough][place]
    return [
        go.Scatter(
            x=np.concatenate([steps, steps[::-1]]),
            y=np.concatenate([highs[place], lows[place][::-1]]).astype(np.float32),
            fill="toself",
            fillcolor=look.colour,
            opacity=BAND,
            line={"width": 0},
            mode="lines",
            hoverinfo="skip",
            legendgroup=group,
            meta="band",
            showlegend=False,
        )
    ]


def _seeds(
    row: Row,
    points: Callable[[TrialLine], Sequence[CurvePoint]],
    look: _Look,
    group: str,
    most: int,
) -> list[go.Scatter]:
    lines = [points(line) for line in row.trials if points(line)]
    if len(lines) < 2:  # it is the mean
        return []
    found = []
    for line in lines:
        values = np.asarray([point.value for point in line], dtype=np.float32)
        place = thin(most, values)
        found.append(
            go.Scatter(
                x=np.asarray([point.step for point in line], dtype=np.int32)[place],
                y=values[place],
                mode="lines",
                line={"color": look.colour, "width": 1},
                opacity=SEED,
                hoverinfo="skip",
                legendgroup=group,
                meta="seed",
                showlegend=False,
            )
        )
    return found


def _width(row: Row, look: _Look, num_points: int) -> float:
    if not look.named:
        return 1.0
    wide = 3.5 if row.is_baseline else 2.0
    return wide if num_points < 100 else wide / 1.75  # what jumps at every point needs no width


def training_cost(report: Report, table: Table, looks: Mapping[str, _Look]) -> Chart | None:
    """Plot the sweep's metric against what a trial took, with the Pareto front."""
    on_gpu = any(line.metrics.get("sys/gpu_hours") for line in report.trials)

    def cost(row: Row) -> list[float]:
        if on_gpu:
            spent = [line.metrics.get("sys/gpu_hours") for line in row.trials]
        else:
            done = [line for line in row.trials if line.status == "finished"]
            spent = [None if line.seconds is None else line.seconds / 3600 for line in done]
        return [value for value in spent if value is not None]

    unit = "GPU-hours" if on_gpu else "hours of training"
    points = {row.arm: cost(row) for row in table.rows}
    return _trade_off(report, table, looks, points, f"{unit} of one trial", less_is_better=True)


def speed(report: Report, table: Table, looks: Mapping[str, _Look]) -> Chart | None:
    """Plot the sweep's metric against images per second, with the Pareto front."""
    points = {
        row.arm: [line.metrics[FPS] for line in row.trials if FPS in line.metrics]
        for row in table.rows
    }
    title = "images per second"
    return _trade_off(report, table, looks, points, title, less_is_better=False)


def _trade_off(
    report: Report,
    table: Table,
    looks: Mapping[str, _Look],
    costs: Mapping[str, list[float]],
    title: str,
    *,
    less_is_better: bool,
) -> Chart | None:
    """Plot one point for each arm, those on the Pareto front filled and joined."""
    column = report.columns[0]
    points = []
    for row in table.rows:
        x, x_half = mean_and_ci(costs[row.arm])
        cell = row.cells[0]
        if x is not None and cell.mean is not None:
            x_bar = x_half if x_half and len(costs[row.arm]) >= _LEAST_SEEDS else 0.0
            y_bar = cell.ci95 if cell.ci95 and cell.n >= _LEAST_SEEDS else 0.0
            points.append((row, x, x_bar, cell.mean, y_bar))
    if len(points) < 2:
        return None
    signs = (-1 if less_is_better else 1, 1 if _higher_is_better(column) else -1)
    merits = [(signs[0] * x, signs[1] * y) for _, x, _, y, _ in points]
    front = pareto(merits)
    figure = go.Figure(layout={"height": _HEIGHT})
    edge = sorted((points[place][1], points[place][3]) for place in front)
    figure.add_trace(
        go.Scatter(
            x=[x for x, _ in edge],
            y=[y for _, y in edge],
            mode="lines",
            line={"color": OTHERS, "width": 1.5, "dash": "dot"},
            name="Pareto front",
            hoverinfo="skip",
        )
    )
    arms = []  # plain values: of objects plotly makes another two copies
    for place, (row, x, x_half, y, y_half) in enumerate(points):
        look, leads = looks[row.arm], place in front
        labelled = len(points) <= len(PALETTE)  # more would lie on each other
        arms.append(
            {
                "type": "scatter",
                "x": [x],
                "y": [y],
                "error_x": {"array": [x_half], "thickness": 1, "width": 3},
                "error_y": {"array": [y_half], "thickness": 1, "width": 3},
                "text": [_text(_short(row.arm))] if labelled else None,
                "textposition": "top right",
                "mode": "markers+text" if labelled else "markers",
                "marker": {
                    "color": look.colour,
                    "symbol": look.symbol if leads else f"{look.symbol}-open",
                    "size": 14 if row.is_baseline else 11,
                },
                "meta": _text(_label(row)),
                "hovertemplate": "%{y:.2f} at %{x:.4g}<extra>%{meta}</extra>",
                "showlegend": False,
            }
        )
    figure.add_traces(arms)
    _finish(figure, title, column.heading)
    for update, centres in (
        (figure.update_xaxes, [(x, half) for _, x, half, *_ in points]),
        (figure.update_yaxes, [(y, half) for *_, y, half in points]),
    ):
        update(range=_range([value for value, _ in centres], centres))
    figure.update_layout(
        hovermode="closest",
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
    )
    return Chart(
        title=f"{column.heading} against {title}",
        caption="Filled and joined: the Pareto front, arms that no other beats in one without "
        "losing in the other. Bars, of three seeds and more: 95 % confidence intervals.",
        figure=figure,
    )


def pareto(merits: Sequence[tuple[float, float]]) -> set[int]:
    """Return the places of the points that no other one dominates; more is better in both."""
    return {
        place
        for place, (x, y) in enumerate(merits)
        if not any(
            other_x >= x and other_y >= y and (other_x, other_y) != (x, y)
            for other_x, other_y in merits
        )
    }


def _range(values: Sequence[float], intervals: Sequence[tuple[float, float]] = ()) -> list[float]:
    """Return axis limits around what was measured, and around intervals that are not too wide.

    Args:
        values: What was measured.
        intervals: Centres and half-widths; those of two seeds must not set the scale.
    """
    low, high = min(values), max(values)
    most = 0.3 * (high - low)
    low = min([low, *(centre - min(half, most) for centre, half in intervals)])
    high = max([high, *(centre + min(half, most) for centre, half in intervals)])
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return [low - margin, high + margin]


def _finish(figure: go.Figure, x_title: str, y_title: str) -> None:
    """Neutral colours: the page sets the text's for light and dark."""
    axis = {
        "gridcolor": "rgba(128,128,128,0.22)",
        "zeroline": False,
        "automargin": True,
        "ticklen": 4,
        "tickcolor": "rgba(0,0,0,0)",
    }
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 60, "r": 20, "t": 36, "b": 52},
        xaxis={**axis, "title": {"text": _text(x_title), "standoff": 8}},
        yaxis={**axis, "title": {"text": _text(y_title), "standoff": 8}},
        font={"family": "system-ui, sans-serif", "size": 13},
        hoverlabel={
            "namelength": -1,
            "bgcolor": "rgba(24,28,33,0.94)",
            "font": {"color": "#ffffff"},
        },
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#888888", "activecolor": "#2f81d8"},
    )


def _higher_is_better(column: Column) -> bool:
    info = find_metric(column.metric)
    assert info is not None, f"{column.metric}: the sweep file was checked"
    return info.higher_is_better


def _scale(column: Column) -> float:
    info = find_metric(column.metric)
    assert info is not None, f"{column.metric}: the sweep file was checked"
    return info.scale


def _label(row: Row) -> str:
    return f"{row.arm} (baseline)" if row.is_baseline else row.arm


def _short(name: str) -> str:
    """Return an arm's name for a chart: grid keys without their sections, and no novel."""
    name = re.sub(r"(?:\w+\.)+(\w+=)", r"\1", name)
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _text(words: str) -> str:
    """Return words that plotly shows as they are: it takes `<` and `&` for markup, not quotes."""
    return escape(words, quote=False)
