"""`search:` of a sweep file: what it may say, and how its suggestions become arms."""

import json
from pathlib import Path

import pytest
import yaml

from knet_core import ConfigError
from knet_platform.budget import limit_seconds
from knet_platform.cli.main import main
from knet_platform.errors import StorageError
from knet_platform.forecast import look_up, make_forecast
from knet_platform.planning import LargeSweepError, load_sweep
from knet_platform.prices import Price
from knet_platform.report import build_report
from knet_platform.search import Dimension
from knet_platform.storage import Store
from knet_platform.suggestions import recall, record, with_suggestions

SPACE = {
    "optim.lr": {"log_uniform": [1e-5, 1e-3]},
    "model.num_kernels": {"choice": [50, 100]},
    "model.stages": {"integer": [1, 3]},
}
SEARCH = {"name": "optuna", "trials": 4, "space": SPACE}
GOOD = {
    "name": "tuned",
    "base": "recipe.yaml",
    "metric": {"name": "val/AP", "mode": "max"},
    "baseline": "published",
    "arms": {"published": {}},
    "search": SEARCH,
}
FIRST = {"optim.lr": 0.0002, "model.num_kernels": 50, "model.stages": 2}
SECOND = {"optim.lr": 0.0001, "model.num_kernels": 100, "model.stages": 1}
NAME = "optim.lr=0.0002,model.num_kernels=50,model.stages=2"
FREE = Price(
    usd_per_hour=0.0, trials_per_instance=1.0, gpu="", gpu_memory_gb=0.0, basis="", assumed=True
)


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a searching sweep beside a small recipe."""
    (tmp_path / "recipe.yaml").write_text("data: {format: shapes}\ntrain: {iterations: 10}\n")

    def write(**changes: object) -> Path:
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(GOOD | changes, sort_keys=False))
        return path

    return write


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "storage"))


def problems_of(path: Path, **arguments) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_sweep(path, **arguments)
    return [line.removeprefix(f"{path}: ") for line in caught.value.problems]


@pytest.fixture
def finish(store, finished):
    """Return a function that gives a trial its result."""

    def finish(trial_hash: str, ap: float) -> None:
        store.trial(trial_hash).write_result(finished(trial_hash, metrics={"val/AP": ap}))

    return finish


def test_a_search_starts_with_the_arms_of_its_file(write):
    sweep = load_sweep(write())
    assert sweep.arms == ("published",)
    assert sweep.search.spec.space["optim.lr"] == Dimension(
        kind="log_uniform", values=(1e-5, 1e-3)
    )
    assert (sweep.search.spec.trials, sweep.search.spec.seed, sweep.search.to_come) == (4, 0, 4)
    assert (len(sweep.trials), sweep.num_trials) == (1, 5)
    assert any(note.startswith("optuna searches optim.lr, model.num") for note in sweep.notes)
    assert load_sweep(write(search=None)).search is None


def test_all_problems_of_a_search_are_reported_at_once(write):
    space = {
        "optim.lr": {"log_uniform": [0, 1]},
        "optim.lrr": {"uniform": [0, 1]},
        "loss.mask": {"uniform": [2, 1]},
        "loss.cls": {"normal": [2, 1]},
        "model.stages": {"integer": [1, 2.5]},
        "model.num_kernels": {"choice": [50, 50]},
        "model.channels": {"choice": 64},
    }
    path = write(search={"name": "bayes", "trials": 0, "seed": -1, "space": space, "time": 3})
    assert problems_of(path) == [
        "search.time: unknown key; expected name, trials, seed, space",
        "search.name: expected optuna, got 'bayes'",
        "search.trials: expected an integer >= 1, got 0",
        "search.seed: expected an integer >= 0, got -1",
        "search.space.optim.lr: expected a low end > 0, got 0",
        "search.space.loss.mask: expected [low, high], two numbers, got [2, 1]",
        "search.space.loss.cls: expected {uniform: [low, high]}, {log_uniform: ...}, "
        "{integer: ...} or {choice: [a, b]}, got {'normal': [2, 1]}",
        "search.space.model.stages: expected [low, high], two integers, got [1, 2.5]",
        "search.space.model.num_kernels: expected different texts, numbers, true or false, at "
        "least two, got [50, 50]",
        "search.space.model.channels: expected a list of values, got 64",
        "search.space: optim.lrr: unknown key; did you mean 'optim.lr'?",
    ]


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        (3, "search: expected keys below it, got 3"),
        ({"space": None}, "search.space: expected {key: {uniform: [low, high]}}, got None"),
        ({"space": {"seed": {"integer": [0, 9]}}}, "search.space: seed: every arm runs with"),
        ({"space": {"model.stages": {"integer": [0, 3]}}}, "search.space: model.stages: must be"),
        ({"space": {"optim.lr": {"choice": ["a", "b"]}}}, "optim.lr: expected float, got 'a'"),
        (
            {"space": {"train.batch_size": {"choice": [16, 17]}}},
            "search.space: train.batch_size=17: train.batch_size: 17 images cannot be shared",
        ),
        (
            {"space": {"model.backbone.name": {"choice": ["a/b", "c"]}}},
            "search.space: 'model.backbone.name=a/b' cannot name a run",
        ),
        (
            {"space": {f"loss.{key}": {"uniform": [0, 1]} for key in ("mask", "dice", "cls")}
             | {"model.backbone.name": {"choice": ["x" * 60, "y"]}}},
            "cannot name a run",
        ),
    ],
)  # fmt: skip
def test_each_mistake_has_its_line(write, search, expected):
    stated = SEARCH | search if isinstance(search, dict) else search
    found = problems_of(write(search=stated, resources={"workers": 2}))
    assert any(expected in line for line in found), found


def test_what_is_searched_cannot_be_overridden(write):
    assert problems_of(write(), overrides=["optim.lr=1"]) == [
        "command line: optim.lr: is what search.space varies; leave it out"
    ]


def test_a_suggestion_is_the_trial_that_an_arm_with_its_settings_is(write):
    searched = with_suggestions(load_sweep(write(seeds=[3, 1])), [FIRST])
    listed = load_sweep(write(seeds=[3, 1], search=None, arms={"published": {}, "a": FIRST}))
    assert [trial.name for trial in searched.trials] == [
        "published/3", f"{NAME}/3", "published/1", f"{NAME}/1",
    ]  # fmt: skip
    assert [t.hash for t in searched.trials] == [t.hash for t in listed.trials]
    assert searched.trials[1].overrides == FIRST
    assert (searched.search.to_come, searched.num_trials) == (3, 10)


def test_a_suggestion_made_twice_is_one_arm_and_counts_twice(write):
    sweep = with_suggestions(load_sweep(write()), [FIRST, SECOND, FIRST])
    assert len(sweep.arms) == 3
    assert sweep.search.to_come == 1


def test_a_suggestion_that_cannot_be_trained_is_noted_and_counted(write):
    space = {"train.batch_size": {"choice": [4, 8]}, "train.micro_batch": {"choice": [2, 4]}}
    path = write(search=SEARCH | {"space": space}, resources={"workers": 2})
    sweep = with_suggestions(load_sweep(path), [{"train.batch_size": 4, "train.micro_batch": 4}])
    assert sweep.arms == ("published",)
    assert sweep.search.to_come == 3
    assert sweep.notes[-1].startswith("suggested but not possible: train.batch_size=4,train.micro")


def test_suggestions_are_kept_in_the_store_under_what_they_follow_from(write, store):
    sweep = with_suggestions(load_sweep(write()), [FIRST, SECOND])
    record(sweep, store)
    for same in ({"name": "renamed"}, {"search": SEARCH | {"trials": 9}}, {"seeds": [0, 1]}):
        assert recall(load_sweep(write(**same)), store).search.suggested == (FIRST, SECOND)
    other_space = SPACE | {"optim.lr": {"uniform": [1e-5, 1e-3]}}
    for other in (
        {"search": SEARCH | {"seed": 1}},
        {"search": SEARCH | {"space": other_space}},
        {"seeds": [1]},
        {"metric": {"name": "val/AP50", "mode": "max"}},
    ):
        assert recall(load_sweep(write(**other)), store).search.suggested == ()
    changed = load_sweep(write(), overrides=["train.iterations=11"])
    assert recall(changed, store).arms == ("published",)


def test_fewer_trials_show_the_first_suggestions(write, store):
    record(with_suggestions(load_sweep(write()), [FIRST, SECOND]), store)
    sweep = recall(load_sweep(write(search=SEARCH | {"trials": 1})), store)
    assert sweep.arms == ("published", NAME)
    assert sweep.search.to_come == 0


def test_a_damaged_record_is_named(write, store):
    sweep = load_sweep(write())
    store.search(sweep.search.id).write_bytes("suggestions.json", b"[{")
    with pytest.raises(StorageError, match=r"suggestions\.json: not valid JSON; delete it"):
        recall(sweep, store)


def test_a_fraction_is_set_as_its_arm_says(write):
    lr = Dimension(kind="log_uniform", values=(0.00012344, 0.1))
    assert lr.settle(0.0123456789) == 0.01235
    assert lr.settle(0.000123441) == 0.00012344  # never out of the range
    assert Dimension(kind="choice", values=(0.123456789, 1.0)).settle(0.123456789) == 0.123456789


def test_a_forecast_counts_what_is_not_known_yet(write, store, finish):
    sweep = load_sweep(write(seeds=[0, 1]))
    open_ended = make_forecast(sweep, look_up(sweep, store), FREE)
    space = {"train.iterations": {"integer": [1000, 3000]}}
    longer = load_sweep(write(seeds=[0, 1], search=SEARCH | {"space": space}))
    assert open_ended.seconds.low < open_ended.seconds.mid < open_ended.seconds.high
    assert make_forecast(longer, look_up(longer, store), FREE).seconds.mid > 50 * (
        open_ended.seconds.mid
    )
    both = with_suggestions(sweep, [FIRST, SECOND, FIRST, SECOND])
    for trial in both.trials:
        finish(trial.hash, 0.3)
    assert make_forecast(both, look_up(both, store), FREE).seconds.mid == 0
    assert limit_seconds(both, 1.0) is None


def test_the_plan_says_what_is_known_and_what_is_not(
    write, store, monkeypatch, capsys, tmp_path, finish
):
    monkeypatch.setenv("KNET_STORAGE", str(tmp_path / "storage"))
    sweep = with_suggestions(load_sweep(write()), [FIRST])
    record(sweep, store)
    finish(sweep.trials[0].hash, 0.3)
    assert main(["plan", str(write()), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [(row["arm"], row["state"]) for row in plan["trials"]] == [
        ("published", "finished"), (NAME, "new"),
    ]  # fmt: skip
    assert plan["search"] == {
        "id": sweep.search.id, "trials": 4, "suggested": 1, "to_come": 3,
    }  # fmt: skip
    assert main(["plan", str(write())]) == 0
    shown = capsys.readouterr().out
    assert "2 arms and 3 still to be suggested x 1 seeds = 5 trials" in shown
    assert "1 finished, 4 to run" in shown
    assert "3 suggestions are not known yet: counted as the mean of the ends" in shown


def test_large_searches_are_asked_about(write):
    with pytest.raises(LargeSweepError) as caught:
        load_sweep(write(search=SEARCH | {"trials": 3000}), seeds=2, most_trials=5000)
    assert caught.value.count == 6002


def test_a_report_lists_a_search_best_first(write, store, finish):
    sweep = with_suggestions(load_sweep(write()), [FIRST, SECOND])
    for trial, ap in zip(sweep.trials, (0.3, 0.2, 0.4), strict=True):
        finish(trial.hash, ap)
    arms = [row.arm for row in build_report(sweep, store).rows]
    assert arms == [sweep.arms[2], "published", sweep.arms[1]]
