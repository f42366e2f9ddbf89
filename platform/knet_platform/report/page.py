"""The HTML page: one file that opens offline, with everything the report knows."""

from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from knet_platform.report import render
from knet_platform.report.charts import BAND, CONFIG, SEED, charts
from knet_platform.report.facts import facts
from knet_platform.report.table import Report
from knet_platform.storage import Cause

ADVICE: dict[Cause, str] = {
    "preempted": "Nothing to do: the trial goes on from its newest checkpoint. If it makes no "
    "progress, save more often (train.checkpoint_every) or use machines that are taken away less.",
    "out_of_memory_training": "Nothing to do where the trial went on with smaller micro-batches: "
    "the images per step are the same. Set train.micro_batch to save the lost attempt. If one "
    "image at a time is too much, give each worker more memory.",
    "out_of_memory_evaluation": "Nothing to do where the trial went on with fewer images at a "
    "time: the scores are the same. Set eval.batch_size to save the lost time. If one image at a "
    "time is too much, give each worker more memory.",
    "non_finite": "The dump holds the batch, the costs and the loss terms. Look at its images "
    "with knet data check, then lower optim.lr or lengthen optim.warmup_iterations.",
    "data": "Mend the file that the message names (knet data check finds all such files), then "
    "run the same command again.",
    "configuration": "Change the key that the message names, then run the same command again.",
    "hang": "The dump holds the stacks of all threads at the time. Look for a stalled data "
    "source or network, then run the same command again.",
    "damaged_checkpoint": "Nothing to do: the trial went on from the one before. If it happens "
    "again, look for what damages files in the store.",
    "crash": "Read the message and the worker's log. Once mended, knet retry --failed runs only "
    "the trials that failed.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """What a page that is served knows of itself."""

    version: str
    """Of what it shows; the server tells when there is a newer one."""
    seconds: float
    """Between questions."""


def html(report: Report, live: Live | None = None) -> str:
    """Return the page; every name in it is escaped.

    Args:
        report: What it shows.
        live: Given, the page comes again when there is news; else it asks nobody.
    """
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
    found = charts(report)
    drawn = [
        {
            "title": chart.title,
            "caption": chart.caption,
            "kind": "layers" * chart.layers + "whole" * chart.whole,
            "html": Markup(
                chart.figure.to_html(full_html=False, include_plotlyjs=False, config=CONFIG)
            ),
        }
        for chart in found
    ]
    evaluations = {picture.step for sheet in report.sheets for picture in sheet.evaluations}
    return environment.get_template("ablation.html.j2").render(
        report=report,
        live=live,
        facts=facts(report),
        charts=drawn,
        layers={
            name: opacity
            for name, opacity in (("seed", SEED), ("band", BAND))
            if any(trace.meta == name for chart in found for trace in chart.figure.data)
        },
        evaluations=sorted(evaluations),
        method=render.method(report),
        reduced=render.reduced(report),
        missing=render.missing(report),
        advice=ADVICE,
        plotly_js=Markup(get_plotlyjs()) if drawn else "",  # a library file, no user's text
    )
