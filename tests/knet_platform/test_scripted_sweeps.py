"""Whole sweeps on a real cluster whose trials follow a script where others would train.

All but the group of Ray Train is real: it takes seconds of each trial to start, and what is tested
here begins and ends outside of it. What the group does is tested in `end_to_end`.
"""

import io
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.cloudpickle
import ray.tune
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from knet_platform import attempts, bridge, progress, tuner
from knet_platform.cli.main import main
from knet_platform.driver import TrialJob, run_trial
from knet_platform.planning import load_sweep
from knet_platform.progress import Moment, PlainProgress
from knet_platform.storage import Evaluation, Group, Store, TrialStore
from knet_platform.sweep import Trial

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the cluster cannot import it

RECIPE = """\
data: {format: shapes, shapes: {num_train: 8, num_val: 4, size: 64}, short_edge: [64, 64]}
optim: {lr: 0.01}
train: {iterations: 40, batch_size: 4, log_every: 10, eval_every: 10}
"""
# One trial after another: what a screen or a budget decides depends on the order.
HEAD = """\
name: scripted
base: recipe.yaml
metric: {name: val/AP, mode: max}
baseline: base
resources: {max_concurrent: 1, instance: here}
"""
# A dollar for each second of a trial.
PRICES = """\
default: here
instances:
  here: {gpu: none, gpus: 0, gpu_memory_gb: 0, cpus: 1, on_demand: 3600, date: 2026-01-01}
"""
SECONDS = 100.0
"""What ten steps take by the clocks that a budget asks."""
LONG = "train.iterations=80"
"""For trials that hear of a spent budget in time: that takes them up to two reports."""
SKEW = 86400.0
"""Seconds by which the workers' clocks are wrong, every other time into the past."""


def scripted_trial(config: dict[str, Any]) -> None:
    """Be the driver of a trial around a script."""
    run_trial(config, train=scripted_group)


def scripted_group(
    job: TrialJob, store: TrialStore, attempt: int, images_at_once: int | None
) -> tuple[str, bool]:
    """Report and save as a group of Ray Train does; the nearer to 0.01 the rate, the better."""
    lr, total = job.recipe["optim"]["lr"], job.recipe["train"]["iterations"]
    everything = Store(job.store_uri)
    known = store.state()
    store.add_group(Group(workers=job.workers[0], seconds=known.seconds if known else 0.0))
    evaluations = [*known.evaluations] if known else []
    for step in range(store.latest_step() + 10, total + 1, 10):
        attempts.verify(store, job.run_id)
        value = step / total * 0.01 / (0.01 + abs(lr - 0.01))
        time = 1.7e9 + (SKEW if step % 20 else -SKEW)
        evaluations.append(Evaluation(step=step, time=time, metrics={"val/AP": value}))
        store.write_points(0, evaluations)
        stopped = not attempts.may_go_on(everything, job.run_id, job.trial_hash)
        stopped |= len(evaluations) == job.most_evaluations
        if stopped or step == total:
            save(store, step, evaluations)
        point = {"step": step, "time": time, "metrics": {"val/AP": value}}
        ray.tune.report({"step": step, "total": total, "points": [point], "saved": False})
        if stopped:
            return "cpu", step == total
    return "cpu", True


def save(store: TrialStore, step: int, evaluations: list[Any]) -> None:
    """Leave what a checkpoint is known by."""
    state = {
        "format": 1, "step": step, "epoch": 1.0, "categories": [], "num_parameters": 1,
        "metrics": evaluations[-1].metrics, "seconds": step / 10 * SECONDS,
        "evaluations": [
            {"step": point.step, "time": point.time, "metrics": dict(point.metrics)}
            for point in evaluations
        ],
    }  # fmt: skip
    for name in ("model.safetensors", "trainer.pt", "recipe.yaml", "state.json"):
        store.write_bytes(f"checkpoint_{step}/{name}", json.dumps(state).encode())


class Scripted:
    """A folder with sweeps, and the commands that run them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = Store(str(folder / "home" / "storage"))
        self.pace = SECONDS
        """By which the clock moves at each report."""
        self.clock = SimpleNamespace(now=0.0, monotonic=lambda: self.clock.now)
        (folder / "recipe.yaml").write_text(RECIPE)
        (folder / "prices.yaml").write_text(PRICES)

    def write(self, text: str) -> Path:
        path = self.folder / "scripted.yaml"
        path.write_text(HEAD + text)
        return path

    def knet(self, verb: str, *arguments: str) -> tuple[int, dict[str, Any]]:
        prices = ["--prices", str(self.folder / "prices.yaml")] if verb != "report" else []
        path = str(self.folder / "scripted.yaml")
        with redirect_stdout(io.StringIO()) as output:
            code = main([verb, path, *prices, *arguments, "--json"])
        return code, json.loads(output.getvalue())

    def runs(self, experiment: str = "scripted") -> dict[str, Run]:
        found = self.client.get_experiment_by_name(experiment)
        assert found is not None
        runs = self.client.search_runs([found.experiment_id])
        assert len({run.info.run_name for run in runs}) == len(runs)
        return {str(run.info.run_name): run for run in runs}

    def steps(self, run: Run) -> list[int]:
        """Return the steps of a run's curve; MLflow lists its points by their clocks."""
        history = self.client.get_metric_history(run.info.run_id, "val/AP")
        return sorted(point.step for point in history)

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(f"sqlite:///{self.folder}/home/mlflow.db")


@pytest.fixture
def scripted(
    tmp_path: Path, make_home: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Scripted:
    found = Scripted(tmp_path)
    make_home(tmp_path, monkeypatch)
    monkeypatch.setattr(tuner, "run_sweep", partial(tuner.run_sweep, trainable=scripted_trial))
    monkeypatch.setattr(bridge, "time", found.clock)

    def update(self: PlainProgress, trial: Trial, moment: Moment) -> None:
        found.clock.now += found.pace

    monkeypatch.setattr(progress.PlainProgress, "update", update)
    return found


def names(trials: list[dict[str, Any]]) -> list[str]:
    return [f"{trial['arm']}/{trial['seed']}" for trial in trials]


def test_a_screen_runs_one_seed_of_every_arm_then_the_others_of_those_that_pass(
    scripted: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = "seeds: [3, 0]\narms: {base: {}, poor: {optim.lr: 0.5}, good: {optim.lr: 0.011}}\n"
    screen = "scheduler: {name: asha, grace: 0.2, reduction_factor: 2}\n"
    path = scripted.write(arms + screen)
    code, outcome = scripted.knet("run")
    assert code == 0
    assert names(outcome["finished"]) == ["base/3", "good/3", "base/0", "good/0"]
    assert names(outcome["pruned"]) == ["poor/3", "poor/0"]
    by_name = {trial.name: trial for trial in load_sweep(path).trials}
    first, other = (scripted.store.trial(by_name[name].hash) for name in ("poor/3", "poor/0"))
    pruned = first.pruned()
    assert pruned is not None
    assert (pruned.step, first.latest_step()) == (10, 20)  # it saved at the next report
    assert (first.result(), other.list()) == (None, [])
    runs = scripted.runs()
    assert set(runs) == {"scripted", "base/3", "base/0", "poor/3", "good/3", "good/0"}
    assert runs["scripted"].info.status == "FINISHED"
    assert runs["poor/3"].info.status == "KILLED"
    assert runs["poor/3"].data.tags["status_reason"] == "pruned at step 10 of 40"

    capsys.readouterr()
    assert main(["plan", str(path), "--prices", str(scripted.folder / "prices.yaml")]) == 0
    plan = capsys.readouterr().out
    assert plan.count("pruned at step 10") == 2
    assert "4 finished, 2 pruned, nothing left to run" in plan
    report = (scripted.folder / "home/reports/scripted/table.md").read_text()
    assert "pruned at step 10" in report

    scripted.write(arms)
    code, outcome = scripted.knet("run")
    assert (code, len(outcome["finished"])) == (0, 6)
    assert first.pruned() is None
    assert scripted.runs()["poor/3"].data.tags["attempt"] == "2"


def test_a_search_stops_at_its_budget_and_a_higher_one_ends_it_as_if_it_had_not(
    scripted: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    """A trial costs 800 dollars; what it may cost is spent in the third."""
    space = "space: {optim.lr: {log_uniform: [1.0e-4, 1.0]}}"
    search = f"arms: {{base: {{}}}}\nsearch: {{name: optuna, trials: TRIALS, {space}}}\n"
    scripted.write(search.replace("TRIALS", "3"))
    code, outcome = scripted.knet("run", LONG, "--max-usd", "1750")
    assert code == 4
    assert "budget: reached with 2 trials to go" in capsys.readouterr().err
    assert len(outcome["finished"]) == 2
    (paused,) = outcome["paused"]
    assert outcome["unsuggested"] == 1
    assert not outcome["failed"]
    assert 0 < scripted.store.trial(paused["trial_hash"]).latest_step() < 80
    runs = scripted.runs()
    assert runs["scripted"].info.status == "KILLED"
    assert runs[f"{paused['arm']}/0"].data.tags["status_reason"] == "budget reached; it can go on"
    before = [scripted.store.trial(t["trial_hash"]).result() for t in outcome["finished"]]

    # A longer search goes on from what it has tried, and is not run again.
    scripted.write(search.replace("TRIALS", "4"))
    code, plan = scripted.knet("plan", LONG)
    assert [row["state"] for row in plan["trials"]] == ["finished", "finished", "partial"]
    assert plan["search"]["to_come"] == 2
    code, second = scripted.knet("run", LONG, "--max-usd", "6000")
    assert (code, second["unsuggested"], len(second["finished"])) == (0, 0, 5)
    assert second["finished"][:2] == outcome["finished"]
    assert second["finished"][2]["trial_hash"] == paused["trial_hash"]
    after = [scripted.store.trial(t["trial_hash"]).result() for t in outcome["finished"]]
    assert after == before
    runs = scripted.runs()
    assert set(runs) == {"scripted", *(f"{trial['arm']}/0" for trial in second["finished"])}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    # Clocks that disagree lose no point: the paused trial's went back and forth by a day.
    for run in runs.values():
        if "trial_hash" in run.data.tags:
            assert scripted.steps(run) == list(range(10, 81, 10))
            result = scripted.store.trial(run.data.tags["trial_hash"]).result()
            assert result is not None
            assert run.data.metrics["val/AP"] == result.metrics["val/AP"]
    code, report = scripted.knet("report", LONG)
    values = [arm["metrics"]["val/AP"]["mean"] for arm in report["arms"].values()]
    assert values == sorted(values, reverse=True)

    # Never stopped, it would have tried the same.
    (scripted.folder / "home" / "storage").rename(scripted.folder / "stopped")
    code, whole = scripted.knet("run", LONG)
    assert (code, whole["finished"]) == (0, second["finished"])


def test_a_spent_budget_stops_the_least_important_and_starts_nothing_new(
    scripted: Scripted,
) -> None:
    path = scripted.write("seeds: [0, 1]\narms: {other: {optim.lr: 0.1}, base: {}}\n")
    code, outcome = scripted.knet("run", LONG, "--max-usd", "950")
    assert code == 4
    assert names(outcome["finished"]) == ["base/0"]  # the baseline comes first
    assert names(outcome["paused"]) == ["other/0", "other/1", "base/1"]
    sweep = load_sweep(path, overrides=[LONG])
    trials = {trial.name: scripted.store.trial(trial.hash) for trial in sweep.trials}
    assert trials["other/0"].status() == "partial"  # it saved when it was stopped
    assert {trials[name].status() for name in ("other/1", "base/1")} == {"new"}
    code, outcome = scripted.knet("run", LONG, "--max-usd", "5000")
    assert (code, len(outcome["finished"])) == (0, 4)


def test_a_population_trains_in_step_and_ends_the_same_wherever_it_was_stopped(
    scripted: Scripted,
) -> None:
    """It is stopped in its first round and in its third."""
    rates = {"slow": 0.0001, "good": 0.012, "fair": 0.02, "fast": 0.9}
    members = "".join(f"  {name}: {{optim.lr: {rate}}}\n" for name, rate in rates.items())
    path = scripted.write("scheduler: pbt\narms:\n  base: {}\n" + members)
    code, outcome = scripted.knet("run", "--max-usd", "650")
    assert code == 4
    assert names(outcome["finished"]) == ["base/0"]
    assert names(outcome["paused"]) == [f"{name}/0" for name in rates]
    scripted.pace = 3 * SECONDS  # so that it does not get as far as the forecast says
    code, outcome = scripted.knet("run", "--max-usd", "2300")
    assert code == 4
    assert len(outcome["paused"]) == 4
    assert {run.info.status for run in scripted.runs().values()} == {"FINISHED", "KILLED"}
    code, outcome = scripted.knet("run", "--max-usd", "5000")
    assert (code, len(outcome["finished"])) == (0, 5)
    runs = scripted.runs()
    assert set(runs) == {"scripted", "base/0", *(f"{name}/0" for name in rates)}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}

    sweep = load_sweep(path)
    folders = {trial.arm: scripted.store.trial(trial.hash) for trial in sweep.trials}
    schedules = {
        name: yaml.safe_load(folders[name].read_bytes("schedule.yaml"))["optim"] for name in rates
    }
    # Each round replaced the worst, which for the script is the one farthest from 0.01.
    assert schedules["fast"]["lr"] == schedules["good"]["lr"] == 0.012
    assert schedules["fast"]["rescale_at"][0] == 10
    assert schedules["good"]["rescale_at"] == []
    for name in rates:
        result = folders[name].result()
        assert result is not None
        provenance = folders[name].provenance()
        assert provenance is not None
        assert provenance.recipe["optim"] == schedules[name]
        run_id = runs[f"{name}/0"].info.run_id
        assert scripted.steps(runs[f"{name}/0"]) == [10, 20, 30, 40]
        artifacts = {item.path for item in scripted.client.list_artifacts(run_id)}
        assert {"schedule.yaml", "provenance.json"} <= artifacts
    code, report = scripted.knet("report")
    assert set(report["arms"]) == {"base", *rates}
    table = (scripted.folder / "home/reports/scripted/table.md").read_text()
    assert "fast went on from good at step 10" in table

    # Never stopped, it would have come to the same.
    (scripted.folder / "home" / "storage").rename(scripted.folder / "stopped")
    code, whole = scripted.knet("run")
    assert (code, whole["finished"]) == (0, outcome["finished"])
    for name in rates:
        again = yaml.safe_load(folders[name].read_bytes("schedule.yaml"))["optim"]
        assert again == schedules[name]


def test_of_two_sweeps_at_once_the_later_takes_over_the_trial_that_both_have(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it is for one sweep that is renamed under way: its new name has another lock."""
    path = scripted.write("arms: {base: {}, other: {optim.lr: 0.1}}\n")
    second = path.with_name("second.yaml")
    arms = "arms: {base: {optim.lr: 0.2}, shared: {optim.lr: 0.1}, twin: {optim.lr: 0.1}}\n"
    second.write_text(HEAD.replace("scripted", "second") + arms)
    base, other = (trial.hash for trial in load_sweep(path, overrides=[LONG]).trials)
    assert load_sweep(second, overrides=[LONG]).trials[1].hash == other
    codes: list[int] = []

    def update(self: PlainProgress, trial: Trial, moment: Moment) -> None:
        if trial.name == "other/0" and moment.step == 20:
            prices = ["--prices", str(scripted.folder / "prices.yaml")]
            codes.append(main(["run", str(second), LONG, *prices]))

    monkeypatch.setattr(progress.PlainProgress, "update", update)
    code, outcome = scripted.knet("run", LONG)
    assert (codes, code) == ([0], 3)
    assert names(outcome["finished"]) == ["base/0"]
    (failed,) = outcome["failed"]
    assert (failed["trial_hash"], failed["reason"]) == (other, bridge.TAKEN_OVER)
    run = scripted.runs()["other/0"]
    assert (run.info.status, run.data.tags["status_reason"]) == ("KILLED", bridge.TAKEN_OVER)
    store = scripted.store.trial(other)
    assert (store.failures(), store.status(), attempts.count(store)) == ((), "finished", 2)

    results = [scripted.store.trial(trial_hash).result() for trial_hash in (base, other)]
    code, outcome = scripted.knet("run", LONG)
    assert (code, names(outcome["finished"])) == (0, ["base/0", "other/0"])
    assert [scripted.store.trial(h).result() for h in (base, other)] == results
    runs = scripted.runs("second")
    assert set(runs) == {"second", "base/0", "shared/0"}  # its equal arms are one trial
    for run in (scripted.runs()["other/0"], runs["shared/0"]):
        assert run.info.status == "FINISHED"
        assert scripted.steps(run) == list(range(10, 81, 10))
