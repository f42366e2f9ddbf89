"""Who copies whom, what a member then follows, and what may be a population; no cluster needed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from knet_core import ConfigError, data_fingerprint
from knet_platform.identity import trial_hash
from knet_platform.planning import load_sweep
from knet_platform.population import Copy, Population
from knet_platform.storage import Failure, Store
from knet_platform.sweep import Sweep
from knet_platform.sweep_file import Pbt

RATES = {"slow": 1e-4, "good": 1e-3, "fine": 2e-3, "fast": 1e-1}
GOOD = {
    "name": "bred",
    "base": "recipe.yaml",
    "metric": {"name": "val/AP", "mode": "max"},
    "baseline": "plain",
    "arms": {"plain": {}, **{name: {"optim.lr": rate} for name, rate in RATES.items()}},
    "scheduler": {"name": "pbt", "quantile": 0.25},
}
AT_TEN = {"slow": 0.1, "good": 0.4, "fine": 0.3, "fast": 0.0}


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Sweep]:
    (tmp_path / "recipe.yaml").write_text(
        "data: {format: shapes}\ntrain: {iterations: 40, batch_size: 4, eval_every: 10}\n"
    )

    def load(**changes: Any) -> Sweep:
        path = tmp_path / "bred.yaml"
        path.write_text(yaml.safe_dump(GOOD | changes, sort_keys=False))
        return load_sweep(path)

    return load


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "storage"))


@pytest.fixture
def reach(load, store, save) -> Callable[..., None]:
    """Return a function that brings members to a step, with values."""

    def reach(step: int, values: dict[str, float]) -> None:
        for trial in load().trials:
            if trial.arm in values:
                save(store.trial(trial.hash), step, values[trial.arm])

    return reach


def shown(population: Population, copies: list[Copy]) -> list[tuple[str, str, int, float]]:
    arm = {trial_hash: trial.arm for trial_hash, trial in population.members.items()}
    return [(arm[c.member], arm[c.source], c.step, c.factor) for c in copies]


def test_the_baseline_is_no_member_and_members_are_no_plain_trials(load):
    sweep, plain = load(), load(scheduler="fifo")
    assert sweep.population == Pbt(quantile=0.25)
    assert sweep.trials[0] == plain.trials[0]
    hashes = [{trial.hash for trial in item.trials[1:]} for item in (sweep, plain)]
    assert len(hashes[0] | hashes[1]) == 8
    assert sweep.notes[-1].startswith("pbt trains all arms but the baseline in step; every 1")


@pytest.mark.parametrize(
    "change",
    [
        {"scheduler": {"name": "pbt", "factor": 2}},
        {"arms": GOOD["arms"] | {"more": {"optim.lr": 0.5}}},
        {"metric": {"name": "val/AP50", "mode": "max"}},
        {"seeds": [1]},
    ],
)
def test_a_member_is_another_one_in_another_population(load, change):
    ours, theirs = ({trial.arm: trial.hash for trial in load(**c).trials} for c in ({}, change))
    assert not {ours[arm] for arm in RATES} & {theirs[arm] for arm in RATES}
    renamed = load(name="renamed", baseline="plain")
    assert {trial.arm: trial.hash for trial in renamed.trials} == ours


def test_a_member_equal_to_the_baseline_is_another_run(load):
    sweep = load(arms=GOOD["arms"] | {"plain": {"optim.lr": 1e-3}})
    assert len(sweep.distinct_trials) == 5
    assert not any("same run" in note for note in sweep.notes)


def test_the_worst_goes_on_from_the_best_by_its_schedule_at_another_rate(load, store, reach):
    population = Population(load(), store)
    assert population.evaluations == 1
    reach(10, {name: value for name, value in AT_TEN.items() if name != "slow"})
    assert population.judge() is None
    assert [trial.arm for trial in population.waiting()] == ["slow"]
    reach(10, AT_TEN)
    copies = population.judge()
    factor = copies[0].factor
    assert shown(population, copies) == [("fast", "good", 10, factor)]
    assert factor in (1.25, 0.8)
    assert population.evaluations == 2
    recipes = {population.members[h].arm: recipe for h, recipe in population.recipes().items()}
    began = {trial.arm: trial.recipe for trial in population.members.values()}
    assert {name: recipes[name] for name in RATES if name != "fast"} == {
        name: began[name] for name in RATES if name != "fast"
    }
    optim = recipes["fast"].optim
    assert (optim.lr, optim.rescale_at, optim.rescale_by) == (1e-3, (10,), (factor,))


def test_a_population_that_was_killed_carries_its_copies_out_and_decides_the_same(
    load, store, reach
):
    reach(10, AT_TEN)
    decided = Population(load(), store).judge()
    again = Population(load(), store)
    assert again.evaluations == 2
    fast, good = (store.trial(getattr(decided[0], name)) for name in ("member", "source"))
    for _ in range(2):  # also where it is killed after a copy
        again.spread()
        names = [folder.read_bytes("checkpoint_10/state.json") for folder in (fast, good)]
        assert names[0] == names[1]
    reach(20, {"fast": 0.9})
    again.spread()  # it has trained on since
    assert fast.latest_step() == 20
    reach(20, AT_TEN)
    second = again.judge()
    assert shown(again, second)[0][:3] == ("fast", "good", 20)
    member = again.recipes()[decided[0].member].optim
    assert member.rescale_at == (20,)  # it is good's schedule now, not its own
    assert Population(load(), store).recipes() == again.recipes()
    (note,) = again.notes()
    assert note.startswith("fast went on from good at step 10 (its rate x ")
    assert "good at step 20" in note


def test_a_member_that_is_no_worse_than_the_best_keeps_its_own(load, store, reach):
    reach(10, dict.fromkeys(AT_TEN, 0.0))
    population = Population(load(), store)
    assert population.judge() == []
    assert population.evaluations == 2
    assert population.recipes() == {h: trial.recipe for h, trial in population.members.items()}


def test_what_a_member_follows_is_a_recipe_like_any_other(load, store, reach, tmp_path):
    reach(10, AT_TEN)
    population = Population(load(), store)
    (copy,) = population.judge()
    followed = population.recipes()[copy.member]
    folder = store.trial(copy.member)
    folder.write_schedule(followed)
    (tmp_path / "schedule.yaml").write_bytes(folder.read_bytes("schedule.yaml"))
    sweep = load(scheduler="fifo", base="schedule.yaml", arms={"plain": {}}, seeds=[0, 1])
    assert sweep.trials[0].recipe == followed
    assert sweep.trials[0].hash == trial_hash(followed, data_fingerprint(followed.data))
    assert sweep.trials[1].recipe == replace(followed, seed=1)


def test_members_that_failed_or_measured_nothing_neither_copy_nor_are_copied(load, store, reach):
    reach(10, AT_TEN | {"good": float("nan")})
    population = Population(load(), store)
    fast = next(h for h, trial in population.members.items() if trial.arm == "fast")
    store.trial(fast).write_failure(
        Failure(cause="non_finite", kind="E", message="", action="", attempt=1, step=10)
    )
    (copy,) = population.judge()
    assert shown(population, [copy])[0][:3] == ("slow", "fine", 10)


def test_a_population_ends_with_its_members(load, store, reach, finished):
    population = Population(load(), store)
    for member in population.members:
        store.trial(member).write_failure(
            Failure(cause="non_finite", kind="E", message="", action="", attempt=1, step=0)
        )
    assert population.judge() is None  # nothing is left to go on with
    reach(10, AT_TEN)
    for member in population.members:
        store.trial(member).write_result(finished(member))
    assert population.waiting() == []
    assert population.judge() is None


def test_all_problems_of_a_population_are_reported_at_once(load, tmp_path):
    wrong = {"name": "pbt", "evaluations": 0, "quantile": 0.6, "factor": 1, "pace": 3}
    with pytest.raises(ConfigError) as caught:
        load(scheduler=wrong)
    lines = [line.removeprefix(f"{tmp_path}/bred.yaml: ") for line in caught.value.problems]
    assert sorted(lines) == [
        "scheduler.evaluations: expected an integer >= 1, got 0",
        "scheduler.factor: expected a number > 1, got 1",
        "scheduler.pace: unknown key; expected name, evaluations, quantile, factor, seed",
        "scheduler.quantile: expected a share > 0, at most 0.5, got 0.6",
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seeds": [0, 1]}, "expected one seed (--seeds 1): each population"),
        ({"arms": {"plain": {}, "a": {}}}, "expected at least two arms beside the baseline"),
        (
            {"arms": {"plain": {}, "a": {}, "b": {"model.stages": 1}}},
            "arm b differs from a in more than optim.lr",
        ),
        (
            {"arms": GOOD["arms"] | {"slow": {"optim.rescale_at": [5], "optim.rescale_by": [2]}}},
            "optim.rescale_at is what it looks for",
        ),
        (
            {"search": {
                "name": "optuna", "trials": 2, "space": {"optim.lr": {"uniform": [1e-4, 1e-3]}},
            }},
            "expected no search: beside it",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_a_population_is_refused(load, changes, expected):
    with pytest.raises(ConfigError) as caught:
        load(**changes)
    assert any(f"scheduler: pbt: {expected}" in line for line in caught.value.problems)
