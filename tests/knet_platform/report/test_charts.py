"""What the charts show; that a browser draws them is tested in `tests/browser`."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest

from knet_platform.planning import load_sweep
from knet_platform.report import Report, build_report
from knet_platform.report.charts import OTHERS, PALETTE, Chart, _short, charts, pareto
from knet_platform.storage import Evaluation, Store, TrialResult
from knet_platform.sweep import Sweep


@pytest.fixture
def report(sweep: Sweep, store: Store) -> Report:
    return build_report(sweep, store)


def chart(report: Report, title: str) -> go.Figure:
    (found,) = [chart for chart in charts(report) if chart.title.startswith(title)]
    return found.figure


def values(text: object) -> list[float]:
    return [float(value) for value in np.asarray(text)]


def test_the_axis_shows_what_was_measured_however_wide_the_intervals(report: Report) -> None:
    figure = chart(report, "AP over training")
    low, high = figure.layout.yaxis.range
    # Seeds end at 10 and at 30, 32 and 37; the first evaluation is a third of that.
    assert 0 < low < 10 / 3
    assert 37 < high < 40
    named = [trace for trace in figure.data if trace.showlegend]
    assert [trace.name for trace in named] == ["1", "3 (baseline)"]
    assert named[1].line.color == PALETTE[0]
    assert named[1].text[-1] == " ± 8.96 (n=3)"
    assert named[0].text[-1] == " (n=1)"
    layers = [trace.meta for trace in figure.data]
    assert layers == [("1",), "band", "seed", "seed", "seed", ("3",)]


def test_differences_stand_beside_the_papers(report: Report) -> None:
    figure = chart(report, "Difference to the baseline")
    ours = next(trace for trace in figure.data if trace.name == "ours")
    paper = next(trace for trace in figure.data if trace.name == "paper")
    assert (list(ours.y), values(ours.x)) == (["1"], [pytest.approx(-20.0)])
    assert (list(paper.y), values(paper.x)) == (["1"], [pytest.approx(-12.3)])


def test_the_loss_is_drawn_from_all_that_was_logged(sweep: Sweep, store: Store) -> None:
    trial = next(trial for trial in sweep.trials if trial.name == "3/0")
    points = [
        Evaluation(step=step, time=step, metrics={"train/loss": 1 + 9 * (step == 7_777)})
        for step in range(1, 10_001)
    ]
    store.trial(trial.hash).write_points(0, points)
    figure = chart(build_report(sweep, store), "Loss over training")
    (mean,) = figure.data
    assert len(mean.x) <= 1002
    assert dict(zip(values(mean.x), values(mean.y), strict=True))[7_777] == 10


def test_of_many_arms_the_best_have_a_hue_and_the_others_share_one(
    tmp_path: Path, make_result: Callable[..., TrialResult]
) -> None:
    (tmp_path / "recipe.yaml").write_text("data: {format: shapes}\n")
    arms = "\n".join(f'  "{n}": {{model.num_kernels: {n}}}' for n in range(50, 80))
    text = 'name: many\nbase: recipe.yaml\nmetric: {name: val/AP, mode: max}\nbaseline: "55"\n'
    (tmp_path / "many.yaml").write_text(f"{text}arms:\n{arms}\n")
    sweep, store = load_sweep(tmp_path / "many.yaml"), Store(str(tmp_path / "storage"))
    for number, trial in enumerate(sweep.trials):
        store.trial(trial.hash).write_result(make_result(trial.hash, 0.1 + number / 100))
    figure = chart(build_report(sweep, store), "AP over training")
    named = {trace.name: trace.line.color for trace in figure.data if trace.showlegend}
    best = [str(n) for n in range(72, 80)]
    assert set(named) == {"55 (baseline)", *best, "21 other arms"}
    assert (named["55 (baseline)"], named["21 other arms"]) == (PALETTE[0], OTHERS)
    assert len({named[arm] for arm in best}) == len(best)
    assert len(figure.data) == 30  # others have a curve each all the same


def test_names_are_text_and_no_markup(report: Report) -> None:
    evil = "<b>\"'&</b>"
    rows = tuple(dataclasses.replace(row, arm=row.arm + evil) for row in report.rows)
    table = dataclasses.replace(report.tables[0], rows=rows)
    for drawn in charts(dataclasses.replace(report, tables=(table,))):
        assert "<b>" not in json.dumps(drawn.figure.to_plotly_json(), default=str)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("3", "3"),
        ("model.num_kernels=50,optim.lr=1e-3", "num_kernels=50,lr=1e-3"),
        ("kernels.only", "kernels.only"),
        ("x" * 60, "x" * 47 + "…"),
    ],
)
def test_long_names_are_shortened_where_they_say_least(name: str, shown: str) -> None:
    assert _short(name) == shown


def test_intervals_of_two_seeds_do_not_cross_the_whole_chart(
    report: Report, sweep: Sweep, store: Store
) -> None:
    def drawn(report: Report) -> tuple[list[object], list[float]]:
        """Return the layers of the curves, and the baseline's bars of speed and score."""
        point = chart(report, "AP against images").data[-1]
        assert point.meta == "3 (baseline)"
        layers = [trace.meta for trace in chart(report, "AP over training").data]
        return layers, values([*point.error_x.array, *point.error_y.array])

    layers, bars = drawn(report)
    assert layers.count("band") == 1
    assert bars == [0, pytest.approx(8.957, abs=1e-3)]
    two = dataclasses.replace(sweep, trials=tuple(t for t in sweep.trials if t.seed < 2))
    layers, bars = drawn(build_report(two, store))
    assert (layers.count("band"), layers.count("seed"), bars) == (0, 2, [0, 0])


def test_without_numbers_there_are_no_charts(sweep: Sweep, tmp_path: Path) -> None:
    empty: list[Chart] = charts(build_report(sweep, Store(str(tmp_path / "empty"))))
    assert empty == []


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([(1, 5), (2, 4), (1, 4)], {0, 1}),
        ([(1, 1), (1, 1)], {0, 1}),  # equals do not beat each other
        ([(3, 3), (1, 9), (2, 2), (9, 1)], {0, 1, 3}),
        ([], set()),
    ],
)
def test_the_pareto_front_is_what_no_other_beats(
    points: list[tuple[float, float]], front: set[int]
) -> None:
    assert pareto(points) == front


def test_cheaper_is_better_and_so_is_faster(report: Report) -> None:
    trained, fast = (chart(report, f"AP against {what}") for what in ("hours", "images"))
    filled = [trace.meta for trace in trained.data[1:] if "-open" not in trace.marker.symbol]
    assert filled == ["3 (baseline)"]  # as long as arm 1, and better
    assert [trace.meta for trace in fast.data[1:]] == ["1", "3 (baseline)"]
