"""The numbers of the ablation table."""

import math
import statistics

import pytest
from scipy import stats

from knet_platform.planning import Sweep
from knet_platform.report import build_report
from knet_platform.report.table import mean_and_ci
from knet_platform.storage import Store


def test_the_interval_equals_scipys_t_interval() -> None:
    values = [31.2, 29.8, 30.5, 33.1, 30.9]
    mean, half = mean_and_ci(values)
    low, high = stats.t.interval(0.95, 4, loc=statistics.mean(values), scale=stats.sem(values))
    assert mean is not None
    assert half is not None
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_the_interval_equals_the_tables_of_a_textbook() -> None:
    # t(0.975, 2) = 4.303 in every table; 1, 2, 3 have mean 2 and standard deviation 1.
    mean, half = mean_and_ci([1.0, 2.0, 3.0])
    assert mean == pytest.approx(2.0)
    assert half == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)


def test_one_seed_has_a_mean_and_no_interval_and_no_seed_has_neither() -> None:
    assert mean_and_ci([3.0]) == (3.0, None)
    assert mean_and_ci([]) == (None, None)


def test_rows_keep_the_order_of_the_sweep_and_columns_those_of_the_paper(
    sweep: Sweep, store: Store
) -> None:
    report = build_report(sweep, store)
    assert [row.arm for row in report.rows] == ["1", "3", "4", "5"]
    assert [(column.metric, column.heading) for column in report.columns] == [
        ("val/AP", "AP"),
        ("val/AP50", "AP50"),
        ("val/AP75", "AP75"),
        ("bench/fps", "FPS"),
    ]
    assert report.axis == "stages"


def test_cells_are_in_the_papers_units_with_both_differences(sweep: Sweep, store: Store) -> None:
    report = build_report(sweep, store)
    one, three = (row.cells[0] for row in report.rows[:2])
    assert (three.n, three.mean) == (3, pytest.approx(33.0))
    assert three.ci95 == pytest.approx(stats.t.ppf(0.975, 2) * stats.sem([30.0, 32.0, 37.0]))
    assert three.delta_baseline is None
    assert three.delta_paper == pytest.approx(33.0 - 34.1)
    assert (one.n, one.mean, one.ci95) == (1, pytest.approx(10.0), None)
    assert one.delta_baseline == pytest.approx(10.0 - 33.0)
    assert (one.paper, one.delta_paper) == (21.8, pytest.approx(10.0 - 21.8))


def test_a_value_the_paper_lacks_leaves_its_difference_empty(sweep: Sweep, store: Store) -> None:
    report = build_report(sweep, store)
    speed_of_three, ap_of_four = report.rows[1].cells[3], report.rows[2].cells[0]
    assert (speed_of_three.mean, speed_of_three.paper, speed_of_three.delta_paper) == (
        pytest.approx(10.0),
        None,
        None,
    )
    assert (ap_of_four.n, ap_of_four.mean, ap_of_four.paper) == (0, None, None)


def test_every_missing_trial_is_named_with_its_reason(sweep: Sweep, store: Store) -> None:
    report = build_report(sweep, store)
    missing = {(row.arm, line.seed): line.detail for row, line in report.unfinished}
    assert set(missing) == {("1", 1), ("1", 2), *((arm, s) for arm in "45" for s in range(3))}
    assert missing["4", 0] == "failed: WorkerDied: killed <by> the kernel (attempt 3)"
    assert missing["5", 0].startswith("not started")


def test_without_a_paper_the_companions_that_were_measured_are_shown(
    sweep: Sweep, store: Store
) -> None:
    import dataclasses

    report = build_report(dataclasses.replace(sweep, paper=None), store)
    assert [column.metric for column in report.columns] == [
        "val/AP",
        "val/AP50",
        "val/AP75",
        "bench/fps",
    ]
    assert not any(column.in_paper for column in report.columns)


def test_the_newest_picture_and_the_whole_curve_are_found(sweep: Sweep, store: Store) -> None:
    row = build_report(sweep, store).rows[1]
    assert row.picture is not None
    assert (row.picture.seed, row.picture.step) == (0, 300)
    assert row.picture.png.startswith(b"\x89PNG")
    assert [(point.step, point.value) for point in row.trials[0].curve] == [
        (100, pytest.approx(10.0)),
        (200, pytest.approx(20.0)),
        (300, pytest.approx(30.0)),
    ]
