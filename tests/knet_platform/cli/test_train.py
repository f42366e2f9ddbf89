"""`knet train` through the command line: real training, a real MLflow store."""

import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from knet_core import read_state
from knet_platform.cli.main import main
from knet_platform.home import tracking_uri
from knet_platform.locks import output_lock


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One store for all tests: a new one takes MLflow six seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture(autouse=True)
def _tracked(home: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)


def _runs(condition: str) -> list[Run]:
    client = MlflowClient(tracking_uri())
    (experiment,) = client.search_experiments(filter_string="name = 'tiny'")
    found: list[Run] = client.search_runs([experiment.experiment_id], filter_string=condition)
    return found


def test_a_run_is_trained_tracked_and_never_trained_again(
    recipe: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe), "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["checkpoint"] == str(home / "runs" / first["trial_hash"] / "checkpoint_2")
    assert read_state(Path(first["checkpoint"])).step == 2
    this_run = f"tags.trial_hash = '{first['trial_hash']}'"
    (run,) = _runs(this_run)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["val/AP"] == first["metrics"]["val/AP"]

    assert main(["train", str(recipe), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["checkpoint"], again["metrics"]) == (first["checkpoint"], first["metrics"])
    assert len(_runs(this_run)) == 1


def test_it_resumes_from_the_newest_checkpoint(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine"
    assert main(["train", str(recipe), "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"checkpoint: {out / 'checkpoint_2'}" in printed
    untouched = (out / "checkpoint_1" / "state.json").stat().st_mtime_ns
    for file in (out / "checkpoint_2").iterdir():
        file.unlink()
    (out / "checkpoint_2").rmdir()
    assert main(["train", str(recipe), "--output", str(out)]) == 0
    assert read_state(out / "checkpoint_2").step == 2
    assert (out / "checkpoint_1" / "state.json").stat().st_mtime_ns == untouched


def test_the_checkpoints_of_another_recipe_are_not_continued(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine"
    assert main(["train", str(recipe), "--output", str(out)]) == 0
    assert main(["train", str(recipe), "optim.lr=0.5", "--output", str(out)]) == 2
    assert "optim.lr" in capsys.readouterr().err
    (failed,) = _runs("attributes.status = 'FAILED' and tags.trial_hash != ''")
    assert "optim.lr" in failed.data.tags["status_reason"]


def test_a_run_that_nobody_wants_tracked_leaves_nothing_but_its_checkpoints(
    recipe: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    assert main(["train", str(recipe), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 2
    assert sorted(path.name for path in home.iterdir()) == ["locks", "runs"]


def test_a_store_that_cannot_be_used_stops_it_before_training(
    recipe: Path,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/file/mlflow.db")
    assert main(["train", str(recipe)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (home / "runs").exists()


def test_unusable_data_leaves_nothing_behind(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = tmp_path / "set", tmp_path / "mine"
    (root / "annotations").mkdir(parents=True)
    content = {
        "images": [{"id": 1, "file_name": "gone.png", "height": 64, "width": 64}],
        "annotations": [],
        "categories": [{"id": 1, "name": "cat"}],
    }
    for split in ("train", "val"):
        (root / split).mkdir()
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    values = ["data.format=coco", f"data.root={root}"]
    assert main(["train", str(recipe), *values, "--output", str(out)]) == 5
    assert f"{root}/train/gone.png" in capsys.readouterr().err
    assert list(out.iterdir()) == []


def test_a_run_that_another_process_trains_is_left_to_it(
    recipe: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine"
    with output_lock(out, home):
        assert main(["train", str(recipe), "--output", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"process {os.getpid()} on {socket.gethostname()} is running it in {out}" in line
    assert not out.exists()


def test_sigterm_saves_and_the_same_command_goes_on(
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from knet_core.trainer import Trainer

    do_step, out = Trainer.step, tmp_path / "mine"

    def step(self: Trainer, number: int, batches: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return do_step(self, number, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        assert main(["train", str(recipe), "--output", str(out)]) == 75
    assert f"terminated at step 1; {out / 'checkpoint_1'} is written" in capsys.readouterr().err
    assert read_state(out / "checkpoint_1").step == 1
    assert main(["train", str(recipe), "--output", str(out)]) == 0
    assert read_state(out / "checkpoint_2").step == 2


def test_a_damaged_checkpoint_is_passed_with_a_warning(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine"
    assert main(["train", str(recipe), "--output", str(out)]) == 0
    (out / "checkpoint_2" / "model.safetensors").write_bytes(b"")
    assert main(["train", str(recipe), "--output", str(out)]) == 0
    warning = f"{out}/checkpoint_2: model.safetensors has 0 of"
    assert warning in capsys.readouterr().err
    assert read_state(out / "checkpoint_2").step == 2
