"""A report in a few facts, for whoever looks for one minute."""

from collections import Counter
from dataclasses import dataclass

from knet_platform.metrics import find_metric
from knet_platform.report import render
from knet_platform.report.table import Report, Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One answer, in words."""

    name: str
    value: str
    details: tuple[str, ...]


def facts(report: Report) -> list[Fact]:
    """Return which arm is best, whether the paper's trends hold, how far it is, what it cost."""
    return [_best(report), *_trends(report), _trials(report), _cost(report)]


def best_row(report: Report) -> Row | None:
    """Return the arm with the best mean among those measured like the baseline."""
    rows = [row for row in report.tables[0].rows if row.cells[0].mean is not None]
    info = find_metric(report.columns[0].metric)
    assert info is not None, "the sweep file was checked"
    sign = 1 if info.higher_is_better else -1
    return max(rows, key=lambda row: sign * (row.cells[0].mean or 0.0), default=None)


def _best(report: Report) -> Fact:
    row, column = best_row(report), report.columns[0]
    if row is None:
        return Fact(name="Best arm so far", value="none yet", details=("no trial has finished",))
    cell = row.cells[0]
    lines = [f"{column.heading} {render.value(cell, column.digits)}"]
    if row.is_baseline:
        lines.append("the baseline itself")
    elif cell.difference is None:
        lines.append("no seed shared with the baseline")
    else:
        lines.append(f"{render.delta(cell, column.digits)} to the baseline")
        lines.append(_certainty(cell.difference.mean, cell.difference.ci95))
    return Fact(
        name="Best arm" + " so far" * bool(report.unfinished), value=row.arm, details=tuple(lines)
    )


def _certainty(mean: float, ci95: float | None) -> str:
    if ci95 is None:
        return "one shared seed: no interval"
    if abs(mean) <= ci95:
        return "the interval includes zero"
    return "the interval excludes zero"


def _trends(report: Report) -> list[Fact]:
    trends = Counter(row.cells[0].trend for row in report.tables[0].rows if row.cells[0].trend)
    if not report.columns[0].in_paper:
        return []
    if not trends:
        return [Fact(name="The paper's trends", value="nothing to compare yet", details=())]
    most, *others = [f"{word}: {count}" for word, count in trends.most_common()]
    arms = sum(trends.values())
    return [
        Fact(
            name=f"The paper's trends, {arms} arm{'s' * (arms > 1)}",
            value=most,
            details=(", ".join(others),) if others else (),
        )
    ]


def _trials(report: Report) -> Fact:
    states = Counter(line.status for line in report.trials)
    done, total = states.pop("finished", 0), len(report.trials)
    details = [f"{count} {state}" for state, count in states.most_common()]
    troubled = sum(bool(line.failures) for line in report.trials)
    if troubled:
        details.append(f"{troubled} with something to triage")
    return Fact(name="Trials finished", value=f"{done} of {total}", details=tuple(details))


def _cost(report: Report) -> Fact:
    hours = [row.gpu_hours for row in report.rows if row.gpu_hours]
    usd = [row.usd for row in report.rows if row.usd]
    seconds = sum(line.seconds or 0.0 for line in report.trials)
    trained = f"{seconds / 3600:,.1f} hours of training"
    if not hours:
        return Fact(name="Cost so far", value=trained, details=("no GPU",))
    details = [trained, *([f"{sum(usd):,.2f} USD"] if usd else ["no price known"])]
    return Fact(name="Cost so far", value=f"{sum(hours):,.1f} GPU-hours", details=tuple(details))
