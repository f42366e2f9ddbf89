"""The ablation table as numbers: arms by metrics, over seeds, beside the paper's own.

Values are in the units a paper prints (`knet_platform.metrics`: AP and its kin times 100), so that
they subtract from the paper's; `TrialLine.metrics` keeps what was measured, unscaled.
"""

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from scipy.special import stdtrit

from knet_platform.metrics import MetricInfo, find_metric
from knet_platform.planning import Sweep, Trial
from knet_platform.storage import Store, TrialStore

COMPANIONS = ("val/AP50", "val/AP75", "bench/fps")
"""Shown beside a sweep's metric, where measured, when no paper says which columns to show."""

_PICTURE = re.compile(r"step_(\d+)\.png")


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One metric of the table."""

    metric: str
    heading: str
    digits: int
    """Decimals shown."""
    in_paper: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One arm's value of one metric, in display units; None where there is nothing to say."""

    n: int
    """Finished seeds that measured it."""
    mean: float | None
    ci95: float | None
    """Half-width of the 95 % confidence interval of the mean, Student's t; None below 2 seeds."""
    delta_baseline: float | None
    paper: float | None
    delta_paper: float | None
    """Own mean minus the paper's value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """The sweep's metric at one evaluation, in display units."""

    step: int
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialLine:
    """What became of one seed of an arm."""

    seed: int
    trial_hash: str
    status: str
    """finished, partial, failed or new."""
    detail: str
    """The status in words, with the reason of a failure."""
    metrics: Mapping[str, float]
    """Final metrics as measured (AP in 0..1); empty unless finished."""
    curve: tuple[CurvePoint, ...]
    checkpoint: str | None
    seconds: float | None
    """Seconds of training, over all attempts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """The newest probe picture of an arm: predicted masks over validation images."""

    seed: int
    step: int
    png: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One arm."""

    arm: str
    is_baseline: bool
    cells: tuple[Cell, ...]
    """One for each of `Report.columns`."""
    trials: tuple[TrialLine, ...]
    picture: Picture | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A sweep's results at one moment."""

    sweep: str
    title: str
    axis: str
    """What the arms vary: the last part of the one key they set, else "arm"."""
    baseline: str
    columns: tuple[Column, ...]
    """The sweep's own metric first."""
    rows: tuple[Row, ...]
    """In the sweep's order."""
    paper_source: str | None
    scale: str | None
    data: str
    training: str
    hardware: str
    created: str
    """ISO 8601, UTC."""

    @property
    def unfinished(self) -> tuple[tuple[Row, TrialLine], ...]:
        """Trials whose numbers the table lacks."""
        return tuple(
            (row, line) for row in self.rows for line in row.trials if line.status != "finished"
        )


def mean_and_ci(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the mean and the half-width of its 95 % confidence interval.

    Student's t with n - 1 degrees of freedom: t(0.975, n - 1) * s / sqrt(n). One value has no
    interval, no value no mean.
    """
    if not values:
        return None, None
    mean = statistics.fmean(values)
    n = len(values)
    if n == 1:
        return mean, None
    quantile = float(stdtrit(n - 1, 0.975))
    return mean, quantile * statistics.stdev(values, mean) / math.sqrt(n)


def build_report(sweep: Sweep, store: Store, *, scale: str | None = None) -> Report:
    """Read every trial's result from the store and put the table together.

    Args:
        sweep: Arms, seeds and the paper's numbers.
        store: Where trials left their results; only read.
        scale: Name of the scale the sweep was loaded with, for the heading.
    """
    arms = {arm: [trial for trial in sweep.trials if trial.arm == arm] for arm in sweep.arms}
    stores = {trial.hash: store.trial(trial.hash) for trial in sweep.trials}
    lines = {
        arm: tuple(_line(trial, stores[trial.hash], sweep.metric.name) for trial in trials)
        for arm, trials in arms.items()
    }
    measured = {name for group in lines.values() for line in group for name in line.metrics}
    columns = _columns(sweep, measured)
    means = {
        (arm, column.metric): mean_and_ci(_values(lines[arm], column.metric))[0]
        for arm in sweep.arms
        for column in columns
    }
    rows = tuple(
        Row(
            arm=arm,
            is_baseline=arm == sweep.baseline,
            cells=tuple(
                _cell(
                    _values(lines[arm], column.metric),
                    None if arm == sweep.baseline else means.get((sweep.baseline, column.metric)),
                    _paper_value(sweep, arm, column.metric),
                )
                for column in columns
            ),
            trials=lines[arm],
            picture=_newest_picture(arms[arm], stores),
        )
        for arm in sweep.arms
    )
    return Report(
        sweep=sweep.name,
        title=sweep.title,
        axis=_axis(sweep),
        baseline=sweep.baseline,
        columns=columns,
        rows=rows,
        paper_source=sweep.paper.source if sweep.paper else None,
        scale=scale,
        data=_data(sweep.trials[0]),
        training=_training(sweep),
        hardware=_hardware(stores.values()),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _columns(sweep: Sweep, measured: set[str]) -> tuple[Column, ...]:
    printed = sweep.paper.columns if sweep.paper else {}
    others = printed if printed else [name for name in COMPANIONS if name in measured]
    names = dict.fromkeys((sweep.metric.name, *others))
    return tuple(
        Column(
            metric=name,
            heading=printed.get(name, _info(name).title),
            digits=_info(name).digits,
            in_paper=name in printed,
        )
        for name in names
    )


def _info(metric: str) -> MetricInfo:
    info = find_metric(metric)
    assert info is not None, f"{metric}: the sweep file was checked"
    return info


def _values(lines: Sequence[TrialLine], metric: str) -> list[float]:
    scale = _info(metric).scale
    return [line.metrics[metric] * scale for line in lines if metric in line.metrics]


def _cell(values: Sequence[float], baseline: float | None, paper: float | None) -> Cell:
    mean, ci95 = mean_and_ci(values)

    def minus(reference: float | None) -> float | None:
        return None if mean is None or reference is None else mean - reference

    return Cell(
        n=len(values),
        mean=mean,
        ci95=ci95,
        delta_baseline=minus(baseline),
        paper=paper,
        delta_paper=minus(paper),
    )


def _paper_value(sweep: Sweep, arm: str, metric: str) -> float | None:
    if sweep.paper is None or metric not in sweep.paper.columns or arm not in sweep.paper.rows:
        return None
    return sweep.paper.rows[arm][list(sweep.paper.columns).index(metric)]


def _line(trial: Trial, store: TrialStore, metric: str) -> TrialLine:
    result, failure = store.result(), store.failure()
    state = None if result else store.state()
    if result:
        status, detail = "finished", f"finished at step {result.step}"
    elif failure:
        status = "failed"
        detail = f"failed: {failure.kind}: {failure.message} (attempt {failure.attempt})"
    elif state:
        status, detail = "partial", f"partial, newest checkpoint at step {state.step}"
    else:
        status, detail = "new", "not started, or no checkpoint yet"
    known = result or state
    scale = _info(metric).scale
    return TrialLine(
        seed=trial.seed,
        trial_hash=trial.hash,
        status=status,
        detail=detail,
        metrics=_finite(result.metrics) if result else {},
        curve=tuple(
            CurvePoint(step=point.step, value=point.metrics[metric] * scale)
            for point in (known.evaluations if known else ())
            if metric in point.metrics
        ),
        checkpoint=result.checkpoint if result else store.latest_checkpoint(),
        seconds=known.seconds if known else None,
    )


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _newest_picture(trials: Sequence[Trial], stores: Mapping[str, TrialStore]) -> Picture | None:
    for trial in trials:
        store = stores[trial.hash]
        found = [match for name in store.list("pictures") if (match := _PICTURE.fullmatch(name))]
        if found:
            newest = max(found, key=lambda match: int(match[1]))
            png = store.read_bytes(f"pictures/{newest[0]}")
            return Picture(seed=trial.seed, step=int(newest[1]), png=png)
    return None


def _axis(sweep: Sweep) -> str:
    keys = {key for trial in sweep.trials for key in trial.overrides}
    return keys.pop().rsplit(".", 1)[-1] if len(keys) == 1 else "arm"


def _data(trial: Trial) -> str:
    data = trial.recipe.data
    if data.format == "shapes":
        shapes = data.shapes
        return (
            f"shapes ({shapes.num_train} training and {shapes.num_val} validation images of "
            f"{shapes.size} px)"
        )
    return data.root.rstrip("/").rsplit("/", 1)[-1]


def _training(sweep: Sweep) -> str:
    def describe(trial: Trial) -> str:
        train = trial.recipe.train
        length = f"{train.epochs:g} epochs"
        if train.iterations:
            length = f"{train.iterations} iterations"
        return f"{length}, {train.batch_size} images per step"

    return "; ".join(dict.fromkeys(describe(trial) for trial in sweep.trials))


def _hardware(stores: Iterable[TrialStore]) -> str:
    results = [result for store in stores if (result := store.result())]
    kinds = dict.fromkeys(
        f"{result.workers} worker{'s' if result.workers > 1 else ''} on {result.device}"
        for result in results
    )
    return "; ".join(kinds) or "no finished trial yet"
