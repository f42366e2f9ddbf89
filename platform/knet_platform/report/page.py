"""The HTML page: one file that opens offline, with everything the report knows."""

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from knet_platform.report import render
from knet_platform.report.charts import CONFIG, charts
from knet_platform.report.table import Report


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
    environment.globals.update(
        estimate=render.estimate, delta=render.delta, p_value=render.p_value, seeds=render.seeds
    )
    figures = [
        (caption, Markup(figure.to_html(full_html=False, include_plotlyjs=False, config=CONFIG)))
        for caption, figure in charts(report)
    ]
    return environment.get_template("ablation.html.j2").render(
        report=report,
        figures=figures,
        method=render.method(report),
        missing=render.missing(report),
        finished=sum(line.status == "finished" for line in report.trials),
        plotly_js=Markup(get_plotlyjs()) if figures else "",  # a library file, no user's text
    )
