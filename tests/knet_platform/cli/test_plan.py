"""`knet plan` shows what is done and what is left, quickly, and touches nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from knet_platform.cli.main import main
from knet_platform.planning import load_sweep
from knet_platform.storage import Failure, Store, TrialResult

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


def finish(home: Path, trial_hash: str) -> None:
    Store(str(home / "storage")).trial(trial_hash).write_result(
        TrialResult(
            trial_hash=trial_hash,
            step=300,
            metrics={"val/AP": 0.3},
            evaluations=(),
            checkpoint="checkpoint_300",
            num_parameters=1,
            seconds=60.0,
            wall_seconds=70.0,
            device="cpu",
            workers=2,
            finished_at="2026-01-01T00:00:00+00:00",
        )
    )


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
    assert "batch of 16 images = 2 workers x 8" in text
    assert "3 (baseline)" in text
    assert "0 finished, 10 to run" in text
    assert not home.exists()


def test_finished_and_failed_trials_are_told_apart(capsys, home, trials):
    finish(home, trials["3/0"])
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
    assert (rows["3/0"]["status"], rows["3/0"]["seconds"]) == ("finished", 0.0)
    assert rows["1/0"]["status"] == "failed"
    assert rows["1/0"]["reason"] == "NonFiniteError: loss is nan"
    assert (rows["3/1"]["status"], rows["3/1"]["source"]) == ("new", "history")
    assert plan["total"]["finished"] == 1
    assert plan["total"]["seconds_low"] < plan["total"]["seconds"] < plan["total"]["seconds_high"]
    assert main(["plan", *ARGUMENTS]) == 0
    assert "1/0 failed: NonFiniteError: loss is nan" in capsys.readouterr().out


def test_a_partial_trial_shows_its_step_and_needs_the_rest(capsys, home, trials):
    add_checkpoint(home, trials["3/0"], step=150, seconds=300.0)
    assert main(["plan", *ARGUMENTS]) == 0
    assert "partial, step 150/260" in capsys.readouterr().out
    assert main(["plan", *ARGUMENTS, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["trials"]
    left = {f"{row['arm']}/{row['seed']}": row["seconds"] for row in rows}
    assert left["3/1"] - left["3/0"] == pytest.approx(300.0)


def test_a_finished_sweep_points_to_its_report(capsys, home, trials):
    for trial_hash in trials.values():
        finish(home, trial_hash)
    assert main(["plan", *ARGUMENTS]) == 0
    assert "all 10 trials are finished; see knet report" in capsys.readouterr().out


def test_a_typo_is_one_line_and_code_2(capsys):
    assert main(["plan", *ARGUMENTS, "model.stagse=1"]) == 2
    assert capsys.readouterr().err == (
        "error: command line: model.stagse: unknown key; did you mean 'model.stages'?\n"
    )


def test_planning_loads_no_torch_ray_or_mlflow(home, trials):
    finish(home, trials["3/0"])
    add_checkpoint(home, trials["3/1"], step=150, seconds=300.0)
    code = (
        "import sys; from knet_platform.cli.main import main; "
        f"assert main(['plan', *{ARGUMENTS!r}]) == 0; "
        "sys.exit(str([name for name in ('torch', 'ray', 'mlflow') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"
