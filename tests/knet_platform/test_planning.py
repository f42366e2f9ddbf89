"""A sweep file in, trials out; or every problem of the file at once."""

from pathlib import Path

import pytest
import yaml

from knet_core import ConfigError, DataError
from knet_platform.planning import load_sweep, worker_counts
from knet_platform.sweep_file import Asha, Resources

ROOT = Path(__file__).parents[2]
STAGES = ROOT / "sweeps" / "stages.yaml"
SHAPES = [f"data={ROOT}/sweeps/data/shapes.yaml"]

GOOD = {
    "name": "mine",
    "base": "recipe.yaml",
    "metric": {"name": "val/AP", "mode": "max"},
    "seeds": [0, 1],
    "baseline": "three",
    "arms": {"one": {"model.stages": 1}, "three": {}},
}


@pytest.fixture
def sweep(tmp_path):
    """Return a function that writes a sweep beside a small recipe."""
    (tmp_path / "recipe.yaml").write_text("data: {format: shapes}\ntrain: {iterations: 10}\n")

    def write(without: str = "", **changes: object) -> Path:
        values = {key: value for key, value in (GOOD | changes).items() if key != without}
        path = tmp_path / "sweep.yaml"
        path.write_text("# A title\n" + yaml.safe_dump(values, sort_keys=False))
        return path

    return write


def problems_of(path: Path, **arguments) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_sweep(path, **arguments)
    return [line.removeprefix(f"{path}: ") for line in caught.value.problems]


def test_every_arm_runs_with_every_seed(sweep):
    loaded = load_sweep(sweep())
    assert (loaded.name, loaded.title, loaded.baseline) == ("mine", "A title", "three")
    assert [trial.name for trial in loaded.trials] == ["one/0", "three/0", "one/1", "three/1"]
    assert [trial.recipe.seed for trial in loaded.trials] == [0, 0, 1, 1]
    assert [trial.recipe.model.stages for trial in loaded.trials] == [1, 3, 1, 3]
    assert loaded.trials[0].overrides == {"model.stages": 1}
    assert len({trial.hash for trial in loaded.trials}) == 4
    assert all(len(trial.hash) == 16 for trial in loaded.trials)


def test_seeds_can_be_counted_instead(sweep):
    assert load_sweep(sweep(), seeds=3).seeds == (0, 1, 2)
    assert problems_of(sweep(), seeds=0) == ["command line: --seeds: expected at least 1, got 0"]


def test_the_same_run_in_another_sweep_is_the_same_trial(sweep):
    first = load_sweep(sweep()).trials
    other = load_sweep(
        sweep(name="other", baseline="a", arms={"a": {}, "b": {"model.stages": 2}})
    ).trials
    assert first[1].hash == other[0].hash


@pytest.mark.parametrize("same", ["data.num_workers=5", "train.log_every=1"])
def test_what_cannot_change_a_result_does_not_change_the_hash(sweep, same):
    assert (
        load_sweep(sweep()).trials[0].hash == load_sweep(sweep(), overrides=[same]).trials[0].hash
    )


def test_where_the_data_lies_does_not_change_the_hash(sweep, tmp_path):
    def trial_hash(folder: Path) -> str:
        for split in ("train", "val"):
            (folder / split).mkdir(parents=True)
            (folder / "annotations").mkdir(exist_ok=True)
            (folder / "annotations" / f"instances_{split}.json").write_text("{}")
        overrides = ["data.format=coco", f"data.root={folder}"]
        return load_sweep(sweep(), overrides=overrides).trials[0].hash

    assert trial_hash(tmp_path / "here") == trial_hash(tmp_path / "there")


@pytest.mark.parametrize("other", ["train.iterations=11", "data.shapes.seed=1", "optim.lr=1"])
def test_what_can_change_a_result_changes_the_hash(sweep, other):
    assert (
        load_sweep(sweep()).trials[0].hash != load_sweep(sweep(), overrides=[other]).trials[0].hash
    )


def test_a_grid_expands_to_named_arms(sweep):
    loaded = load_sweep(
        sweep(
            without="arms",
            baseline="model.stages=1,model.interaction=true",
            grid={"model.stages": [1, 2], "model.interaction": [True, False]},
        )
    )
    assert loaded.arms == (
        "model.stages=1,model.interaction=true",
        "model.stages=1,model.interaction=false",
        "model.stages=2,model.interaction=true",
        "model.stages=2,model.interaction=false",
    )


def test_a_scale_changes_recipe_seeds_and_resources_and_arms_win_over_it(sweep, tmp_path):
    (tmp_path / "scales").mkdir()
    (tmp_path / "scales/tiny.yaml").write_text(
        "recipe: {model: {stages: 2, channels: 64}}\nseeds: [7]\nresources: {workers: 2}\n"
    )
    loaded = load_sweep(sweep(resources={"cpus_per_worker": 2}), scale="tiny")
    assert [trial.recipe.model.stages for trial in loaded.trials] == [1, 2]
    assert loaded.trials[0].recipe.model.channels == 64
    assert loaded.seeds == (7,)
    assert loaded.resources == Resources(workers=2, cpus_per_worker=2)


def test_an_unknown_scale_names_those_that_exist():
    (found,) = problems_of(STAGES, scale="lapto")
    assert "which has laptop; did you mean 'laptop'?" in found


def test_problems_of_a_scale_file_name_it(sweep, tmp_path):
    scale = tmp_path / "s.yaml"
    scale.write_text("recipe: {model.stage: 1}\nseed: [0]\nseeds: []\nresources: {workers: 0}\n")
    assert [
        line.removeprefix(f"{scale}: ") for line in problems_of(sweep(), scale=str(scale))
    ] == [
        "seed: unknown key; did you mean 'seeds'?",
        "resources.workers: expected an integer >= 1, got 0",
        "seeds: expected a list with at least one seed, got []",
        "model.stage: unknown key; did you mean 'model.stages'?",
    ]


def test_of_many_arms_an_error_names_a_few(sweep):
    arms = {f"a{number}": {"model.stages": number} for number in range(8)}
    path = sweep(arms=arms, baseline="tree")
    assert problems_of(path) == [f"baseline: 'tree' is not an arm; arms are {', '.join(arms)}"]
    path = sweep(arms=arms | {"b": {}, "c": {"seed": 1}}, baseline="tree")
    assert problems_of(path)[0].endswith("a6, a7 and 2 more")


def test_all_problems_of_a_sweep_are_reported_at_once(sweep):
    path = sweep(
        basline="three",
        metric={"name": "val/APP", "mode": "best"},
        seeds=[0, 0],
        arms={"one": {"model.stage": 1}, "three": {}, "a/b": {"model.stages": 2}},
        baseline="tree",
        paper={"columns": {"val/AP": "AP", "AP": "AP"}, "rows": {"one": [1], "two": [1, 2]}},
        resources={"gpus": 1, "workers": 1.5},
    )
    assert problems_of(path) == [
        "basline: unknown key; did you mean 'baseline'?",
        "arms: 'a/b' cannot name a run and a folder; use letters, digits and . _ = , + - "
        "(not first), at most 120",
        "baseline: 'tree' is not an arm; arms are one, three, a/b; did you mean 'three'?",
        "metric.name: unknown metric 'val/APP'; did you mean 'val/AP'?",
        "metric.mode: expected min or max, got 'best'",
        "paper.columns: unknown metric 'AP'; did you mean 'val/AP'?",
        "paper.rows.one: expected 2 values, one per column, got [1]",
        "paper.rows.two: is not an arm",
        "resources.gpus: unknown key; expected workers, gpus_per_worker, cpus_per_worker, "
        "max_concurrent, hang_minutes, keep_best, instance, spot, price_per_gpu_hour",
        "resources.workers: expected an integer >= 1, got 1.5",
        "seeds: seed 0 is listed twice",
        "arms.one: model.stage: unknown key; did you mean 'model.stages'?",
    ]


def test_arms_that_are_the_same_run_are_trained_once_and_said_to_be(sweep):
    path = sweep(arms={"same": {"model.stages": 3}, "three": {}, "x": {"data.num_workers": 9}})
    loaded = load_sweep(path)
    (note,) = loaded.notes
    assert note.startswith("arms three, same, x are the same run: trained once")
    assert len(loaded.trials) == 6
    assert [trial.name for trial in loaded.distinct_trials] == ["three/0", "three/1"]


def test_an_override_that_makes_arms_equal_is_noted(sweep):
    (note,) = load_sweep(sweep(), overrides=["model.stages=2"]).notes
    assert "a key=value argument wins over arms" in note


@pytest.mark.parametrize(
    "added",
    [
        {"arms": GOOD["arms"] | {"two": {"model.stages": 2}}},
        {"seeds": [0, 1, 2]},
        {"arms": {"longer": {"train.iterations": 20}} | GOOD["arms"]},
    ],
)
def test_what_is_added_leaves_the_other_trials_as_they_are(sweep, added):
    before = {trial.name: trial.hash for trial in load_sweep(sweep()).trials}
    after = {trial.name: trial.hash for trial in load_sweep(sweep(**added)).trials}
    assert before.items() <= after.items()
    assert len(set(after.values())) == len(after)


def test_what_is_not_the_same_everywhere_is_refused_arm_by_arm(sweep):
    path = sweep(
        arms={
            "three": {"loss.mask": float("inf")},
            "one": {"data.format": "ade20k", "data.train.images": ["/home/me/images"]},
        }
    )
    first, second = problems_of(path)
    assert first.startswith("arms.three: loss.mask: inf equals nothing")
    assert second.startswith("arms.one: data.train.images: '/home/me/images' is a path of one")


def test_an_arm_may_name_its_own_recipe_and_the_scale_still_wins_over_it(sweep, tmp_path):
    (tmp_path / "deep.yaml").write_text(
        "base: recipe.yaml\nmodel: {stages: 5, num_kernels: 20}\ntrain: {iterations: 30}\n"
    )
    (tmp_path / "scales").mkdir()
    (tmp_path / "scales/tiny.yaml").write_text("recipe: {model: {num_kernels: 4}}\n")
    path = sweep(arms={"three": {}, "deep": {"base": "deep.yaml", "optim.lr": 1.0}})
    for scale, kernels in ((None, 20), ("tiny", 4)):
        _, deep = load_sweep(path, scale=scale, seeds=1).trials
        assert (deep.recipe.model.stages, deep.recipe.train.iterations) == (5, 30)
        assert deep.recipe.model.num_kernels == kernels
        assert deep.overrides == {"base": "deep.yaml", "optim.lr": 1.0}


def test_arms_may_be_other_ones_at_a_scale_and_only_there(sweep, tmp_path):
    scale = tmp_path / "tiny.yaml"
    scale.write_text("recipe: {model: {stages: 2}}\n")
    path = sweep(
        arms={"one": {"model.stages": 1, "optim.lr": 1.0}, "three": {}},
        scales={"tiny": {"one": {"model.stages": 5}}, "other": {"three": {"model.stages": 6}}},
    )
    assert [trial.recipe.model.stages for trial in load_sweep(path, seeds=1).trials] == [1, 3]
    one, three = load_sweep(path, scale=str(scale), seeds=1).trials
    assert (one.recipe.model.stages, one.recipe.optim.lr) == (5, 1.0)
    assert one.overrides == {"model.stages": 5, "optim.lr": 1.0}
    assert load_sweep(path, scale=str(scale), seeds=1).notes == (
        "arm one is another one at this scale: model.stages=5",
    )
    assert three.recipe.model.stages == 2
    over = load_sweep(path, scale=str(scale), seeds=1, overrides=["model.stages=4"])
    assert over.trials[0].recipe.model.stages == 4


def test_problems_of_an_arms_recipe_and_of_its_stand_ins_are_named(sweep, tmp_path):
    scale = tmp_path / "tiny.yaml"
    scale.write_text("recipe: {model: {stages: 2}}\n")
    path = sweep(
        arms={"one": {"base": 3}, "three": {}, "two": {"base": "gone.yaml"}},
        scales={"tiny": {"on": {}, "two": 5, "three": {"model.stage": 1}}, "big": 1},
    )
    assert problems_of(path, scale=str(scale)) == [
        "scales.tiny.on: is not an arm; did you mean 'one'?",
        "scales.tiny.two: expected {key: value}, got 5",
        "scales.big: expected {arm: {key: value}}, got 1",
        "arms.one.base: expected a recipe file beside the sweep, got 3",
        f"{tmp_path}/gone.yaml: cannot read the file (No such file or directory)",
        "scales.tiny.three: model.stage: unknown key; did you mean 'model.stages'?",
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"budget": {"usd": -3}}, "budget.usd: expected a number >= 0, got -3"),
        ({"budget": {"eur": 3}}, "budget.eur: unknown key"),
        ({"resources": {"spot": "yes"}}, "resources.spot: expected true or false, got 'yes'"),
        ({"resources": {"instance": 5}}, "resources.instance: expected an instance's name, got 5"),
        ({"scheduler": "ahsa"}, "scheduler: expected fifo, asha or pbt, got 'ahsa'"),
        ({"scheduler": 3}, "scheduler: expected fifo, asha or pbt, got 3"),
        ({"scheduler": {"grace": 0.5}}, "scheduler: expected fifo, asha or pbt, got None"),
        ({"scheduler": {"name": "fifo", "grace": 0.5}}, "scheduler.grace: unknown key"),
        ({"seeds": []}, "seeds: expected a list with at least one seed"),
        ({"seeds": ["a"]}, "seeds: expected integers >= 0, got 'a'"),
        ({"base": "gone.yaml"}, "gone.yaml: cannot read the file"),
        ({"metric": {"name": "val/AP", "mode": "min"}}, "metric.mode: got min, expected max"),
        ({"arms": {"three": {"seed": 3}, "one": {"model.stages": 1}}}, "a sweep runs every arm"),
        ({"arms": {}}, "arms: expected keys below it"),
        ({"grid": {"model.stages": 1}}, "grid.model.stages: expected a list of values, got 1"),
        ({"resources": {"workers": 3}}, "16 images cannot be shared equally"),
        ({"paper": {"rows": {}}}, "paper.columns: expected {metric: title}"),
    ],
)
def test_each_mistake_has_its_line(sweep, changes, expected):
    assert any(expected in line for line in problems_of(sweep(**changes)))


@pytest.mark.parametrize(
    ("workers", "train", "expected"),
    [
        ([8, 2], {}, "expected [least, most] with 1 <= least < most, got [8, 2]"),
        ([2, 2], {}, "expected [least, most] with 1 <= least < most, got [2, 2]"),
        ([2], {}, "expected [least, most] with 1 <= least < most, got [2]"),
        ([2, 8.0], {}, "expected [least, most] with 1 <= least < most, got [2, 8.0]"),
        ([2, 8], {}, "which stay the same for every number of resources.workers = [2, 8]; set "
         "train.micro_batch=2"),
        ([2, 3], {"batch_size": 12}, "set train.micro_batch=2"),
        ([2, 6], {"micro_batch": 2}, "16 images cannot be shared equally by resources."
         "workers = 6"),
        ([2, 8], {"micro_batch": 4}, "train.micro_batch: 4 does not divide the 2 images"),
        ([2, 8], {"micro_batch": 2, "sync_batch_norm": True}, "would change with the number of "
         "workers; expected one number of workers, or set train.sync_batch_norm=false"),
    ],
)  # fmt: skip
def test_what_an_elastic_trial_cannot_share_is_said_before_it_starts(
    sweep, workers, train, expected
):
    settings = {f"train.{key}": value for key, value in train.items()}
    path = sweep(arms={"one": settings, "three": settings}, resources={"workers": workers})
    assert any(expected in line for line in problems_of(path))


@pytest.mark.parametrize(
    ("workers", "micro_batch", "counts"),
    [([2, 8], 2, (2, 4, 8)), ([2, 8], 1, (2, 4, 8)), ([1, 4], 4, (1, 2, 4)), (4, None, (4,))],
)
def test_an_elastic_trial_has_the_numbers_of_workers_that_share_a_batch(
    sweep, workers, micro_batch, counts
):
    arms = {"one": {"train.micro_batch": micro_batch}, "three": {"train.micro_batch": micro_batch}}
    loaded = load_sweep(sweep(arms=arms, resources={"workers": workers}))
    assert worker_counts(loaded.trials[0].recipe, loaded.resources) == counts
    alone = load_sweep(sweep(arms=arms, resources={"workers": 1}))
    assert [trial.hash for trial in loaded.trials] == [trial.hash for trial in alone.trials]


def test_normalisation_is_synchronised_between_gpus_only(sweep):
    arms = {"arms": {"one": {"train.sync_batch_norm": True}, "three": {}}}
    assert problems_of(sweep(**arms, resources={"workers": 2})) == [
        "arms.one: train.sync_batch_norm: got true for resources.workers = 2 without GPUs, "
        "expected resources.gpus_per_worker > 0 or one worker; set train.sync_batch_norm=false"
    ]
    for resources in ({"workers": 1}, {"workers": 2, "gpus_per_worker": 1}):
        load_sweep(sweep(**arms, resources=resources))


def test_all_arms_run_in_full_unless_a_screen_is_asked_for(sweep):
    default = load_sweep(sweep())
    assert default.scheduler is None
    for scheduler in ("fifo", {"name": "fifo"}):
        assert load_sweep(sweep(scheduler=scheduler)) == default


def test_a_screen_changes_no_trial_and_is_noted(sweep):
    loaded = load_sweep(sweep(scheduler="asha", seeds=[4, 2]))
    assert loaded.scheduler == Asha()
    assert loaded.trials == load_sweep(sweep(seeds=[4, 2])).trials
    (note,) = loaded.notes
    assert note.startswith("asha screens the arms with seed 4, from 11% of a run on")
    chosen = {"name": "asha", "grace": 0.25, "reduction_factor": 2}
    assert load_sweep(sweep(scheduler=chosen)).scheduler == Asha(grace=0.25, reduction_factor=2)


def test_all_problems_of_a_screen_are_reported_at_once(sweep):
    wrong = {"name": "asha", "grace": 1, "reduction_factor": True, "brackets": 2}
    assert problems_of(sweep(scheduler=wrong)) == [
        "scheduler.brackets: unknown key; did you mean 'grace'?",
        "scheduler.grace: expected a share of the run, 0 to 1, got 1",
        "scheduler.reduction_factor: expected a number > 1, got True",
    ]


def test_a_range_problem_names_the_arm(sweep):
    found = problems_of(sweep(arms={"three": {}, "one": {"model.stages": 0}}))
    assert len(found) == 1
    assert found[0].startswith("arms.one: model.stages: must be >= 1")


def test_missing_data_is_a_data_error(monkeypatch, tmp_path):
    monkeypatch.setenv("KNET_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"data\.root: no folder"):
        load_sweep(STAGES)


def test_an_arm_of_which_nothing_is_read_is_refused(sweep):
    path = sweep(arms={"one": {"loss.ce": 3.0}, "three": {}, "two": {"data.root": "/my/set"}})
    assert problems_of(path) == [
        f"arms.{arm}: {key}: nothing reads it with {decider}; leave it out, or change "
        f"{decider.split('=')[0]}"
        for arm, key, decider in [
            ("one", "loss.ce", "model.task=instance"),
            ("two", "data.root", "data.format=shapes"),
        ]
    ]


def test_a_grid_may_set_what_one_of_its_axes_leaves_out_and_says_so(sweep):
    path = sweep(
        arms={"three": {}}, grid={"model.interaction": [True, False], "model.num_heads": [4, 8]}
    )
    notes = [note for note in load_sweep(path).notes if "nothing reads it" in note]
    assert len(notes) == 2
    assert all(
        "model.num_heads: nothing reads it with model.interaction=false" in n for n in notes
    )
    # Typed, it holds for all arms, and some read it.
    assert load_sweep(
        sweep(arms={"three": {}, "one": {"model.interaction": False}}),
        overrides=["model.num_heads=4"],
    ).trials


def test_a_search_of_what_nothing_reads_is_refused(sweep):
    search = {"name": "optuna", "trials": 3, "space": {"loss.ce": {"uniform": [1, 2]}}}
    (problem,) = problems_of(sweep(search=search))
    assert problem.startswith("search.space: loss.ce: nothing reads it with model.task=instance")


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("val/PQ", [], "model.task=instance is judged by val/AP"),
        ("val/stage2/AP", [], "knet eval --per-stage"),
        ("bench/fps", ["eval.fps_iterations=0"], "eval.fps_iterations=0"),
        ("train/lr", [], "train/loss"),
    ],
)
def test_a_metric_that_no_run_has_is_refused(sweep, name, overrides, expected):
    path = sweep(metric={"name": name, "mode": "max"})
    (problem,) = problems_of(path, overrides=overrides)
    assert problem.startswith(f"metric.name: no run of arm one has {name}: ")
    assert expected in problem
    columns = {"source": "S", "columns": {name: "x"}, "rows": {"one": [1]}}
    assert problems_of(sweep(paper=columns), overrides=overrides)[0].startswith("paper.columns: ")


def test_schedulers_need_a_metric_of_evaluations(sweep):
    path = sweep(metric={"name": "train/loss", "mode": "min"}, scheduler={"name": "asha"})
    (problem,) = problems_of(path)
    assert "the scheduler judges evaluations" in problem


def test_a_scale_that_is_nearly_one_of_those_beside_is_a_slip(sweep, tmp_path):
    (tmp_path / "scales").mkdir()
    (tmp_path / "scales" / "laptop.yaml").write_text("seeds: [0]\n")
    path = sweep(scales={"labtop": {"one": {"optim.lr": 1.0}}, "elsewhere": {}})
    assert problems_of(path) == ["scales.labtop: no such scale; did you mean 'laptop'?"]


def test_half_precision_needs_a_gpu(sweep):
    problems = problems_of(sweep(), overrides=["train.precision=fp16"])
    assert all("train.precision: got fp16 without GPUs" in line for line in problems)


def test_gpu_hours_limit_nothing_without_gpus(sweep):
    assert "budget.gpu_hours limits nothing without GPUs; budget.usd would" in (
        load_sweep(sweep(budget={"gpu_hours": 3})).notes
    )


def test_a_recipes_own_seed_is_not_used_and_that_is_said(sweep, tmp_path):
    path = sweep()
    with (tmp_path / "recipe.yaml").open("a") as recipe:
        recipe.write("seed: 7\n")
    loaded = load_sweep(path)
    assert loaded.notes == ("seed 7 of the recipe is not used: a sweep has seeds of its own",)
    assert {trial.seed for trial in loaded.trials} == {0, 1}
