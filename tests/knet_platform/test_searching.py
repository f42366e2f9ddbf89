"""What a search tries next, and in which order Tune is handed its trials; no cluster needed."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from ray.tune.search import Searcher

from knet_platform.planning import load_sweep
from knet_platform.search import Dimension, SearchSpec
from knet_platform.searching import Point, Suggester, propose, read_point
from knet_platform.storage import Pruned, Store, TrialResult
from knet_platform.suggestions import recall, with_suggestions
from knet_platform.sweep import Sweep, Trial
from knet_platform.sweep_file import Asha

LR = Dimension(kind="log_uniform", values=(1e-5, 1e-1))
SPEC = SearchSpec(trials=40, seed=0, space={"optim.lr": LR})
SWEEP = """\
name: tuned
base: recipe.yaml
metric: {name: val/AP, mode: max}
baseline: base
arms: {base: {}}
search:
  name: optuna
  trials: 6
  space: {optim.lr: {log_uniform: [1.0e-5, 1.0e-1]}}
"""


def points(*values: tuple[float, float | None]) -> list[Point]:
    return [Point(settings={"optim.lr": lr}, value=value) for lr, value in values]


def test_a_proposal_follows_from_the_seed_its_number_and_what_is_known():
    known = points((0.01, 0.5), (0.001, 0.2))
    first = propose(SPEC, "max", known, 2)
    assert propose(SPEC, "max", known, 2) == first
    assert propose(SPEC, "max", known, 3) != first
    other = SearchSpec(trials=40, seed=1, space=SPEC.space)
    assert propose(other, "max", known, 2) != first
    assert LR.settle(first["optim.lr"]) == first["optim.lr"]


@pytest.mark.parametrize(("mode", "sign"), [("max", -1), ("min", 1)])
def test_proposals_gather_where_results_are_best(mode, sign):
    rates = [10 ** (-1 - 4 * step / 39) for step in range(40)]
    known = points(*((lr, sign * abs(math.log10(lr) + 3)) for lr in rates))  # best at 0.001
    tried = [propose(SPEC, mode, known, 100 + n)["optim.lr"] for n in range(8)]
    assert sum(2e-4 < lr < 5e-3 for lr in tried) >= 6


def test_what_runs_is_not_tried_again():
    """The results say 3; what runs with 3 keeps from it."""
    space = {"model.stages": Dimension(kind="choice", values=(1, 2, 3))}
    spec = SearchSpec(trials=40, seed=0, space=space)
    known = [Point(settings={"model.stages": n % 3 + 1}, value=n % 3 / 2) for n in range(21)]
    running = [Point(settings={"model.stages": 3}, value=None)] * 40
    alone = [propose(spec, "max", known, n)["model.stages"] for n in range(20)]
    beside = [propose(spec, "max", known + running, n)["model.stages"] for n in range(20)]
    assert beside.count(3) < alone.count(3)


def test_what_a_screen_stopped_counts_as_worse_than_what_passed():
    passed = points(*((10**-exponent, 0.5) for exponent in (4.0, 4.1, 4.2, 4.3, 3.9, 3.8)))
    stopped = [
        Point(settings={"optim.lr": 10**-exponent}, value=0.9, curve=(0.8, 0.9))
        for exponent in (1.1, 1.2, 1.3, 1.4, 1.5, 1.6)
    ]
    tried = [propose(SPEC, "max", passed + stopped, 100 + n)["optim.lr"] for n in range(8)]
    assert sum(lr < 2e-3 for lr in tried) >= 6


@dataclass
class Tune:
    """Takes trials of a search as Tune does, and finishes them as the test says."""

    sweep: Sweep
    store: Store
    finished: Callable[..., TrialResult]
    may_suggest: bool = True
    started: list[Trial] = field(default_factory=list)
    reused: list[Trial] = field(default_factory=list)

    def suggester(self) -> Suggester:
        done = {t.hash for t in self.sweep.trials if self.store.trial(t.hash).result()}
        return Suggester(
            self.sweep,
            [trial for trial in self.sweep.trials if trial.hash not in done],
            self.store,
            start=self._start,
            reuse=self.reused.append,
            may_suggest=lambda: self.may_suggest,
        )

    def _start(self, trial: Trial) -> dict[str, str]:
        self.started.append(trial)
        return {"trial": trial.hash}

    def run(self, *, at_most: int = 99, end: Callable[[Trial], None] | None = None) -> Sweep:
        """Run one trial after another; the last of `at_most` never ends."""
        suggester = self.suggester()
        for number in range(at_most):
            if suggester.suggest(str(number)) == Searcher.FINISHED:
                break
            if number + 1 == at_most:
                break
            (end or self.finish)(self.started[-1])
            suggester.on_trial_complete(str(number))
        return suggester.sweep

    def finish(self, trial: Trial, ap: float | None = None) -> None:
        """Give a trial its result: the better, the nearer its rate is to 0.01."""
        value = 0.01 / (0.01 + abs(trial.recipe.optim.lr - 0.01)) if ap is None else ap
        result = self.finished(trial.hash, metrics={"val/AP": value})
        self.store.trial(trial.hash).write_result(result)


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Sweep]:
    (tmp_path / "recipe.yaml").write_text("data: {format: shapes}\ntrain: {iterations: 100}\n")
    path = tmp_path / "tuned.yaml"
    path.write_text(SWEEP)
    return lambda **arguments: load_sweep(path, **arguments)


@pytest.fixture
def tune(
    load: Callable[..., Sweep], finished: Callable[..., TrialResult]
) -> Callable[[Path], Tune]:
    """Return what starts or continues the search whose store is that folder."""

    def start(folder: Path) -> Tune:
        store = Store(str(folder))
        return Tune(recall(load(), store), store, finished)

    return start


def test_known_trials_come_first_then_as_many_suggestions_as_asked_for(tune, load, tmp_path):
    one = tune(tmp_path / "one")
    sweep = one.run()
    assert [trial.arm for trial in one.started] == list(sweep.arms)
    assert sweep.arms[0] == "base"
    assert len(sweep.arms) == 7
    assert sweep.search.to_come == 0
    assert recall(load(), one.store) == sweep


@pytest.mark.parametrize("ended", [1, 2, 5])
def test_a_search_that_was_killed_ends_as_if_it_had_not_been(tune, load, tmp_path, ended):
    whole = tune(tmp_path / "whole")
    expected = whole.run()
    killed = tune(tmp_path / "killed")
    killed.run(at_most=ended)
    later = tune(tmp_path / "killed")
    assert later.run() == expected
    assert later.started[0] == killed.started[-1]  # the one under way goes on, before any other
    again = [trial.hash for trial in (*killed.started[:-1], *later.started)]
    assert len(set(again)) == len(again)  # and nothing that was finished runs again


def test_a_suggestion_that_another_sweep_has_run_is_not_run_again(tune, load, tmp_path):
    other = tune(tmp_path / "other")
    third = other.run().trials[3]
    here = tune(tmp_path / "here")
    here.finish(third)
    assert here.run() == recall(load(), other.store)
    assert here.reused == [third]
    assert third not in here.started


def test_nothing_is_suggested_once_the_budget_is_spent(tune, load, tmp_path):
    poor = tune(tmp_path)
    poor.may_suggest = False
    assert poor.run().search.to_come == 6
    assert [trial.arm for trial in poor.started] == ["base"]
    assert recall(load(), poor.store).search.suggested == ()


def test_trials_that_failed_or_were_measured_as_nothing_do_not_mislead(tune, load, tmp_path):
    one = tune(tmp_path)

    def end(trial: Trial) -> None:
        if len(one.started) % 2:
            one.finish(trial, float("nan"))

    assert len(one.run(end=end).arms) == 7


def test_what_a_screen_stopped_is_told_with_its_curve(tune, load, tmp_path):
    settings = {"optim.lr": 0.1}
    sweep = replace(with_suggestions(load(), [settings]), scheduler=Asha())
    store, trial = Store(str(tmp_path)), sweep.trials[1]
    folder = store.trial(trial.hash)
    assert read_point(sweep, store, trial, settings) is None  # failed before it measured anything
    evaluations = [{"step": s, "time": 0.0, "metrics": {"val/AP": s / 100}} for s in (20, 40)]
    state = {
        "format": 1, "step": 40, "epoch": 1.0, "categories": [], "metrics": {},
        "evaluations": evaluations, "seconds": 1.0, "num_parameters": 1,
    }  # fmt: skip
    for name in ("model.safetensors", "trainer.pt", "recipe.yaml", "state.json"):
        folder.write_bytes(f"checkpoint_40/{name}", json.dumps(state).encode())
    folder.write_pruned(Pruned(sweep="tuned", run="r", step=40, total=100))
    expected = Point(settings=settings, value=0.4, curve=(0.2, 0.4))
    assert read_point(sweep, store, trial, settings) == expected
