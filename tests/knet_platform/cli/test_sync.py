"""`knet sync` through the command line; exactly-once delivery is tested with the tracker."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from knet_platform.cli.main import main
from knet_platform.home import tracking_uri
from knet_platform.tracking import Journal, SweepRun, TrialRun
from knet_platform.tracking.journal import journal_path

TRIAL = TrialRun(hash="ab", name="1/0", sweep="s", arm="1", seed=0, params={"seed": "0"})


def points(*steps: int) -> list[dict[str, object]]:
    return [{"step": step, "time": 1e9, "metrics": {"train/loss": 1.0 / step}} for step in steps]


Leave = Callable[..., Path]


@pytest.fixture
def leave(home: Path) -> Leave:
    """Leave a journal as a run does whose store went away."""

    def leave(name: str, uri: str) -> Path:
        path = journal_path(home, name, uri)
        journal = Journal(path, warn=print)
        journal.describe(uri, SweepRun(name=name, baseline="1", git_sha="unknown", trials=("ab",)))
        trial = {**{key: getattr(TRIAL, key) for key in TRIAL.__slots__}, "sweep": name}
        journal.append("start_trial", "ab", trial=trial, attempt=2, at=1e9)
        journal.append("log_points", "ab", points=points(1, 2))
        journal.append("log_points", "ab", points=points(2, 3))
        journal.append("finish_trial", "ab", status="FINISHED", reason="", at=1e9 + 60)
        journal.append("finish_sweep", status="FINISHED", artifacts=[], at=1e9 + 61)
        journal.close()
        return path

    return leave


def test_what_waits_is_sent_and_its_journal_goes(
    leave: Leave, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = tracking_uri()
    first, second = leave("first", uri), leave("second", uri)
    assert main(["sync", "first"]) == 0
    assert capsys.readouterr().out == "first: 5 updates sent\n"
    assert not first.exists()
    assert second.exists()
    assert main(["sync", "--json"]) == 0
    (outcome,) = json.loads(capsys.readouterr().out)
    assert (outcome["sweep"], outcome["sent"], outcome["waiting"]) == ("second", 5, 0)
    client = MlflowClient(uri)
    for name in ("first", "second"):
        experiment = client.get_experiment_by_name(name)
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id])
        assert {run.info.run_name: run.info.status for run in runs} == {
            name: "FINISHED",
            "1/0": "FINISHED",
        }
        (run,) = (run for run in runs if run.info.run_name == "1/0")
        assert (run.info.start_time, run.info.end_time) == (1e12, 1e12 + 60e3), "not of the sync"
        history = client.get_metric_history(run.info.run_id, "train/loss")
        assert sorted(point.step for point in history) == [1, 2, 3]
    assert main(["sync"]) == 0
    assert capsys.readouterr().out == "nothing waits\n"


def test_a_store_that_is_away_keeps_its_journal_waiting(
    leave: Leave, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("knet_platform.cli.sync.pause", lambda failures: 0.0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    path = leave("s", "http://127.0.0.1:9")
    assert main(["sync"]) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("s: 0 updates sent, 5 wait: MLFLOW_TRACKING_URI: http://127.0.0.1:9: ")
    assert path.exists()


def test_a_journal_for_another_store_is_not_sent_to_this_one(
    leave: Leave, capsys: pytest.CaptureFixture[str]
) -> None:
    path = leave("s", "http://someone:secret@mlflow.example:5000")
    assert main(["sync"]) == 2
    out = capsys.readouterr().out
    assert out == (
        "s: 0 updates sent, 5 wait: for http://mlflow.example:5000: "
        "set MLFLOW_TRACKING_URI to it\n"
    )
    assert path.exists()


def test_a_running_sweep_is_left_alone(leave: Leave, capsys: pytest.CaptureFixture[str]) -> None:
    path = leave("s", tracking_uri())
    running = Journal(path, warn=print)
    assert main(["sync"]) == 2
    assert "another process uses this journal" in capsys.readouterr().out
    assert len(running) == 5
    running.close()
