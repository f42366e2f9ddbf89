"""A real MLflow server that dies, answers 429 or 500, is slow or cut off, and a process that dies
with it: what the server has in the end is what was logged, each point once, no run twice."""

import json
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from knet_platform.cli.main import main
from knet_platform.storage import Evaluation
from knet_platform.tracking import JournaledTracker, TrialRun, open_store
from knet_platform.tracking.journal import journal_path

METRICS = ("train/loss", "train/lr", "sys/data_wait")
Open = Callable[[str], JournaledTracker]


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may take its time; what is wrong stays wrong."""
    monkeypatch.setattr("knet_platform.tracking.journaled.CLOSE_SECONDS", 120.0)


@pytest.fixture
def journaled(sweep, tmp_path: Path) -> Open:
    def make(uri: str) -> JournaledTracker:
        return JournaledTracker(
            open_store(uri, tmp_path),
            uri,
            journal_path(tmp_path, sweep.run.name, uri),
            warn=lambda text: None,
            pause=lambda failures: 0.01,
        )

    return make


def log(tracker: JournaledTracker, trial_hash: str, steps: Sequence[int]) -> None:
    for step in steps:
        metrics = {name: step + index / 10 for index, name in enumerate(METRICS)}
        tracker.log_points(trial_hash, [Evaluation(step=step, time=1e9 + step, metrics=metrics)])


def has_points(body: bytes) -> bool:
    return b"train/loss" in body


def stored(uri: str, sweep) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return every point that a store holds, by trial and metric; there is one run per trial."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(sweep.run.name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.trial_hash != ''")
    hashes = Counter(run.data.tags["trial_hash"] for run in runs)
    assert set(hashes.values()) == {1}
    return {
        run.data.tags["trial_hash"]: {
            name: sorted(
                (item.step, item.value)
                for item in client.get_metric_history(run.info.run_id, name)
            )
            for name in METRICS
        }
        for run in runs
    }


def expected(
    trials: Sequence[TrialRun], last: int
) -> dict[str, dict[str, list[tuple[int, float]]]]:
    curves = {
        name: [(step, step + index / 10) for step in range(1, last + 1)]
        for index, name in enumerate(METRICS)
    }
    return {trial.hash: curves for trial in trials}


@pytest.mark.slow
def test_a_network_that_fails_in_every_way_loses_and_doubles_nothing(
    journaled: Open, proxy, sweep
) -> None:
    draw = random.Random(0)
    faults = ["lose request", "lose answer", 429, 500, 502, 503, 404]
    tracker = journaled(proxy.uri)
    tracker.start_sweep(sweep.run)
    proxy.choose = lambda body: draw.choice(faults) if draw.random() < 0.6 else "pass"
    for trial in sweep.trials:
        tracker.start_trial(trial, 1)
    for first in range(1, 121, 10):
        for trial in sweep.trials:
            log(tracker, trial.hash, range(first, first + 10))
    for trial in sweep.trials:
        tracker.log_file(trial.hash, "patch.diff", b"x")
        tracker.finish_trial(trial.hash, "FINISHED")
    tracker.finish_sweep("FINISHED")
    assert set(proxy.chosen) >= {"pass", *faults}
    assert tracker.left() is None
    assert stored(proxy.upstream, sweep) == expected(sweep.trials, 120)


@pytest.mark.slow
def test_an_answer_that_comes_too_late_is_not_sent_twice(
    journaled: Open, proxy, sweep, monkeypatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    tracker = journaled(proxy.uri)
    tracker.start_sweep(sweep.run)
    slow = iter(["slow"] * 3)
    proxy.choose = lambda body: next(slow, "pass") if has_points(body) else "pass"
    for trial in sweep.trials:
        tracker.start_trial(trial, 1)
        log(tracker, trial.hash, range(1, 11))
    tracker.finish_sweep("FINISHED")
    assert proxy.chosen.count("slow") == 3
    assert tracker.left() is None
    assert stored(proxy.upstream, sweep) == expected(sweep.trials, 10)


@pytest.mark.slow
def test_a_server_killed_in_mid_run_is_caught_up_with(
    journaled: Open, proxy, server, sweep
) -> None:
    tracker = journaled(proxy.uri)
    tracker.start_sweep(sweep.run)
    for trial in sweep.trials:
        tracker.start_trial(trial, 1)
    some, more = threading.Event(), threading.Event()

    def die_with_points(body: bytes) -> str:
        if not has_points(body):
            return "pass"
        if not some.is_set():
            some.set()
            return "pass"
        more.set()
        return "lose answer"

    proxy.choose = die_with_points
    for trial in sweep.trials:
        log(tracker, trial.hash, range(1, 26))
    assert some.wait(60)
    for trial in sweep.trials:
        log(tracker, trial.hash, range(26, 51))
    assert more.wait(60)
    server.kill()
    # As far as the store has come, its curves have no holes.
    for curves in stored(server.store, sweep).values():
        for points in curves.values():
            assert points == sorted(set(points))
            assert [step for step, _ in points] == list(range(1, len(points) + 1))
    for trial in sweep.trials:  # nobody waits for a server that is not there
        log(tracker, trial.hash, range(51, 101))
        tracker.finish_trial(trial.hash, "FINISHED")
    proxy.choose = lambda body: "pass"
    server.start()
    tracker.finish_sweep("FINISHED")
    assert tracker.left() is None
    assert stored(server.uri, sweep) == expected(sweep.trials, 100)


DYING = """
import json, os, sys
from pathlib import Path
from knet_platform.storage import Evaluation
from knet_platform.tracking import SweepRun, TrialRun, open_tracker
uri, home, run, trials = sys.argv[1], Path(sys.argv[2]), *map(json.loads, sys.argv[3:])
run = SweepRun.from_dict(run)
tracker = open_tracker(run.name, uri, home, warn=lambda text: None)
tracker.start_sweep(run)
for trial in trials:
    tracker.start_trial(TrialRun(**trial), 1)
for step in range(1, 101):
    for trial in trials:
        metrics = {"train/loss": step, "train/lr": step + 0.1, "sys/data_wait": step + 0.2}
        point = Evaluation(step=step, time=1e9 + step, metrics=metrics)
        tracker.log_points(trial["hash"], [point])
sys.stdin.read()  # until the test has seen points arrive
os.kill(os.getpid(), 9)
"""


def test_what_a_killed_process_left_is_sent_by_sync(
    proxy, sweep, tmp_path: Path, monkeypatch, capsys
) -> None:
    doubtful = threading.Event()

    def lose_answers(body: bytes) -> str:
        """The server takes the first points; nobody learns of it."""
        if not has_points(body):
            return "pass"
        doubtful.set()
        return "lose answer"

    proxy.choose = lose_answers
    described = [json.dumps(asdict(sweep.run)), json.dumps([asdict(t) for t in sweep.trials])]
    dying = subprocess.Popen(
        [sys.executable, "-c", DYING, proxy.uri, str(tmp_path), *described], stdin=subprocess.PIPE
    )
    assert doubtful.wait(60)
    dying.communicate(timeout=60)
    assert dying.returncode == -9
    monkeypatch.setenv("KNET_HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert main(["sync"]) == 2
    assert f"wait: for {proxy.uri}: set MLFLOW_TRACKING_URI to it" in capsys.readouterr().out

    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.uri)
    proxy.choose = lambda body: "pass"
    assert main(["sync", "--json", sweep.run.name]) == 0
    (outcome,) = json.loads(capsys.readouterr().out)
    assert outcome["sent"] > 0
    assert (outcome["waiting"], outcome["refused"], outcome["problem"]) == (0, 0, None)
    assert stored(proxy.upstream, sweep) == expected(sweep.trials, 100)
    assert main(["sync"]) == 0
    assert capsys.readouterr().out == "nothing waits\n"


@pytest.mark.parametrize("kind", ["sqlite", "server"])
def test_sixteen_trials_log_at_once(kind, server, store_folder, tmp_path, sweep) -> None:
    """Each through a tracker and a connection of its own, as sweeps that share a store do."""
    uri = server.uri if kind == "server" else f"sqlite:///{store_folder}/mlflow.db"
    trials = [replace(sweep.trial, hash=f"{number:016x}") for number in range(16)]
    warnings: list[str] = []
    trackers = []
    for number, trial in enumerate(trials):
        path = journal_path(tmp_path, f"{sweep.run.name}-{number}", uri)
        tracker = JournaledTracker(open_store(uri, tmp_path), uri, path, warn=warnings.append)
        tracker.start_sweep(sweep.run)
        tracker.start_trial(trial, 1)
        trackers.append(tracker)
    together = threading.Barrier(len(trials))

    def work(tracker: JournaledTracker, trial: TrialRun) -> None:
        together.wait(60)
        log(tracker, trial.hash, range(1, 41))
        tracker.finish_trial(trial.hash, "FINISHED")
        tracker.close(120)

    with ThreadPoolExecutor(len(trials)) as pool:
        list(pool.map(work, trackers, trials))
    if kind == "server":  # a file takes one writer at a time: on a busy machine others may wait
        assert warnings == []  # longer than they have patience, say so, and send it once more
    assert [tracker.left() for tracker in trackers] == [None] * 16
    assert stored(uri, sweep) == expected(trials, 40)
