"""`knet store`: what it counts, what it deletes, and what it leaves."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from knet_platform.cli.main import main
from knet_platform.home import storage_uri
from knet_platform.planning import load_sweep
from knet_platform.storage import Store, TrialResult, TrialStore


def add_checkpoint(trial: TrialStore, step: int, ap: float) -> None:
    """Add one of format 1, which needs no digests, of 1000 bytes of weights."""
    state = {
        "format": 1,
        "step": step,
        "epoch": 1.0,
        "categories": [],
        "metrics": {},
        "evaluations": [{"step": step, "time": 1.5, "metrics": {"val/AP": ap}}],
        "seconds": 1.0,
        "num_parameters": 3,
    }
    trial.write_bytes(f"checkpoint_{step}/model.safetensors", bytes(1000))
    trial.write_bytes(f"checkpoint_{step}/trainer.pt", b"t")
    trial.write_bytes(f"checkpoint_{step}/state.json", json.dumps(state).encode())
    trial.write_bytes(f"checkpoint_{step}/recipe.yaml", b"r")


@pytest.fixture
def sweep_file(recipe: Path) -> Path:
    path = recipe.with_name("sweep.yaml")
    path.write_text(
        f"name: sizes\nbase: {recipe.name}\nmetric: {{name: val/AP, mode: max}}\n"
        "baseline: plain\narms: {plain: {}, other: {optim.lr: 0.01}}\n"
    )
    return path


@pytest.fixture
def trial(sweep_file: Path) -> TrialStore:
    """The first trial, with five checkpoints of which the second is the best."""
    first = load_sweep(sweep_file).trials[0]
    trial = Store(storage_uri()).trial(first.hash)
    for step, ap in ((1, 0.1), (2, 0.4), (3, 0.2), (4, 0.3), (5, 0.3)):
        add_checkpoint(trial, step, ap)
    return trial


def test_a_dry_run_says_what_prune_then_deletes(
    sweep_file: Path, trial: TrialStore, capsys: pytest.CaptureFixture[str]
) -> None:
    before = trial.checkpoints.names()
    assert main(["store", "prune", str(sweep_file), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert trial.checkpoints.names() == before
    assert "would delete 2 checkpoints, 2." in said
    assert main(["store", "prune", str(sweep_file)]) == 0
    assert capsys.readouterr().out == said.replace("would delete", "deleted")
    assert trial.checkpoints.names() == ["checkpoint_5", "checkpoint_4", "checkpoint_2"]
    assert main(["store", "prune", str(sweep_file)]) == 0
    assert capsys.readouterr().out == "deleted 0 checkpoints, 0 B\n"


def test_what_a_result_names_stays(
    sweep_file: Path, trial: TrialStore, finished: Callable[..., TrialResult]
) -> None:
    trial.write_result(finished(trial.uri.rpartition("/")[2], checkpoint="checkpoint_1"))
    assert main(["store", "prune", str(sweep_file)]) == 0
    assert trial.checkpoints.names() == [f"checkpoint_{step}" for step in (5, 4, 2, 1)]


def test_usage_is_counted_by_trial(
    sweep_file: Path, trial: TrialStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["store", "du", "--json"]) == 0
    (usage,) = json.loads(capsys.readouterr().out)
    assert usage["trial"] == trial.uri.rpartition("/")[2]
    assert usage["bytes"] == sum(trial.sizes().values()) > 5000
    assert (usage["checkpoints"], usage["superfluous"]) == (5, {})
    assert main(["store", "du", str(sweep_file), "--json"]) == 0
    (usage,) = json.loads(capsys.readouterr().out)
    assert usage["trial"] == load_sweep(sweep_file).trials[0].name
    assert set(usage["superfluous"]) == {"checkpoint_3", "checkpoint_1"}
    assert main(["store", "du", str(sweep_file)]) == 0
    assert "5 checkpoints, 2." in capsys.readouterr().out


def test_an_empty_store_has_nothing(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "du"]) == 0
    assert capsys.readouterr().out == f"nothing in {storage_uri()}\n"


def test_a_missing_sweep_file_is_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "prune", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
