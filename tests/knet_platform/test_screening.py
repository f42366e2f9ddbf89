"""Which arms a screen stops, and what a sweep leaves alone after it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from knet_platform.planning import load_sweep
from knet_platform.screening import Screen, screened_out
from knet_platform.storage import Evaluation, Pruned, Store, TrialResult
from knet_platform.sweep import Sweep, Trial

RECIPE = "data: {format: shapes}\ntrain: {iterations: 100, batch_size: 4}\n"
SWEEP = """\
name: s
base: recipe.yaml
metric: {name: val/AP, mode: max}
baseline: base
seeds: [3, 0]
scheduler: {name: asha, grace: 0.2, reduction_factor: 2}
arms:
  base: {}
  good: {model.stages: 1}
  poor: {model.stages: 2}
  late: {model.stages: 4, train.iterations: 1000}
"""


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "s.yaml").write_text(SWEEP)
    return load_sweep(tmp_path / "s.yaml")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "storage"))


def of(sweep: Sweep, name: str) -> Trial:
    return next(trial for trial in sweep.trials if trial.name == name)


def at(step: int, ap: float) -> Evaluation:
    return Evaluation(step=step, time=0.0, metrics={"val/AP": ap, "val/AP50": 1.0})


def rejected(screen: Screen, trial: Trial, step: int, ap: float, total: int = 100) -> bool:
    return screen.rejects(trial, [at(step, ap)], total)


def test_the_lower_part_is_stopped_at_each_milestone_and_not_between(sweep: Sweep) -> None:
    screen, good, poor = Screen(sweep), of(sweep, "good/3"), of(sweep, "poor/3")
    assert not rejected(screen, good, 20, 0.4)
    assert not rejected(screen, poor, 10, 0.1)  # before the grace
    assert not rejected(screen, poor, 20, 0.5)  # above the median
    assert not rejected(screen, poor, 30, 0.0)  # passed this milestone, not yet the next
    assert not rejected(screen, good, 40, 0.5)
    assert rejected(screen, poor, 41, 0.3)


def test_lower_is_better_where_the_sweep_says_so(sweep: Sweep) -> None:
    sweep = replace(sweep, metric=replace(sweep.metric, mode="min"))
    screen = Screen(sweep)
    assert not rejected(screen, of(sweep, "good/3"), 20, 0.1)
    assert rejected(screen, of(sweep, "poor/3"), 20, 0.4)


def test_the_baseline_counts_but_is_never_stopped(sweep: Sweep) -> None:
    screen = Screen(sweep)
    assert not rejected(screen, of(sweep, "good/3"), 20, 0.4)
    assert not rejected(screen, of(sweep, "base/3"), 20, 0.1)
    assert not rejected(screen, of(sweep, "poor/3"), 20, 0.3)  # above the two's median


def test_arms_of_other_lengths_are_judged_at_the_same_share(sweep: Sweep) -> None:
    screen = Screen(sweep)
    assert not rejected(screen, of(sweep, "good/3"), 20, 0.4)
    assert not rejected(screen, of(sweep, "late/3"), 100, 0.1, total=1000)
    assert rejected(screen, of(sweep, "late/3"), 200, 0.1, total=1000)


def test_other_seeds_the_last_step_and_values_without_meaning_are_not_judged(
    sweep: Sweep,
) -> None:
    screen = Screen(sweep)
    assert not rejected(screen, of(sweep, "good/3"), 20, 0.4)
    assert not rejected(screen, of(sweep, "good/3"), 80, 0.4)
    assert not rejected(screen, of(sweep, "poor/0"), 20, 0.1)
    assert not rejected(screen, of(sweep, "poor/3"), 20, float("nan"))
    assert not rejected(screen, of(sweep, "poor/3"), 100, 0.1)


def test_a_sweep_that_continues_compares_with_what_was_measured_before(
    sweep: Sweep, store: Store, finished: Callable[..., TrialResult]
) -> None:
    good, poor = of(sweep, "good/3"), of(sweep, "poor/3")
    store.trial(good.hash).write_result(finished(good.hash, evaluations=(at(20, 0.4),)))
    screen = Screen(sweep)
    screen.recall(store)
    assert rejected(screen, poor, 20, 0.1)


def test_no_seed_of_a_pruned_arm_is_run_in_that_sweep(sweep: Sweep, store: Store) -> None:
    pruned = Pruned(sweep="s", run="r", step=20, total=100)
    store.trial(of(sweep, "poor/3").hash).write_pruned(pruned)
    left = {trial.name for trial in sweep.trials if screened_out(sweep, store, trial) == pruned}
    assert left == {"poor/3", "poor/0"}
    for other in (replace(sweep, scheduler=None), replace(sweep, name="other")):
        assert not any(screened_out(other, store, trial) for trial in other.trials)
