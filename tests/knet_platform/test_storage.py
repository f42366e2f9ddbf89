"""One seam over local paths and S3, which is a real server's."""

import errno
import json
import os
from dataclasses import replace

import pytest

from knet_core import DiskFullError
from knet_platform import attempts
from knet_platform.errors import StorageError
from knet_platform.storage import Evaluation, Failure, Pruned, Store, TrialResult, TrialStore

RESULT = TrialResult(
    trial_hash="ab",
    step=300,
    metrics={"val/AP": 0.31},
    evaluations=(Evaluation(step=150, time=1.5, metrics={"val/AP": 0.2}),),
    checkpoint="checkpoint_300",
    num_parameters=12,
    seconds=60.0,
    wall_seconds=75.0,
    device="cpu",
    workers=2,
    finished_at="2026-01-01T00:00:00+00:00",
)
FAILURE = Failure(
    cause="data",
    kind="DataError",
    message="no image",
    action="stopped the trial",
    attempt=1,
    step=5,
    at="2026-01-01T00:00:00+00:00",
)
FILES = ("model.safetensors", "trainer.pt", "state.json", "recipe.yaml")


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path):
    if request.param == "local":
        return Store(str(tmp_path / "storage"))
    return Store(f"{request.getfixturevalue('s3_uri')}/{tmp_path.name}")


def add_checkpoint(trial, step: int, files=FILES) -> None:
    state = {
        "format": 1,
        "step": step,
        "epoch": 1.0,
        "categories": [{"id": 1, "name": "disc"}],
        "metrics": {"val/AP": 0.2},
        "evaluations": [{"step": step, "time": 1.5, "metrics": {"val/AP": 0.2}}],
        "seconds": 12.5,
        "num_parameters": 3,
    }
    for name in files:
        content = json.dumps(state) if name == "state.json" else "{}"
        trial.write_bytes(f"checkpoint_{step}/{name}", content.encode())


def test_a_trial_goes_from_new_over_partial_and_failed_to_finished(store):
    trial = store.trial("ab")
    assert (trial.status(), trial.result(), trial.failure()) == ("new", None, None)
    add_checkpoint(trial, 5)
    assert trial.status() == "partial"
    trial.write_failure(FAILURE)
    assert (trial.status(), trial.failure()) == ("failed", FAILURE)
    trial.clear_failure()
    trial.clear_failure()
    assert trial.status() == "partial"
    trial.write_failure(FAILURE)
    trial.write_result(RESULT)
    assert (trial.status(), trial.result(), trial.failure()) == ("finished", RESULT, None)
    assert store.trial("cd").status() == "new"


def test_every_failure_stays_on_record_and_one_may_have_ended_the_trial(store):
    trial = store.trial("ab")
    assert trial.failures() == ()
    lost = replace(FAILURE, cause="preempted", action="retried from step 5")
    trial.write_failure(lost, final=False)
    assert (trial.failures(), trial.failure(), trial.status()) == ((lost,), None, "new")
    trial.write_bytes("failures/nonfinite_3.pt", b"what explains a failure is kept beside it")
    for attempt in range(2, 12):
        trial.write_failure(replace(FAILURE, attempt=attempt))
    assert [failure.attempt for failure in trial.failures()] == list(range(1, 12))
    assert trial.failure() == trial.failures()[-1]
    trial.clear_failure()
    trial.write_result(RESULT)
    assert (trial.failure(), len(trial.failures())) == (None, 11)


def test_a_pruned_trial_is_so_until_it_goes_on_or_ends_otherwise(store):
    trial = store.trial("ab")
    pruned = Pruned(sweep="s", run="r", step=40, total=120)
    assert trial.pruned() is None
    trial.write_pruned(pruned)
    assert (trial.pruned(), trial.status()) == (pruned, "new")
    add_checkpoint(trial, 40)
    assert trial.status() == "partial"  # to any sweep but the one that pruned it
    trial.write_failure(FAILURE)
    assert trial.pruned() is None
    trial.clear_failure()
    assert trial.pruned() == pruned
    trial.clear_pruned()
    trial.clear_pruned()
    assert trial.pruned() is None
    trial.write_pruned(pruned)
    trial.write_result(RESULT)
    assert trial.pruned() is None
    trial.write_pruned(pruned)  # decided while the trial came to its end
    assert (trial.pruned(), trial.status()) == (None, "finished")


def test_the_newest_complete_checkpoint_is_found_by_number(store):
    trial = store.trial("ab")
    assert trial.latest_checkpoint() is None
    assert trial.state() is None
    for step in (5, 100, 20):
        add_checkpoint(trial, step)
    add_checkpoint(trial, 200, files=FILES[:2])
    assert trial.latest_checkpoint() == "checkpoint_100"
    state = trial.state()
    assert (state.step, state.seconds) == (100, 12.5)


def test_points_are_whole_and_each_is_there_once(store):
    trial = store.trial("ab")
    assert trial.points() == ()

    def point(step: int, **metrics: float) -> Evaluation:
        return Evaluation(step=step, time=float(step), metrics=metrics)

    trial.write_points(0, [point(1, loss=3.0)])
    trial.write_points(0, [point(1, loss=3.0), point(2, loss=2.0), point(2, ap=0.1)])
    trial.write_points(2, [point(3, loss=1.0), point(4, loss=0.5)])  # died, and began at 2 again
    trial.write_points(2, [point(3, loss=1.0)])
    assert trial.points() == (point(1, loss=3.0), point(2, loss=2.0, ap=0.1), point(3, loss=1.0))
    # The checkpoint of step 2 was lost: what follows is measured again from the start.
    trial.write_points(0, [point(1, loss=3.5), point(2, loss=2.5), point(3, loss=1.5)])
    assert [item.step for item in trial.points()] == [1, 2, 3]


def test_files_are_listed_and_read_back(store):
    trial = store.trial("ab")
    assert trial.list("pictures") == []
    for step in (2, 1):
        trial.write_bytes(f"pictures/step_{step}.png", b"png")
    trial.write_bytes("pictures/step_1.png", b"newer")
    assert trial.list("pictures") == ["step_1.png", "step_2.png"]
    assert trial.read_bytes("pictures/step_1.png") == b"newer"
    assert trial.uri == f"{store.uri}/trials/ab"


def test_a_missing_file_is_one_line(store):
    with pytest.raises(StorageError, match="cannot read") as caught:
        store.trial("ab").read_bytes("gone")
    assert "\n" not in str(caught.value)


def test_looking_creates_nothing(tmp_path):
    trial = Store(str(tmp_path / "storage")).trial("ab")
    assert (trial.status(), trial.result(), trial.list()) == ("new", None, [])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    trial = Store(str(tmp_path)).trial("ab")
    trial.write_result(RESULT)

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DiskFullError, match="no space left"):
        trial.write_bytes("result.json", b"a longer text")
    assert [path.name for path in (tmp_path / "trials/ab").iterdir()] == ["result.json"]
    assert trial.result() == RESULT


def test_a_damaged_result_is_named(tmp_path):
    trial = Store(str(tmp_path)).trial("ab")
    trial.write_bytes("result.json", b"{")
    with pytest.raises(StorageError, match=r"result\.json: not valid JSON"):
        trial.result()


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("result.json", TrialStore.result),
        ("failure.json", TrialStore.failure),
        ("failures/0001.json", TrialStore.failures),
        ("pruned.json", TrialStore.pruned),
        ("provenance.json", TrialStore.provenance),
        ("curves/000000.json", TrialStore.points),
        ("attempt.json", attempts.count),
    ],
)
def test_a_file_of_another_version_is_refused_with_what_to_do(tmp_path, name, read):
    trial = Store(str(tmp_path)).trial("ab")
    values = {"of_next_year": 1}
    content = json.dumps([values] if "curves" in name else values).encode()
    trial.write_bytes(name, content)
    said = rf"{name}: written by another version of knet \(.*\); use that version, or delete"
    with pytest.raises(StorageError, match=said) as caught:
        read(trial)
    assert "\n" not in str(caught.value)
    assert trial.read_bytes(name) == content


def test_results_are_plain_json(tmp_path):
    trial = Store(str(tmp_path)).trial("ab")
    trial.write_result(RESULT)
    assert json.loads(trial.read_bytes("result.json"))["metrics"] == {"val/AP": 0.31}


def test_other_stores_are_refused():
    with pytest.raises(StorageError, match="expected a local path or s3://"):
        Store("gs://bucket")
