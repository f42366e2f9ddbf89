"""`knet report --register`: from a table to a model that `mlflow.pyfunc` loads, and back."""

import importlib
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from knet_core import Instances, image_batch, load_model, load_recipe, predict
from knet_platform.checkpoints import step_of
from knet_platform.cli.main import main
from knet_platform.home import storage_uri, tracking_uri
from knet_platform.planning import load_sweep
from knet_platform.provenance import capture
from knet_platform.source import read_source
from knet_platform.storage import Evaluation, Store, TrialResult
from knet_platform.sweep import Sweep, Trial
from knet_platform.tracking import SweepRun, TrialModel, TrialRun
from knet_platform.tracking.mlflow import MLflowTracker

WINNER = "narrow/1"


@pytest.fixture
def path(
    width_sweep: Path,
    checkpoint: Path,
    finished: Callable[..., TrialResult],
    make_home: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A sweep of which three trials are finished; only the winner has a checkpoint."""
    make_home(tmp_path, monkeypatch)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # as if unset, and restored afterwards
    scores = {"narrow/0": 0.2, WINNER: 0.5, "model.channels=64/0": 0.3}
    for trial in load_sweep(width_sweep).trials:
        if trial.name not in scores:
            continue
        folder = Store(storage_uri()).trial(trial.hash)
        folder.write_provenance(capture(trial.recipe, workers=1, source=read_source()), "")
        name = "checkpoint_100"
        if trial.name == WINNER:
            name = checkpoint.name
            shutil.copytree(checkpoint, Path(folder.uri, name))
        step = step_of(name)
        metrics = {"val/AP": scores[trial.name], "bench/fps": 9.0}
        point = Evaluation(step=step, time=1e9, metrics=metrics)
        folder.write_points(0, [Evaluation(step=1, time=1e9, metrics={"val/AP": 0.01}), point])
        folder.write_result(finished(trial.hash, step=step, metrics=metrics, checkpoint=name))
    return width_sweep


def track(sweep: Sweep) -> None:
    """Tell MLflow of the finished trials, as a sweep does."""
    tracker = MLflowTracker(tracking_uri(), artifacts=Path(storage_uri()).parent / "mlartifacts")
    tracker.start_sweep(SweepRun.of(sweep))
    for trial in sweep.trials:
        folder = Store(storage_uri()).trial(trial.hash)
        if folder.status() == "finished":
            tracker.start_trial(TrialRun.of(trial), 1)
            tracker.log_points(trial.hash, folder.points())
            model = TrialModel.of(trial, folder)
            assert model is not None
            tracker.log_model(trial.hash, model)
            tracker.finish_trial(trial.hash, "FINISHED")
    tracker.finish_sweep("FINISHED")


@pytest.fixture
def sweep(path: Path) -> Sweep:
    sweep = load_sweep(path)
    track(sweep)
    return sweep


@pytest.fixture
def client(home: Path) -> MlflowClient:
    return MlflowClient(tracking_uri())


@pytest.fixture
def load(client: MlflowClient) -> Iterator[Callable[[str], Any]]:
    """What people call; the module says something about its own types when it is loaded."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        importlib.import_module("mlflow.pyfunc")
    mlflow.set_tracking_uri(tracking_uri())
    yield mlflow.pyfunc.load_model
    mlflow.set_tracking_uri(None)


def winner(sweep: Sweep) -> Trial:
    return next(trial for trial in sweep.trials if trial.name == WINNER)


def test_the_registered_winner_predicts_what_its_checkpoint_does(
    sweep: Sweep,
    path: Path,
    load: Callable[[str], Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["report", str(path), "--register", "balloons"]) == 0
    assert "narrow/1 registered: models:/balloons/1" in capsys.readouterr().out
    checkpoint = Path(storage_uri(), "trials", winner(sweep).hash, "checkpoint_2")
    expected_of = load_model(checkpoint)
    recipe = load_recipe(checkpoint)
    shutil.rmtree(storage_uri())  # the registered model needs nothing of the sweep's store

    pixels = np.random.default_rng(0).integers(0, 255, (50, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    of_file, of_pixels = load("models:/balloons/1").predict([str(tmp_path / "photo.png"), pixels])

    batch = image_batch(pixels, recipe.data)
    (expected,) = predict(expected_of, batch.images, batch.infos, recipe.eval)
    assert isinstance(expected, Instances)
    assert len(expected.scores)
    for found in (of_file, of_pixels):
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)
        assert torch.equal(found.labels, expected.labels)
        assert (found.masks == expected.masks).float().mean() > 0.999


def test_a_model_that_is_not_registered_loads_from_where_it_lies(
    sweep: Sweep, client: MlflowClient, load: Callable[[str], Any]
) -> None:
    experiment = client.get_experiment_by_name("width")
    assert experiment is not None
    (model,) = client.search_logged_models(
        [experiment.experiment_id], f"tags.trial_hash = '{winner(sweep).hash}'"
    )
    pixels = np.zeros((64, 64, 3), dtype=np.uint8)
    (found,) = load(model.model_uri).predict([pixels])
    assert found.masks.shape[1:] == (64, 64)


def test_one_leads_to_the_other_in_both_directions(
    sweep: Sweep, path: Path, client: MlflowClient
) -> None:
    assert main(["report", str(path), "--register", "balloons"]) == 0
    trial = winner(sweep)
    folder = Store(storage_uri()).trial(trial.hash)

    # version -> model -> run -> trial -> sweep
    version = client.get_model_version("balloons", "1")
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    assert version.run_id == model.source_run_id
    run = client.get_run(version.run_id)
    assert (run.info.run_name, run.data.tags["trial_hash"]) == (WINNER, trial.hash)
    parent = client.get_run(run.data.tags["mlflow.parentRunId"])
    assert parent.info.run_name == run.data.tags["sweep"] == sweep.name
    # ... -> checkpoint
    checkpoint = run.data.tags["checkpoint"]
    assert checkpoint == model.tags["checkpoint"] == version.tags["checkpoint"]
    assert checkpoint == f"{folder.uri}/{folder.latest_checkpoint()}"
    # checkpoint -> trial -> run -> model: its folder is the trial's, whose name is the hash
    (found,) = client.search_runs(
        [run.info.experiment_id], f"tags.trial_hash = '{Path(checkpoint).parent.name}'"
    )
    assert found.info.run_id == run.info.run_id
    (output,) = run.outputs.model_outputs
    assert output.model_id == model.model_id


def test_a_model_has_the_metrics_of_its_step_and_the_data_they_were_measured_on(
    sweep: Sweep, client: MlflowClient
) -> None:
    experiment = client.get_experiment_by_name("width")
    assert experiment is not None
    models = client.search_logged_models(
        [experiment.experiment_id],
        order_by=[{"field_name": "metrics.val/AP", "ascending": False}],
    )
    assert [model.name for model in models] == ["narrow-1", "model_channels=64-0", "narrow-0"]
    best = models[0]
    digest = best.tags["data_digest"]
    assert {m.key: m.value for m in best.metrics} == {"val/AP": 0.5, "bench/fps": 9.0}
    assert all(digest.startswith(m.dataset_digest) for m in best.metrics)
    run = client.get_run(best.source_run_id)
    (data,) = run.inputs.dataset_inputs
    assert digest.startswith(data.dataset.digest)
    # and the curve has none of its points twice
    history = client.get_metric_history(run.info.run_id, "val/AP")
    assert [point.value for point in history] == [0.01, 0.5]


def test_the_same_again_is_the_same(
    sweep: Sweep, path: Path, client: MlflowClient, capsys: pytest.CaptureFixture[str]
) -> None:
    track(sweep)
    for said in ("registered:", "is registered already:"):
        assert main(["report", str(path), "--register", "balloons", "--format", "md"]) == 0
        printed = capsys.readouterr()
        assert f"narrow/1 {said} models:/balloons/1" in printed.err
        assert "registered" not in printed.out
    experiment = client.get_experiment_by_name("width")
    assert experiment is not None
    assert len(client.search_logged_models([experiment.experiment_id])) == 3
    assert len(client.search_model_versions("name = 'balloons'")) == 1


def test_a_winner_without_a_run_is_one_line(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(path), "--register", "balloons"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "narrow/1: has no run" in line
    assert "knet sync" in line


def test_without_a_finished_trial_there_is_no_winner(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(path), "optim.lr=0.01", "--register", "balloons"]) == 2
    assert "no trial that finished with val/AP" in capsys.readouterr().err


def test_where_nothing_is_tracked_nothing_is_registered(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    assert main(["report", str(path), "--register", "balloons"]) == 2
    assert "there is no registry" in capsys.readouterr().err
