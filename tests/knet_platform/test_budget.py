"""The governor stops what a budget cannot pay for: the least important first."""

import dataclasses

import pytest

from knet_platform.budget import RESERVE_SECONDS, Governor, limit_seconds
from knet_platform.sweep import Sweep
from knet_platform.sweep_file import Budget, Metric, Resources


def sweep_with(budget: Budget, resources: Resources) -> Sweep:
    return Sweep(
        name="s", path=None, title="", metric=Metric(name="val/AP", mode="max"), baseline="a",
        seeds=(0,), arms=("a",), paper=None, resources=resources, budget=budget, trials=(),
    )  # fmt: skip


def governor(limit: float, **spent: float) -> Governor:
    return Governor(limit, spent=spent, priority=["base", "one", "two"])


def test_the_tightest_cap_counts():
    resources = Resources(workers=4, gpus_per_worker=1)
    both = Budget(usd=10, gpu_hours=2)
    assert limit_seconds(sweep_with(both, resources), 8.0) == pytest.approx(1800)
    usd = dataclasses.replace(both, gpu_hours=None)
    assert limit_seconds(sweep_with(usd, resources), 8.0) == pytest.approx(4500)
    assert limit_seconds(sweep_with(Budget(), resources), 8.0) is None
    assert limit_seconds(sweep_with(usd, resources), 0.0) is None


def test_elastic_trials_are_counted_with_the_most_workers():
    resources = Resources(workers=(1, 4), gpus_per_worker=1)
    assert limit_seconds(sweep_with(Budget(gpu_hours=2), resources), 2.0) == pytest.approx(1800)
    assert limit_seconds(sweep_with(Budget(usd=10), resources), 2.0) == pytest.approx(4500)


def test_within_the_limit_all_go_on():
    found = governor(1000)
    found.begin("one", 0)
    found.advance("one", 10, 100, 10)
    found.advance("one", 20, 100, 20)
    assert found.allowed(20) is None


def test_what_earlier_runs_spent_counts():
    found = governor(1000, gone=600.0, other=395.0)
    found.begin("base", 0)
    assert found.spent(3) == 998
    assert found.allowed(3) == frozenset()


def test_the_least_important_is_stopped_when_those_above_need_what_is_left():
    found = governor(300)
    for name in ("two", "base", "one"):
        found.begin(name, 0)
        found.advance(name, 10, 100, 10)
        found.advance(name, 20, 100, 20)  # each needs 80 more
    assert found.allowed(20) == {"base", "one"}
    found.end("two", 21)
    assert found.allowed(22) == {"base", "one"}


def test_the_most_important_goes_on_until_nothing_is_left():
    found = governor(100)
    found.begin("base", 0)
    found.advance("base", 1, 100, 10)
    found.advance("base", 2, 100, 20)
    assert found.allowed(20) == {"base"}
    assert found.allowed(99 - RESERVE_SECONDS) == {"base"}
    assert found.allowed(100 - RESERVE_SECONDS) == frozenset()


def test_nothing_starts_once_something_was_stopped():
    found = governor(100)
    found.begin("one", 0)
    assert found.allowed(95) == frozenset()
    found.end("one", 96)
    found.begin("base", 96)
    assert found.allowed(96) == frozenset()


def test_a_second_attempt_pays_for_both():
    found = governor(1000)
    found.begin("base", 0)
    found.begin("base", 40)
    found.end("base", 50)
    assert found.spent(60) == 50
