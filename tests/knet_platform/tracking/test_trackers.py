"""What every tracker promises, and what MLflow shows of it."""

import io
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from knet_platform.errors import TrackingError
from knet_platform.storage import Evaluation
from knet_platform.tracking import (
    MemoryTracker,
    NoTracker,
    RejectedError,
    Status,
    Tracker,
    TrialModel,
)
from knet_platform.tracking.mlflow import MLflowTracker


def points(*steps: int, shift: float = 0.0) -> list[Evaluation]:
    return [
        Evaluation(step=step, time=1e9 + step + shift, metrics={"train/loss": 1 / step})
        for step in steps
    ]


def png(size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size)).save(buffer, "PNG")
    return buffer.getvalue()


class TrackerContract:
    """Run for every tracker by the subclasses below."""

    keeps = True
    """Whether it remembers what it is told."""

    @pytest.fixture
    def tracker(self) -> Tracker:
        raise NotImplementedError

    def successor(self, tracker: Tracker) -> Tracker:
        """The tracker of the process that continues the sweep."""
        raise NotImplementedError

    def curve(self, tracker: Tracker, trial_hash: str, name: str) -> list[tuple[int, float]]:
        raise NotImplementedError

    def file(self, tracker: Tracker, trial_hash: str, name: str) -> bytes:
        raise NotImplementedError

    def pictures(self, tracker: Tracker, trial_hash: str) -> int:
        raise NotImplementedError

    def models(self, tracker: Tracker, trial_hash: str) -> list[str]:
        """Checkpoints of a trial's models."""
        raise NotImplementedError

    def kept(self, status: Status) -> Status | None:
        return status if self.keeps else None

    def test_a_trial_has_no_run_until_it_starts(self, tracker, sweep) -> None:
        tracker.start_sweep(sweep.run)
        assert tracker.status(sweep.trial.hash) is None

    def test_a_trial_goes_from_running_to_finished(self, tracker, sweep) -> None:
        trial = sweep.trial
        tracker.start_sweep(sweep.run)
        tracker.start_trial(trial, 1)
        assert tracker.status(trial.hash) == self.kept("RUNNING")
        tracker.log_picture(trial.hash, 3, png())
        tracker.finish_trial(trial.hash, "FINISHED")
        tracker.finish_sweep("FINISHED")
        assert tracker.status(trial.hash) == self.kept("FINISHED")

    def test_the_last_file_of_a_name_is_kept(self, tracker, sweep) -> None:
        trial = sweep.trial
        tracker.start_sweep(sweep.run)
        tracker.start_trial(trial, 1)
        tracker.log_file(trial.hash, "patch.diff", b"first")
        tracker.log_file(trial.hash, "patch.diff", b"caf\xe9")
        if self.keeps:
            assert self.file(tracker, trial.hash, "patch.diff") == b"caf\xe9"

    def test_a_model_logged_again_is_one_model(self, tracker, sweep) -> None:
        trial = sweep.trial
        tracker.start_sweep(sweep.run)
        tracker.start_trial(trial, 1)
        tracker.log_points(trial.hash, points(1, 2))
        model = TrialModel(
            name="1-0",
            checkpoint="s3://bucket/trials/0/checkpoint_2",
            step=2,
            data="coco",
            data_root="/data/coco",
            data_digest="0" * 64,
        )
        tracker.log_model(trial.hash, model)
        tracker.log_model(trial.hash, model)
        assert self.models(tracker, trial.hash) == ([model.checkpoint] if self.keeps else [])

    def test_a_picture_sent_again_is_one_picture(self, tracker, sweep) -> None:
        trial = sweep.trial
        tracker.start_sweep(sweep.run)
        tracker.start_trial(trial, 1)
        for step in (3, 3, 6):
            tracker.log_picture(trial.hash, step, png())
        assert self.pictures(tracker, trial.hash) == (2 if self.keeps else 0)

    def test_another_process_finds_the_run_and_reopens_it(self, tracker, sweep) -> None:
        trial = sweep.trial
        tracker.start_sweep(sweep.run)
        tracker.start_trial(trial, 1)
        tracker.finish_trial(trial.hash, "KILLED", "interrupted")
        second = self.successor(tracker)
        second.start_sweep(sweep.run)
        assert second.status(trial.hash) == self.kept("KILLED")
        second.start_trial(trial, 2)
        assert second.status(trial.hash) == self.kept("RUNNING")

    def test_another_process_adds_to_a_run_that_it_did_not_start(self, tracker, sweep) -> None:
        trial = sweep.trial
        tracker.start_sweep(sweep.run)
        tracker.start_trial(trial, 1)
        tracker.log_points(trial.hash, points(1, 2))
        second = self.successor(tracker)
        second.start_sweep(sweep.run)
        second.log_points(trial.hash, points(2, 3))
        second.finish_trial(trial.hash, "FINISHED")
        expected = [(1, 1.0), (2, 1 / 2), (3, 1 / 3)] if self.keeps else []
        assert self.curve(second, trial.hash, "train/loss") == expected

    def test_repeated_steps_are_recorded_once(self, tracker, sweep) -> None:
        trial = sweep.trial
        tracker.start_sweep(sweep.run)
        tracker.start_trial(trial, 1)
        tracker.log_points(trial.hash, points(1, 2, 3))
        tracker.log_points(trial.hash, points(1, 2, 3))
        second = self.successor(tracker)
        second.start_sweep(sweep.run)
        second.start_trial(trial, 2)
        # Measured again after the last checkpoint: at another time, elsewhere a little different.
        second.log_points(trial.hash, points(2, 3, 4, shift=100.0))
        expected = [(step, 1 / step) for step in (1, 2, 3, 4)] if self.keeps else []
        assert self.curve(second, trial.hash, "train/loss") == expected


class TestNoTracker(TrackerContract):
    keeps = False

    @pytest.fixture
    def tracker(self) -> Tracker:
        return NoTracker()

    def successor(self, tracker: Tracker) -> Tracker:
        return NoTracker()

    def curve(self, tracker: Tracker, trial_hash: str, name: str) -> list[tuple[int, float]]:
        return []

    def pictures(self, tracker: Tracker, trial_hash: str) -> int:
        return 0

    def models(self, tracker: Tracker, trial_hash: str) -> list[str]:
        return []


class TestMemoryTracker(TrackerContract):
    @pytest.fixture
    def tracker(self) -> Tracker:
        return MemoryTracker()

    def successor(self, tracker: Tracker) -> Tracker:
        return tracker

    def curve(self, tracker: Tracker, trial_hash: str, name: str) -> list[tuple[int, float]]:
        assert isinstance(tracker, MemoryTracker)
        return list(tracker.runs[trial_hash].curves[name].items())

    def file(self, tracker: Tracker, trial_hash: str, name: str) -> bytes:
        assert isinstance(tracker, MemoryTracker)
        return tracker.runs[trial_hash].files[name]

    def pictures(self, tracker: Tracker, trial_hash: str) -> int:
        assert isinstance(tracker, MemoryTracker)
        return len(tracker.runs[trial_hash].pictures)

    def models(self, tracker: Tracker, trial_hash: str) -> list[str]:
        assert isinstance(tracker, MemoryTracker)
        model = tracker.runs[trial_hash].model
        return [model.checkpoint] if model else []


class MLflowContract(TrackerContract):
    """What is read back is read with MLflow's own client."""

    def successor(self, tracker: Tracker) -> Tracker:
        assert isinstance(tracker, MLflowTracker)
        return MLflowTracker(tracker._uri, artifacts=tracker._artifacts)

    def client(self, tracker: Tracker, trial_hash: str) -> tuple[MlflowClient, str]:
        assert isinstance(tracker, MLflowTracker)
        return MlflowClient(tracker._uri), tracker._runs[trial_hash]

    def curve(self, tracker: Tracker, trial_hash: str, name: str) -> list[tuple[int, float]]:
        client, run = self.client(tracker, trial_hash)
        history = client.get_metric_history(run, name)
        return sorted((item.step, item.value) for item in history)

    def file(self, tracker: Tracker, trial_hash: str, name: str) -> bytes:
        client, run = self.client(tracker, trial_hash)
        return Path(client.download_artifacts(run, name)).read_bytes()

    def pictures(self, tracker: Tracker, trial_hash: str) -> int:
        client, run = self.client(tracker, trial_hash)
        names = [item.path for item in client.list_artifacts(run, "images")]
        assert client.get_run(run).data.tags["mlflow.loggedImages"] == "True"
        small = [name for name in names if name.endswith("+compressed.webp")]
        assert len(names) == 2 * len(small)
        return len(small)

    def models(self, tracker: Tracker, trial_hash: str) -> list[str]:
        client, run = self.client(tracker, trial_hash)
        outputs = client.get_run(run).outputs.model_outputs
        return [client.get_logged_model(o.model_id).tags["checkpoint"] for o in outputs]

    def test_runs_carry_the_tags_and_params_that_people_filter_by(
        self, tracker, sweep, tmp_path
    ) -> None:
        trial = sweep.trial
        page = tmp_path / "index.html"
        page.write_text("table")
        tracker.start_sweep(sweep.run)
        tracker.start_trial(trial, 2)
        tracker.finish_trial(trial.hash, "FAILED", "no such image")
        tracker.finish_sweep("FAILED", [page])

        client = MlflowClient(tracker._uri)
        experiment = client.get_experiment_by_name(sweep.run.name)
        assert experiment is not None
        runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
        assert set(runs) == {sweep.run.name, "1/0"}
        parent, child = runs[sweep.run.name], runs["1/0"]
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
        assert min(child.data.params) == "arm.model.stages", "what differs between arms is first"
        assert child.data.params["arm.model.stages"] == child.data.params["model.stages"] == "1"
        assert child.data.params["model.backbone.name"] == "resnet50.tv_in1k"
        assert client.list_artifacts(parent.info.run_id, "report")[0].path == "report/index.html"

    def test_an_arm_that_is_added_later_adds_to_what_differs(self, tracker, sweep) -> None:
        trial = sweep.trial
        tracker.start_sweep(sweep.run)
        tracker.start_trial(trial, 1)
        many = tuple(trial.params)  # more, with the recipe, than MLflow takes at once
        second = self.successor(tracker)
        second.start_sweep(replace(sweep.run, varied=many))
        second.start_trial(trial, 2)
        client, run = self.client(tracker, trial.hash)
        expected = {f"arm.{key}": value for key, value in trial.params.items()} | trial.params
        assert client.get_run(run).data.params == expected

    def test_a_run_that_a_late_answer_doubled_is_one_again(self, tracker, sweep) -> None:
        """A server may carry out a request that nobody waits for, after its repetition."""
        trial = sweep.trial
        tracker.start_sweep(sweep.run)
        tracker.start_trial(trial, 1)
        tracker.log_points(trial.hash, points(1))
        client, run = self.client(tracker, trial.hash)
        client.create_run(tracker._experiment, start_time=1, tags=tracker._tags(trial))
        second = self.successor(tracker)
        second.start_sweep(sweep.run)
        second.start_trial(trial, 2)
        second.log_points(trial.hash, points(1, 2))
        found = client.search_runs([tracker._experiment], f"tags.trial_hash = '{trial.hash}'")
        assert [item.info.run_id for item in found] == [run]
        assert len(self.curve(second, trial.hash, "train/loss")) == 2

    def test_a_name_that_the_store_does_not_take_is_refused(self, tracker, sweep) -> None:
        trial = sweep.trial
        tracker.start_sweep(sweep.run)
        tracker.start_trial(trial, 1)
        bad = Evaluation(step=1, time=1e9, metrics={"val/[AP]": 1.0})
        with pytest.raises(RejectedError, match="val/"):
            tracker.log_points(trial.hash, [bad])
        tracker.log_points(trial.hash, points(1))
        assert len(self.curve(tracker, trial.hash, "train/loss")) == 1

    def test_a_damaged_picture_is_refused(self, tracker, sweep) -> None:
        """And not sent again for ever, with everything behind it."""
        tracker.start_sweep(sweep.run)
        tracker.start_trial(sweep.trial, 1)
        with pytest.raises(RejectedError, match="picture of step 3"):
            tracker.log_picture(sweep.trial.hash, 3, png()[:20])

    def test_a_trial_without_a_run_is_refused(self, tracker, sweep) -> None:
        tracker.start_sweep(sweep.run)
        with pytest.raises(RejectedError, match="has no run"):
            tracker.log_points(sweep.trial.hash, points(1))

    def test_compare_url_names_the_trials_in_the_sweeps_order(self, tracker, sweep) -> None:
        """Those that a search suggested later come last."""
        suggested = replace(sweep.trial, hash="f" * 16, name="suggested/0")
        tracker.start_sweep(sweep.run)
        for trial in (suggested, *reversed(sweep.trials)):
            tracker.start_trial(trial, 1)
        url = tracker.compare_url()
        assert "/#/compare-runs?runs=" in url
        places = [url.index(tracker._runs[trial.hash]) for trial in (*sweep.trials, suggested)]
        assert places == sorted(places)

    def test_the_sweep_has_a_page_of_its_own(self, tracker, sweep) -> None:
        tracker.start_sweep(sweep.run)
        (run,) = tracker._find(f"attributes.run_name = '{sweep.run.name}'")
        assert tracker.sweep_url().endswith(f"/runs/{run.info.run_id}")


class TestMLflowOnSQLite(MLflowContract):
    @pytest.fixture
    def tracker(self, store_folder: Path) -> Tracker:
        uri = f"sqlite:///{store_folder}/mlflow.db"
        return MLflowTracker(uri, artifacts=store_folder / "mlartifacts")


class TestMLflowServer(MLflowContract):
    @pytest.fixture
    def tracker(self, server, tmp_path: Path) -> Tracker:
        return MLflowTracker(server.uri, artifacts=tmp_path)


@pytest.mark.slow
class TestTeamServer(MLflowContract):
    """`cluster/tracking`: PostgreSQL, S3, accounts."""

    @pytest.fixture
    def tracker(self, team_server, account, tmp_path: Path) -> Tracker:
        return MLflowTracker(team_server.uri, artifacts=tmp_path)


def test_an_unreachable_server_is_one_line(sweep, tmp_path: Path) -> None:
    tracker = MLflowTracker("http://user:secret@127.0.0.1:9", artifacts=tmp_path)
    with pytest.raises(TrackingError, match=r"http://127\.0\.0\.1:9: ") as info:
        tracker.start_sweep(sweep.run)
    assert len(str(info.value).splitlines()) == 1
    assert "secret" not in str(info.value)


def test_a_folder_that_cannot_be_made_is_one_line(sweep, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    tracker = MLflowTracker(f"sqlite:///{tmp_path}/file/mlflow.db", artifacts=tmp_path)
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_URI"):
        tracker.start_sweep(sweep.run)


def test_a_store_of_another_version_is_refused_with_the_command_that_migrates_it(
    sweep, store_folder: Path, tmp_path: Path
) -> None:
    MlflowClient(f"sqlite:///{store_folder}/mlflow.db").search_experiments(max_results=1)
    uri = f"sqlite:///{tmp_path}/old.db"
    with (
        closing(sqlite3.connect(f"{store_folder}/mlflow.db")) as new,
        closing(sqlite3.connect(f"{tmp_path}/old.db")) as old,
    ):
        new.backup(old)
        old.execute("UPDATE alembic_version SET version_num = '1b5f0d9ad7c1'")
        old.commit()
    with pytest.raises(
        TrackingError, match=f"copy it, then run `mlflow db upgrade {uri}`$"
    ) as info:
        MLflowTracker(uri, artifacts=tmp_path).start_sweep(sweep.run)
    assert len(str(info.value).splitlines()) == 1
