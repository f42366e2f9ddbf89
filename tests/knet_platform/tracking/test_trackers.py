"""What every tracker promises, and what MLflow shows of it."""

import io
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from knet_platform.errors import TrackingError
from knet_platform.planning import Sweep
from knet_platform.storage import Evaluation
from knet_platform.tracking import MemoryTracker, Tracker
from knet_platform.tracking.mlflow import MLflowTracker


def points(*steps: int, shift: float = 0.0) -> list[Evaluation]:
    return [
        Evaluation(step=step, time=1e9 + step + shift, metrics={"train/loss": 1 / step})
        for step in steps
    ]


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One MLflow store for all: making its tables takes seconds."""
    return tmp_path_factory.mktemp("home")


class TrackerContract:
    """Run for every tracker by the subclasses below."""

    @pytest.fixture
    def tracker(self, tmp_path: Path) -> Tracker:
        raise NotImplementedError

    def successor(self, tracker: Tracker) -> Tracker:
        """The tracker of the process that continues the sweep."""
        raise NotImplementedError

    def curve(self, tracker: Tracker, trial_hash: str, name: str) -> dict[int, float]:
        raise NotImplementedError

    def file(self, tracker: Tracker, trial_hash: str, name: str) -> bytes:
        raise NotImplementedError

    def test_a_trial_has_no_run_until_it_starts(self, tracker: Tracker, sweep: Sweep) -> None:
        tracker.start_sweep(sweep)
        assert tracker.status(sweep.trials[0].hash) is None

    def test_a_trial_goes_from_running_to_finished(self, tracker: Tracker, sweep: Sweep) -> None:
        trial = sweep.trials[0]
        tracker.start_sweep(sweep)
        tracker.start_trial(trial, 1)
        assert tracker.status(trial.hash) == "RUNNING"
        tracker.log_picture(trial.hash, 3, png())
        tracker.finish_trial(trial.hash, "FINISHED")
        tracker.finish_sweep("FINISHED")
        assert tracker.status(trial.hash) == "FINISHED"

    def test_the_last_file_of_a_name_is_kept(self, tracker: Tracker, sweep: Sweep) -> None:
        trial = sweep.trials[0]
        tracker.start_sweep(sweep)
        tracker.start_trial(trial, 1)
        tracker.log_file(trial.hash, "patch.diff", b"first")
        tracker.log_file(trial.hash, "patch.diff", b"caf\xe9")
        assert self.file(tracker, trial.hash, "patch.diff") == b"caf\xe9"

    def test_another_process_finds_the_run_and_reopens_it(
        self, tracker: Tracker, sweep: Sweep
    ) -> None:
        trial = sweep.trials[0]
        tracker.start_sweep(sweep)
        tracker.start_trial(trial, 1)
        tracker.finish_trial(trial.hash, "KILLED", "interrupted")
        second = self.successor(tracker)
        second.start_sweep(sweep)
        assert second.status(trial.hash) == "KILLED"
        second.start_trial(trial, 2)
        assert second.status(trial.hash) == "RUNNING"

    def test_repeated_steps_are_recorded_once(self, tracker: Tracker, sweep: Sweep) -> None:
        trial = sweep.trials[0]
        tracker.start_sweep(sweep)
        tracker.start_trial(trial, 1)
        tracker.log_points(trial.hash, points(1, 2, 3))
        tracker.log_points(trial.hash, points(1, 2, 3))
        second = self.successor(tracker)
        second.start_sweep(sweep)
        second.start_trial(trial, 2)
        second.log_points(trial.hash, points(2, 3, 4, shift=100.0))
        curve = self.curve(second, trial.hash, "train/loss")
        assert curve == {step: pytest.approx(1 / step) for step in (1, 2, 3, 4)}


class TestMemoryTracker(TrackerContract):
    @pytest.fixture
    def tracker(self, tmp_path: Path) -> Tracker:
        return MemoryTracker()

    def successor(self, tracker: Tracker) -> Tracker:
        return tracker

    def curve(self, tracker: Tracker, trial_hash: str, name: str) -> dict[int, float]:
        assert isinstance(tracker, MemoryTracker)
        return tracker.runs[trial_hash].curves[name]

    def file(self, tracker: Tracker, trial_hash: str, name: str) -> bytes:
        assert isinstance(tracker, MemoryTracker)
        return tracker.runs[trial_hash].files[name]


class TestMLflowTracker(TrackerContract):
    @pytest.fixture
    def tracker(self, home: Path) -> Tracker:
        return MLflowTracker(f"sqlite:///{home}/mlflow.db", artifacts=home / "mlartifacts")

    def successor(self, tracker: Tracker) -> Tracker:
        assert isinstance(tracker, MLflowTracker)
        return MLflowTracker(tracker._uri, artifacts=tracker._artifacts)

    def curve(self, tracker: Tracker, trial_hash: str, name: str) -> dict[int, float]:
        assert isinstance(tracker, MLflowTracker)
        history = MlflowClient(tracker._uri).get_metric_history(tracker._runs[trial_hash], name)
        assert len(history) == len({item.step for item in history})
        return {item.step: item.value for item in history}

    def file(self, tracker: Tracker, trial_hash: str, name: str) -> bytes:
        assert isinstance(tracker, MLflowTracker)
        client = MlflowClient(tracker._uri)
        return Path(client.download_artifacts(tracker._runs[trial_hash], name)).read_bytes()

    def test_runs_carry_the_tags_and_params_that_people_filter_by(
        self, tracker: MLflowTracker, sweep: Sweep, tmp_path: Path
    ) -> None:
        trial = sweep.trials[0]
        page = tmp_path / "index.html"
        page.write_text("table")
        tracker.start_sweep(sweep)
        tracker.start_trial(trial, 2)
        tracker.log_picture(trial.hash, 3, png())
        tracker.finish_trial(trial.hash, "FAILED", "no such image")
        tracker.finish_sweep("FAILED", [page])

        client = MlflowClient(tracker._uri)
        experiment = client.get_experiment_by_name(sweep.name)
        assert experiment is not None
        runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
        assert set(runs) == {sweep.name, "1/0"}
        parent, child = runs[sweep.name], runs["1/0"]
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        tags = {key: value for key, value in child.data.tags.items() if "mlflow" not in key}
        assert len(tags.pop("git_sha")) in (7, 40)
        assert tags == {
            "sweep": trial.sweep,
            "arm": "1",
            "baseline": "2",
            "seed": "0",
            "trial_hash": trial.hash,
            "attempt": "2",
            "status_reason": "no such image",
        }
        assert child.data.params["model.stages"] == "1"
        assert child.data.params["model.backbone.name"] == "resnet50.tv_in1k"
        assert client.list_artifacts(child.info.run_id, "images")
        assert client.list_artifacts(parent.info.run_id, "report")[0].path == "report/index.html"

    def test_compare_url_names_the_trials_in_the_sweeps_order(
        self, tracker: MLflowTracker, sweep: Sweep
    ) -> None:
        tracker.start_sweep(sweep)
        for trial in reversed(sweep.trials):
            tracker.start_trial(trial, 1)
        url = tracker.compare_url()
        assert url.startswith("http://127.0.0.1:5000/#/compare-runs?runs=")
        first, second = (url.index(tracker._runs[trial.hash]) for trial in sweep.trials)
        assert first < second


def test_an_unreachable_server_is_one_line(sweep: Sweep, tmp_path: Path) -> None:
    tracker = MLflowTracker("http://user:secret@127.0.0.1:9", artifacts=tmp_path)
    with pytest.raises(TrackingError, match=r"http://127\.0\.0\.1:9: ") as info:
        tracker.start_sweep(sweep)
    assert len(str(info.value).splitlines()) == 1
    assert "secret" not in str(info.value)


def test_a_folder_that_cannot_be_made_is_one_line(sweep: Sweep, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    tracker = MLflowTracker(f"sqlite:///{tmp_path}/file/mlflow.db", artifacts=tmp_path)
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_URI"):
        tracker.start_sweep(sweep)
