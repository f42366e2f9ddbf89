"""Checkpoints in a folder and in a bucket of a real HTTP server; `KNET_TEST_S3` names another."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from knet_core import CheckpointError, DiskFullError, NewerFormatError
from knet_platform.checkpoints import Retention
from knet_platform.errors import StorageError
from knet_platform.storage import Store

AP = Retention(metric="val/AP", mode="max", best=1)


def make(folder: Path, step: int, ap: float | None = None, size: int = 100) -> Path:
    """Write a checkpoint as a run does, with weights of some size."""
    evaluations = [] if ap is None else [{"step": step, "time": 1.5, "metrics": {"val/AP": ap}}]
    state = {
        "format": 2,
        "step": step,
        "epoch": 1.0,
        "categories": [{"id": 1, "name": "disc"}],
        "metrics": {},
        "evaluations": evaluations,
        "seconds": 12.5,
        "num_parameters": 3,
    }
    contents = {
        "model.safetensors": os.urandom(size),
        "trainer.pt": b"trainer",
        "state.json": json.dumps(state).encode(),
        "recipe.yaml": b"seed: 0\n",
    }
    records = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    }
    checkpoint = folder / f"checkpoint_{step}"
    checkpoint.mkdir(parents=True)
    for name, content in contents.items():
        (checkpoint / name).write_bytes(content)
    manifest = {"format": 2, "files": records}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    return checkpoint


@pytest.fixture(params=["local", "s3"])
def trial(request, tmp_path):
    if request.param == "local":
        return Store(str(tmp_path / "storage")).trial("ab")
    return Store(f"{request.getfixturevalue('s3_uri')}/{tmp_path.name}").trial("ab")


def test_what_is_put_is_found_and_read_back_byte_for_byte(trial, tmp_path):
    source = make(tmp_path, 5, size=40 * 2**20)  # in parts
    trial.checkpoints.put(source)
    assert trial.latest_checkpoint() == "checkpoint_5"
    assert trial.checkpoints.newest_undamaged() == ("checkpoint_5", [])
    with trial.checkpoints.open("checkpoint_5") as folder:
        for path in source.iterdir():
            assert (folder / path.name).read_bytes() == path.read_bytes()
    assert trial.state().step == 5


def test_putting_a_step_again_replaces_all_of_it(trial, tmp_path):
    trial.checkpoints.put(make(tmp_path / "a", 5))
    trial.write_bytes("checkpoint_5/left_over", b"")
    second = make(tmp_path / "b", 5)
    trial.checkpoints.put(second)
    with trial.checkpoints.open("checkpoint_5") as folder:
        names = {path.name for path in folder.iterdir()}
        assert names == {path.name for path in second.iterdir()}
        weights = (folder / "model.safetensors").read_bytes()
    assert weights == (second / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "content"),
    [("manifest.json", None), ("model.safetensors", b""), ("trainer.pt", None)],
)
def test_a_checkpoint_that_is_not_complete_is_passed_and_named(trial, tmp_path, name, content):
    trial.checkpoints.put(make(tmp_path, 5))
    trial.checkpoints.put(make(tmp_path, 10))
    trial.delete(f"checkpoint_10/{name}")
    if content is not None:
        trial.write_bytes(f"checkpoint_10/{name}", content)
    assert (trial.latest_checkpoint(), trial.status()) == ("checkpoint_5", "partial")
    found, (problem,) = trial.checkpoints.newest_undamaged()
    assert found == "checkpoint_5"
    assert problem.startswith(f"{trial.uri}/checkpoint_10: ")


def test_a_damaged_checkpoint_is_named_once_and_never_used_again(trial, tmp_path):
    trial.checkpoints.put(make(tmp_path, 5))
    trial.checkpoints.put(make(tmp_path, 10))
    trial.write_bytes("checkpoint_10/model.safetensors", bytes(100))
    assert trial.latest_checkpoint() == "checkpoint_10"  # names and sizes are right
    found, (problem,) = trial.checkpoints.newest_undamaged()
    assert found == "checkpoint_5"
    assert problem.startswith(
        f"{trial.uri}/checkpoint_10: model.safetensors: cut short or damaged (its SHA-256"
    )
    assert trial.latest_checkpoint() == "checkpoint_5"
    trial.checkpoints.put(make(tmp_path / "again", 10))
    assert trial.checkpoints.newest_undamaged() == ("checkpoint_10", [])


def test_a_checkpoint_that_is_damaged_before_it_is_put_is_refused(trial, tmp_path):
    source = make(tmp_path, 5)
    (source / "trainer.pt").write_bytes(b"trainr!")
    with pytest.raises(CheckpointError, match=r"trainer\.pt: cut short or damaged"):
        trial.checkpoints.put(source)
    assert trial.list() == []


def test_a_newer_format_is_not_taken_for_damage(trial, tmp_path):
    trial.checkpoints.put(make(tmp_path, 5))
    manifest = json.loads(trial.read_bytes("checkpoint_5/manifest.json"))
    trial.write_bytes("checkpoint_5/manifest.json", json.dumps(manifest | {"format": 3}).encode())
    with pytest.raises(NewerFormatError, match="update knet"):
        trial.checkpoints.newest_undamaged()


def test_the_newest_two_and_the_best_stay(trial, tmp_path):
    for step, ap in ((5, 0.1), (10, 0.4), (15, 0.2), (18, None), (20, 0.3)):
        trial.checkpoints.put(make(tmp_path, step, ap))
    trial.write_bytes("checkpoint_17/model.safetensors", b"of a worker that died")
    trial.write_bytes("checkpoint_25/model.safetensors", b"on its way")
    assert trial.checkpoints.best(AP) == ["checkpoint_10"]
    gone = trial.checkpoints.thin_out(AP)
    assert gone == ["checkpoint_17", "checkpoint_15", "checkpoint_5"]
    left = ["checkpoint_25", "checkpoint_20", "checkpoint_18", "checkpoint_10"]
    assert trial.checkpoints.names() == left
    assert trial.checkpoints.thin_out(AP) == []


def test_a_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
    trial = Store(str(tmp_path / "storage")).trial("ab")
    trial.checkpoints.put(make(tmp_path / "a", 5))

    def fsync(descriptor):
        raise OSError(28, "No space left on device")

    again, later = make(tmp_path / "b", 5), make(tmp_path / "b", 10)
    monkeypatch.setattr(os, "fsync", fsync)
    for source in (again, later):
        with pytest.raises(DiskFullError, match="no space left"):
            trial.checkpoints.put(source)
    assert trial.checkpoints.newest_undamaged() == ("checkpoint_5", [])
    folder = tmp_path / "storage/trials/ab"
    assert list(folder.iterdir()) == [folder / "checkpoint_5"]


PUT = """
import sys
from pathlib import Path
from knet_platform.storage import Store
Store(sys.argv[1]).trial("ab").checkpoints.put(Path(sys.argv[2]))
"""


CUT = b""
"""Ends a connection, see `before_s3`."""


def answer(status: str, code: str = "") -> bytes:
    body = f"<Error><Code>{code}</Code><Message>no</Message></Error>" if code else ""
    return (
        f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}"
    ).encode()


@pytest.mark.parametrize("fault", [answer("500 Error"), answer("503 Slow Down"), CUT])
def test_passing_faults_of_s3_are_sat_out(s3_uri, tmp_path, before_s3, fault):
    told = []

    def meddle(line: str, count: int) -> bytes | None:
        if "partNumber" in line and len(told) < 3:
            told.append(line)
            return fault
        return None

    source = make(tmp_path, 5, size=40 * 2**20)
    with before_s3(meddle):
        trial = Store(f"{s3_uri}/{tmp_path.name}").trial("ab")
        trial.checkpoints.put(source)
        assert len(told) == 3
        assert trial.checkpoints.newest_undamaged() == ("checkpoint_5", [])


def test_an_upload_that_is_killed_between_files_leaves_the_one_before(s3_uri, tmp_path, before_s3):
    uri = f"{s3_uri}/{tmp_path.name}"
    Store(uri).trial("ab").checkpoints.put(make(tmp_path, 5))
    source, processes = make(tmp_path, 10), []

    def meddle(line: str, count: int) -> bytes | None:
        if line.startswith("PUT") and "trainer.pt" in line:
            processes[0].send_signal(signal.SIGKILL)
            return CUT
        return None

    with before_s3(meddle):
        processes.append(subprocess.Popen([sys.executable, "-c", PUT, uri, str(source)]))
        assert processes[0].wait(60) == -signal.SIGKILL
    trial = Store(uri).trial("ab")
    assert trial.list("checkpoint_10") != []
    assert trial.latest_checkpoint() == "checkpoint_5"
    trial.checkpoints.put(source)
    assert trial.checkpoints.newest_undamaged() == ("checkpoint_10", [])


@pytest.mark.parametrize(
    ("fault", "advice"),
    [
        (answer("403 Forbidden", "InvalidAccessKeyId"), "check the credentials in use"),
        (answer("403 Forbidden", "AccessDenied"), "allow these credentials s3:ListBucket"),
        (answer("404 Not Found", "NoSuchBucket"), "create the bucket"),
    ],
)
def test_what_s3_refuses_is_one_line_with_the_mend(s3_uri, tmp_path, before_s3, fault, advice):
    with before_s3(lambda line, count: fault):
        trial = Store(f"{s3_uri}/{tmp_path.name}").trial("ab")
        for act in (
            trial.status,
            lambda: trial.write_bytes("a", b""),
            lambda: trial.read_bytes("a"),
            lambda: trial.checkpoints.put(make(tmp_path, 5)),
        ):
            with pytest.raises(StorageError) as error:
                act()
            assert "\n" not in str(error.value)
            assert advice in str(error.value)
            assert os.environ["AWS_SECRET_ACCESS_KEY"] not in str(error.value).split()


def test_a_missing_bucket_is_named(s3_uri):
    with pytest.raises(StorageError, match=r"s3://nobody-made-it/x/trials.*create the bucket"):
        Store("s3://nobody-made-it/x").hashes()


def test_a_machine_without_credentials_is_told_where_they_come_from(s3_uri, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(StorageError, match="set AWS_PROFILE"):
        Store(s3_uri).hashes()
