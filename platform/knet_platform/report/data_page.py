"""The page of `knet data check`: one file that opens offline; every name in it is escaped."""

import base64
from collections import Counter
from html import escape

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from knet_core import CHECK_ERRORS, CHECK_WARNINGS, CheckReport
from knet_platform.report.charts import PALETTE

_CONFIG = {"displaylogo": False, "responsive": True}
_MOST_ROWS = 200
"""Findings of one code on the page; the JSON output has all."""
_MOST_CLASSES = 60
"""Bars that can be told apart."""


def html(report: CheckReport, *, title: str) -> str:
    """Return the page.

    Args:
        report: What was found.
        title: The data set's description.
    """
    environment = Environment(
        loader=PackageLoader("knet_platform.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    meanings = CHECK_ERRORS | CHECK_WARNINGS
    groups = []
    for kind, findings in (("error", report.errors), ("warning", report.warnings)):
        for code, times in Counter(finding.code for finding in findings).items():
            rows = [finding for finding in findings if finding.code == code][:_MOST_ROWS]
            groups.append((kind, code, meanings[code], times, rows))
    figures = [
        (caption, Markup(figure.to_html(full_html=False, include_plotlyjs=False, config=_CONFIG)))
        for caption, figure in (
            (_class_caption(report), classes(report)),
            ("Objects of an image, crowds left out.", instances(report)),
        )
        if figure is not None
    ]
    return environment.get_template("data_check.html.j2").render(
        title=title,
        report=report,
        stats=report.stats,
        splits=report.stats.splits,
        groups=groups,
        figures=figures,
        picture=base64.b64encode(report.picture).decode("ascii") if report.picture else "",
        plotly_js=Markup(get_plotlyjs()),  # a library file, not text from a user
    )


def classes(report: CheckReport) -> go.Figure | None:
    """Plot how often each of the most frequent classes occurs in each split."""
    totals: Counter[str] = Counter()
    for split in report.stats.splits.values():
        totals.update(split.classes)
    if not totals.total():
        return None
    names = [name for name, _ in totals.most_common(_MOST_CLASSES)]
    figure = go.Figure(
        [
            go.Bar(
                x=[escape(name) for name in names],
                y=[split.classes.get(name, 0) for name in names],
                name=name_of,
                marker={"color": PALETTE[place]},
            )
            for place, (name_of, split) in enumerate(report.stats.splits.items())
        ]
    )
    figure.update_xaxes(dtick=1, tickangle=-60, tickfont={"size": 11})  # every class by its name
    unit = "pixels" if report.stats.task == "semantic" else "annotations"
    _finish(figure, "class", f"{unit} (logarithmic)", log=True)
    return figure


def instances(report: CheckReport) -> go.Figure | None:
    """Plot how many images have so many objects, and the number of kernels."""
    stats = report.stats
    if stats.suggested_kernels is None:
        return None
    figure = go.Figure(
        [
            go.Bar(
                x=list(split.instances_per_image),
                y=list(split.instances_per_image.values()),
                name=name,
                marker={"color": PALETTE[place]},
            )
            for place, (name, split) in enumerate(stats.splits.items())
        ]
    )
    for count, text in ((stats.num_kernels, "set"), (stats.suggested_kernels, "suggested")):
        figure.add_vline(
            x=count, line={"dash": "dash", "color": "#888888"}, annotation_text=f"{text}: {count}"
        )
    _finish(figure, "objects", "images", log=False)
    return figure


def _class_caption(report: CheckReport) -> str:
    most = max((len(split.classes) for split in report.stats.splits.values()), default=0)
    if most > _MOST_CLASSES:
        return f"The {_MOST_CLASSES} most frequent of {most} classes."
    return f"All {most} classes."


def _finish(figure: go.Figure, x_title: str, y_title: str, *, log: bool) -> None:
    """Neutral colours: the page's script sets the text colour for light and dark."""
    grid = "rgba(128,128,128,0.25)"
    figure.update_layout(
        template="none",
        barmode="group",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 64, "r": 16, "t": 40, "b": 48},
        height=380,
        xaxis={"title": {"text": x_title}, "automargin": True},
        yaxis={
            "title": {"text": y_title},
            "gridcolor": grid,
            **({"type": "log", "dtick": 1} if log else {}),  # a line at every power of ten
        },
        font={"family": "system-ui, sans-serif", "size": 13},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#888888", "activecolor": "#2f81d8"},
    )
