"""The ablation table as numbers: arms by metrics, over seeds, beside the paper's own.

Values are in the units a paper prints (`knet_platform.metrics`: AP and its kin times 100), so that
they subtract from the paper's; `TrialLine.metrics` keeps what was measured, unscaled.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from knet_platform.differences import Differences, differences
from knet_platform.links import Link, read_links
from knet_platform.metrics import MetricInfo, find_metric
from knet_platform.population import schedule_notes
from knet_platform.report.pictures import Sheet, contact_sheets
from knet_platform.report.statistics import Difference, Trend, difference, mean_and_ci, trend
from knet_platform.report.trials import TrialLine, read_trials
from knet_platform.storage import Store
from knet_platform.sweep import Sweep, Trial

COMPANIONS = ("val/AP50", "val/AP75", "bench/fps")
"""Shown beside a sweep's metric, where measured, when no paper says which columns to show."""


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
    difference: Difference | None
    """To the baseline, on shared seeds; None for the baseline itself."""
    paper: float | None
    paper_difference: float | None
    """The paper's value minus its value of the baseline."""

    @property
    def delta_paper(self) -> float | None:
        """Own mean minus the paper's value."""
        return None if self.mean is None or self.paper is None else self.mean - self.paper

    @property
    def delta_of_deltas(self) -> float | None:
        """Own difference to the baseline minus the paper's."""
        if self.difference is None or self.paper_difference is None:
            return None
        return self.difference.mean - self.paper_difference

    @property
    def trend(self) -> Trend | None:
        """Whether the paper's difference to the baseline shows in ours."""
        return trend(self.difference, self.paper_difference)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One arm."""

    arm: str
    is_baseline: bool
    cells: tuple[Cell, ...]
    """One for each of `Report.columns`."""
    trials: tuple[TrialLine, ...]
    """Those that this table is about; an arm may have others in another table."""
    seeds: int
    """Planned for the arm in the whole sweep."""
    gpu_hours: float | None
    """Of all its finished trials together; None before the first."""
    usd: float | None
    """Likewise; None where no price is known."""

    @property
    def status(self) -> str:
        """What is true of all trials, else the worst: unreadable, failed, pruned or partial."""
        found = {line.status for line in self.trials}
        if len(found) == 1:
            return found.pop()
        worst = next(
            (status for status in ("unreadable", "failed", "pruned") if status in found), None
        )
        return worst or "partial"

    @property
    def fate(self) -> str:
        """The status, with the step where a screen stopped the arm."""
        pruned = next((line.pruned for line in self.trials if line.pruned), None)
        return (
            f"pruned at step {pruned.step}" if pruned and self.status == "pruned" else self.status
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Arms that were measured on the same data by the same code, and so may be compared."""

    reason: str
    """Why these rows stand apart from the baseline's; empty for the baseline's own table."""
    rows: tuple[Row, ...]
    """In the sweep's order; of a search, best first."""


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
    tables: tuple[Table, ...]
    """The baseline's first, with every trial that is not known to stand apart."""
    notes: tuple[str, ...]
    """What the sweep file itself gives to know, such as arms that are the same run."""
    differences: Differences
    sheets: tuple[Sheet, ...]
    paper_source: str | None
    scale: str | None
    data: str
    training: str
    hardware: str
    links: tuple[Link, ...]
    """Pages of the tracking server."""
    created: str
    """ISO 8601, UTC."""

    @property
    def rows(self) -> tuple[Row, ...]:
        """Rows of all tables."""
        return tuple(row for table in self.tables for row in table.rows)

    @property
    def trials(self) -> tuple[TrialLine, ...]:
        """Trials of all tables."""
        return tuple(line for row in self.rows for line in row.trials)

    @property
    def unfinished(self) -> tuple[TrialLine, ...]:
        """Trials whose numbers the tables lack."""
        metric = self.columns[0].metric
        return tuple(line for line in self.trials if metric not in line.metrics)


def build_report(sweep: Sweep, store: Store, *, scale: str | None = None) -> Report:
    """Read every trial's result from the store and put the tables together.

    Args:
        sweep: Arms, seeds and the paper's numbers.
        store: Where trials left their results; only read.
        scale: Name of the scale the sweep was loaded with, for the heading.
    """
    lines = read_trials(sweep, store)
    columns = _columns(sweep, {name for line in lines for name in line.metrics})
    return Report(
        sweep=sweep.name,
        title=sweep.title,
        axis=_axis(sweep),
        baseline=sweep.baseline,
        columns=columns,
        tables=_tables(sweep, lines, columns),
        notes=(*sweep.notes, *schedule_notes(sweep, store)),
        differences=differences(sweep),
        sheets=contact_sheets(sweep, store),
        paper_source=sweep.paper.source if sweep.paper else None,
        scale=scale,
        data=_data(sweep.trials[0]),
        training=_training(sweep),
        hardware=_hardware(lines),
        links=read_links(store, sweep.name),
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


def _tables(
    sweep: Sweep, lines: Sequence[TrialLine], columns: Sequence[Column]
) -> tuple[Table, ...]:
    """Return one table for each kind of measurement, the baseline's first.

    Trials that have not started are of no kind yet and stay in the first.
    """
    measured = [line for line in lines if line.metrics]
    started = [line for line in lines if line.metrics or line.origin]
    candidates = [line for line in measured if line.arm == sweep.baseline] or measured or started
    counts = Counter(map(_kind, candidates))
    first = counts.most_common(1)[0][0] if counts else None
    members: dict[_Kind, list[TrialLine]] = {first: []}
    for line in lines:
        kind = _kind(line) if line.metrics or line.origin else first
        members.setdefault(kind, []).append(line)
    return tuple(
        Table(
            reason="" if kind == first else _reason(kind, first),
            rows=_rows(sweep, group, columns),
        )
        for kind, group in members.items()
    )


_Kind = tuple[str, str] | None
"""Fingerprint of the data and digest of the code that scores; None where not recorded."""


def _kind(line: TrialLine) -> _Kind:
    if line.origin is None:
        return None
    return line.origin.data_fingerprint, line.origin.evaluation_digest


def _reason(kind: _Kind, first: _Kind) -> str:
    """Say what sets a table apart from the first."""
    if kind is None or first is None:
        known = first or kind
        assert known is not None, "two kinds differ"
        return (
            f"data and evaluation code of {'these rows' if kind is None else 'the first table'} "
            f"were not recorded, those of the others are {known[0][:8]} and {known[1][:8]}"
        )
    names = ("data", "evaluation code")
    return " and ".join(
        f"other {name} ({ours[:8]}, the first table has {theirs[:8]})"
        for name, ours, theirs in zip(names, kind, first, strict=True)
        if ours != theirs
    )


def _rows(sweep: Sweep, lines: Sequence[TrialLine], columns: Sequence[Column]) -> tuple[Row, ...]:
    """Return one row for each arm that has trials among `lines`."""
    values = {
        (arm, column.metric): {
            line.seed: line.metrics[column.metric] * _info(column.metric).scale
            for line in lines
            if line.arm == arm and column.metric in line.metrics
        }
        for arm in sweep.arms
        for column in columns
    }
    rows = []
    for arm in sweep.arms:
        trials = tuple(line for line in lines if line.arm == arm)
        if not trials:
            continue
        is_baseline = arm == sweep.baseline
        cells = tuple(
            _cell(
                values[arm, column.metric],
                {} if is_baseline else values[sweep.baseline, column.metric],
                _paper_value(sweep, arm, column.metric),
                None if is_baseline else _paper_value(sweep, sweep.baseline, column.metric),
            )
            for column in columns
        )
        rows.append(
            Row(
                arm=arm,
                is_baseline=is_baseline,
                cells=cells,
                trials=trials,
                seeds=len(sweep.seeds),
                gpu_hours=_total(trials, "sys/gpu_hours"),
                usd=_total(trials, "cost/usd"),
            )
        )
    if sweep.search is not None:
        better = -1 if sweep.metric.mode == "max" else 1
        rows.sort(key=lambda row: math.inf if (m := row.cells[0].mean) is None else better * m)
    return tuple(rows)


def _cell(
    ours: Mapping[int, float],
    baseline: Mapping[int, float],
    paper: float | None,
    paper_baseline: float | None,
) -> Cell:
    mean, ci95 = mean_and_ci([ours[seed] for seed in sorted(ours)])
    paper_difference = None
    if paper is not None and paper_baseline is not None:
        paper_difference = paper - paper_baseline
    return Cell(
        n=len(ours),
        mean=mean,
        ci95=ci95,
        difference=difference(ours, baseline),
        paper=paper,
        paper_difference=paper_difference,
    )


def _total(trials: Iterable[TrialLine], metric: str) -> float | None:
    found = [line.metrics[metric] for line in trials if metric in line.metrics]
    return sum(found) if found else None


def _paper_value(sweep: Sweep, arm: str, metric: str) -> float | None:
    if sweep.paper is None or metric not in sweep.paper.columns or arm not in sweep.paper.rows:
        return None
    return sweep.paper.rows[arm][list(sweep.paper.columns).index(metric)]


def _axis(sweep: Sweep) -> str:
    keys = {key for trial in sweep.trials for key in trial.overrides}
    # Recipes of their own may differ in anything.
    return "arm" if len(keys) != 1 or "base" in keys else keys.pop().rsplit(".", 1)[-1]


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


def _hardware(lines: Iterable[TrialLine]) -> str:
    kinds = dict.fromkeys(line.hardware for line in lines if line.hardware)
    return "; ".join(kinds) or "no finished trial yet"
