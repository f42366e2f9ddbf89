"""Means, paired differences and trends, against scipy's own and a textbook's."""

import math
import statistics

import pytest
from scipy import stats

from knet_platform.report.statistics import Difference, difference, mean_and_ci, trend


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


def test_the_comparison_equals_scipys_paired_t_test_on_the_shared_seeds() -> None:
    arm = {0: 31.2, 1: 29.8, 2: 30.5, 3: 33.1, 7: 99.0}
    baseline = {0: 30.1, 1: 29.9, 2: 29.0, 3: 31.8, 9: 1.0}
    found = difference(arm, baseline)
    expected = stats.ttest_rel(
        [arm[seed] for seed in range(4)], [baseline[seed] for seed in range(4)]
    )
    low, high = expected.confidence_interval(0.95)
    assert found is not None
    assert found.ci95 is not None
    assert found.n == 4
    assert (found.mean - found.ci95, found.mean + found.ci95) == pytest.approx((low, high))
    assert found.p == pytest.approx(expected.pvalue)


def test_noise_that_seeds_share_does_not_hide_a_difference() -> None:
    baseline = {0: 20.0, 1: 30.0, 2: 40.0}
    arm = {seed: value + 1 + 0.01 * seed for seed, value in baseline.items()}
    found = difference(arm, baseline)
    assert found is not None
    assert found.p is not None
    assert found.p < 0.001


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_equal_differences_have_an_interval_of_nothing_and_no_p(shift: float) -> None:
    found = difference({0: 1.0 + shift, 1: 2.0 + shift}, {0: 1.0, 1: 2.0})
    assert found == Difference(n=2, mean=shift, ci95=0.0, p=None)


def test_one_shared_seed_has_a_difference_alone_and_none_has_nothing() -> None:
    assert difference({0: 3.0, 1: 5.0}, {1: 4.0}) == Difference(n=1, mean=1.0, ci95=None, p=None)
    assert difference({0: 3.0}, {1: 4.0}) is None


@pytest.mark.parametrize(
    ("mean", "ci95", "paper", "word"),
    [
        (-2.0, 1.0, -12.3, "holds"),
        (2.0, 1.0, -12.3, "contradicts"),
        (-1.0, 2.0, -12.3, "unclear"),
        (-1.0, 2.0, 0.0, "holds"),
        (-2.0, 1.0, 0.0, "contradicts"),
        (-2.0, None, -12.3, "same sign"),
        (2.0, None, -12.3, "opposite sign"),
        (2.0, None, 0.0, "unclear"),
        (0.0, None, 0.0, "same sign"),
        (1.0, 0.0, 5.0, "holds"),
    ],
)
def test_a_trend_is_one_word(mean: float, ci95: float | None, paper: float, word: str) -> None:
    assert trend(Difference(n=2 if ci95 else 1, mean=mean, ci95=ci95, p=None), paper) == word


def test_there_is_no_trend_without_both_differences() -> None:
    assert trend(None, 1.0) is None
    assert trend(Difference(n=1, mean=1.0, ci95=None, p=None), None) is None
