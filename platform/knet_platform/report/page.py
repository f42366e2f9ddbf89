"""The HTML page: one file that opens offline, with everything the report knows."""

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from knet_platform.report import render
from knet_platform.report.charts import CONFIG, charts
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
        reduced=render.reduced(report),
        missing=render.missing(report),
        advice=ADVICE,
        finished=sum(line.status == "finished" for line in report.trials),
        plotly_js=Markup(get_plotlyjs()) if figures else "",  # a library file, no user's text
    )
