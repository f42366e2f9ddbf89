"""`knet plan` shows what is done and what is left, quickly, and touches nothing."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from knet_core import make_shapes
from knet_platform.cli.main import main
from knet_platform.planning import load_sweep
from knet_platform.storage import Failure, Pruned, Store

ROOT = Path(__file__).parents[3]
ARGUMENTS = [
    str(ROOT / "sweeps/stages.yaml"),
    "--scale",
    "laptop",
    f"data={ROOT}/sweeps/data/shapes.yaml",
]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.delenv("KNET_STORAGE", raising=False)
    monkeypatch.setenv("KNET_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def trials():
    sweep = load_sweep(Path(ARGUMENTS[0]), scale="laptop", overrides=ARGUMENTS[3:])
    return {trial.name: trial.hash for trial in sweep.trials}


@pytest.fixture
def finish(home, finished):
    """Return a function that gives a trial its result."""

    def finish(trial_hash: str, **metrics: float) -> None:
        result = finished(trial_hash, step=300, metrics={"val/AP": 0.3, **metrics})
        Store(str(home / "storage")).trial(trial_hash).write_result(result)

    return finish


def add_checkpoint(home: Path, trial_hash: str, *, step: int, seconds: float) -> None:
    state = {
        "format": 1,
        "step": step,
        "epoch": 1.0,
        "categories": [],
        "metrics": {},
        "evaluations": [],
        "seconds": seconds,
        "num_parameters": 1,
    }
    trial = Store(str(home / "storage")).trial(trial_hash)
    for name in ("model.safetensors", "trainer.pt", "recipe.yaml", "state.json"):
        trial.write_bytes(f"checkpoint_{step}/{name}", json.dumps(state).encode())


def test_a_new_sweep_is_all_to_run_and_nothing_is_written(capsys, home):
    assert main(["plan", *ARGUMENTS]) == 0
    text = capsys.readouterr().out
    assert "5 arms x 2 seeds = 10 trials" in text
    assert "batch of 12 images = 2 workers x 6" in text
    assert "3 (baseline)" in text
    assert "0 finished, 10 to run" in text
    assert not home.exists()


def test_finished_and_failed_trials_are_told_apart(capsys, home, trials, finish):
    finish(trials["3/0"])
    failure = Failure(
        cause="non_finite",
        kind="NonFiniteError",
        message="loss is nan",
        action="stopped the trial",
        attempt=1,
        step=0,
    )
    Store(str(home / "storage")).trial(trials["1/0"]).write_failure(failure)
    assert main(["plan", *ARGUMENTS, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    rows = {f"{row['arm']}/{row['seed']}": row for row in plan["trials"]}
    assert (rows["3/0"]["state"], rows["3/0"]["seconds"]) == ("finished", 0.0)
    assert rows["1/0"]["state"] == "failed"
    assert rows["1/0"]["reason"] == "NonFiniteError: loss is nan"
    assert (rows["3/1"]["state"], rows["3/1"]["source"]) == ("new", "history")
    assert rows["3/0"]["trial_hash"] == trials["3/0"]
    low, middle, high = plan["forecast"]["wall_hours"]
    assert 0 < low < middle < high
    assert plan["forecast"]["source"] == "history"
    assert main(["plan", *ARGUMENTS]) == 0
    assert "1/0 failed: NonFiniteError: loss is nan" in capsys.readouterr().out


def test_a_partial_trial_shows_its_step_and_needs_the_rest(capsys, home, trials):
    add_checkpoint(home, trials["3/0"], step=150, seconds=300.0)
    assert main(["plan", *ARGUMENTS]) == 0
    assert "partial, step 150/240" in capsys.readouterr().out
    assert main(["plan", *ARGUMENTS, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["trials"]
    left = {f"{row['arm']}/{row['seed']}": row["seconds"] for row in rows}
    assert left["3/1"] - left["3/0"] == pytest.approx(300.0)


def test_a_pruned_arm_needs_nothing_more_under_its_screen(capsys, home, trials, tmp_path, finish):
    text = Path(ARGUMENTS[0]).read_text().replace("base: recipes", f"base: {ROOT}/sweeps/recipes")
    path = tmp_path / "stages.yaml"
    path.write_text(text + "scheduler: asha\n")
    scale = f"{ROOT}/sweeps/scales/laptop.yaml"
    arguments = [str(path), "--scale", scale, ARGUMENTS[3]]
    for name in ("3/0", "3/1"):
        finish(trials[name])
    pruned = Pruned(sweep="stages", run="r", step=40, total=260)
    Store(str(home / "storage")).trial(trials["1/0"]).write_pruned(pruned)
    assert main(["plan", *arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["trials"]
    states = {f"{row['arm']}/{row['seed']}": (row["state"], row["seconds"] > 0) for row in rows}
    assert states["1/0"] == states["1/1"] == ("pruned", False)
    assert states["2/0"] == ("new", True)
    assert main(["plan", *arguments]) == 0
    shown = capsys.readouterr().out
    assert shown.count("pruned at step 40") == 2
    assert "2 finished, 2 pruned, 6 to run" in shown
    assert "counted as if asha stopped nothing" in shown
    assert main(["plan", *ARGUMENTS]) == 0
    assert "2 finished, 8 to run" in capsys.readouterr().out


def test_a_finished_sweep_points_to_its_report(capsys, home, trials, finish):
    for trial_hash in trials.values():
        finish(trial_hash)
    assert main(["plan", *ARGUMENTS]) == 0
    expected = "all 10 trials are finished; see knet report " + " ".join(ARGUMENTS)
    assert expected in capsys.readouterr().out


def test_trials_of_unknown_length_are_counted_apart(capsys, tmp_path):
    make_shapes(tmp_path / "shapes", num_train=2, num_val=1, size=64)
    arguments = [ARGUMENTS[0], f"data.root={tmp_path}/shapes", "--json"]
    assert main(["plan", *arguments]) == 0
    known = json.loads(capsys.readouterr().out)["forecast"]
    assert (known["source"], known["uncounted_trials"]) == ("model", 0)
    for image in (tmp_path / "shapes/train").iterdir():  # only the cluster has them
        image.unlink()
    assert main(["plan", *arguments]) == 0
    unknown = json.loads(capsys.readouterr().out)["forecast"]
    assert (unknown["source"], unknown["uncounted_trials"]) == ("unknown", 5)
    assert main(["plan", *arguments[:2]]) == 0
    shown = capsys.readouterr().out
    assert "5 to run: for how long is unknown" in shown
    assert "not counted: 5 trials of unknown length, as no training images are here" in shown
    assert "USD" not in shown


def test_the_forecast_has_its_fixed_form(capsys):
    assert main(["plan", *ARGUMENTS, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["sweep"] == "stages"
    assert {row["state"] for row in plan["trials"]} == {"new"}
    forecast = plan["forecast"]
    assert forecast["gpu_hours"] == [0, 0, 0]
    assert len(forecast["usd"]) == len(forecast["wall_hours"]) == 3
    assert forecast["peak_memory_gb"] > 0
    assert forecast["source"] == "model"
    assert forecast["price_assumed"]


def test_finished_trials_tell_how_much_memory_their_arm_needs(capsys, home, trials, finish):
    """The other arms are told by the model; the hungriest arm counts."""

    def forecast():
        assert main(["plan", *ARGUMENTS, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["forecast"]
        return found["peak_memory_gb"], found["memory_source"]

    finish(trials["5/0"], **{"sys/host_memory_gb": 0.01})
    fours = forecast()
    assert (fours[0] > 0.1, fours[1]) == (True, "model")
    finish(trials["5/0"], **{"sys/host_memory_gb": 7.5})
    assert forecast() == (7.5, "history")


def test_a_named_instance_gives_gpus_prices_and_a_smaller_wall_clock(capsys, tmp_path):
    full = [ARGUMENTS[0], ARGUMENTS[3], "--json", "--instance", "p4d.24xlarge"]
    plans = []
    for more in ([], ["--spot"], ["--instances", "5"]):
        assert main(["plan", *full, *more]) == 0
        plans.append(json.loads(capsys.readouterr().out)["forecast"])
    plain, spot, many = plans
    assert plain["price"].startswith("p4d.24xlarge on demand, list price of 2026-")
    assert spot["usd"][1] < plain["usd"][1] == pytest.approx(plain["gpu_hours"][1] * 21.958 / 8)
    assert many["concurrent_trials"] == 5
    assert many["wall_hours"][1] < plain["wall_hours"][1] / 3


@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_a_plan_beyond_the_budget_is_shown_and_refused(capsys, json_flag):
    assert main(["plan", *ARGUMENTS, "--max-usd", "0.01", *json_flag]) == 4
    captured = capsys.readouterr()
    assert captured.out
    (line,) = captured.err.splitlines()
    assert "budget: forecast 0." in line
    assert "expected at most 0.01; raise --max-usd" in line
    assert main(["plan", *ARGUMENTS, "--max-usd", "100", *json_flag]) == 0


def test_what_was_spent_counts_for_the_budget(capsys, home, trials, finish):
    for trial_hash in list(trials.values())[:-1]:
        finish(trial_hash)
    assert main(["plan", *ARGUMENTS, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["spent"]["usd"] > plan["forecast"]["usd"][1]
    cap = plan["forecast"]["usd"][1] * 2
    assert main(["plan", *ARGUMENTS, "--max-usd", f"{cap}"]) == 4
    assert "spent" in capsys.readouterr().err


def test_a_finished_sweep_passes_any_budget(capsys, home, trials, finish):
    for trial_hash in trials.values():
        finish(trial_hash)
    assert main(["plan", *ARGUMENTS, "--max-usd", "0"]) == 0


@pytest.mark.slow
def test_a_probe_measures_time_and_memory_here(capsys, home):
    quick = ["train.batch_size=4", "data.shapes.num_train=8"]
    assert main(["plan", *ARGUMENTS, *quick, "--probe", "--json"]) == 0
    forecast = json.loads(capsys.readouterr().out)["forecast"]
    assert (forecast["source"], forecast["memory_source"]) == ("probe", "probe")
    assert 0.1 < forecast["peak_memory_gb"] < 20
    assert not home.exists()


def test_a_probe_for_gpus_needs_one(capsys):
    assert main(["plan", ARGUMENTS[0], ARGUMENTS[3], "--probe"]) == 2
    assert "this machine has none" in capsys.readouterr().err


def test_a_huge_grid_is_asked_about_with_its_count_and_price(capsys, tmp_path, monkeypatch):
    axis = list(range(1, 1001))
    sweep = tmp_path / "huge.yaml"
    (tmp_path / "recipe.yaml").write_text("data: {format: shapes}\n")
    sweep.write_text(
        "name: huge\nbase: recipe.yaml\nmetric: {name: val/AP, mode: max}\nbaseline: x\n"
        f"grid: {{loss.dice: {axis}, loss.cls: {axis}}}\n"
    )
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(["plan", str(sweep)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "1,000,000 trials for about" in line
    assert "USD" in line
    assert "--yes" in line
    terminal = io.StringIO("no\n")
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    assert main(["plan", str(sweep)]) == 2
    asked, refusal = capsys.readouterr().err.split("[y/N] ")
    assert asked.startswith(f"{sweep}: 1,000,000 trials for about")
    assert asked.endswith("Go on? ")
    assert "not confirmed" in refusal


def test_arms_that_are_the_same_run_are_noted(capsys):
    assert main(["plan", *ARGUMENTS, "model.stages=2"]) == 0
    assert "note: arms 3, 1, 2, 4, 5 are the same run" in capsys.readouterr().out


def test_a_typo_is_one_line_and_code_2(capsys):
    assert main(["plan", *ARGUMENTS, "model.stagse=1"]) == 2
    assert capsys.readouterr().err == (
        "error: command line: model.stagse: unknown key; did you mean 'model.stages'?\n"
    )


def test_planning_loads_no_torch_ray_or_mlflow(home, trials, finish):
    finish(trials["3/0"])
    add_checkpoint(home, trials["3/1"], step=150, seconds=300.0)
    code = (
        "import sys; from knet_platform.cli.main import main; "
        f"assert main(['plan', *{ARGUMENTS!r}]) == 0; "
        "sys.exit(str([name for name in ('torch', 'ray', 'mlflow') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"
