"""`cluster/tracking` as a team runs it: who gets in, what is where, and back from a backup."""

import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import boto3
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from knet_platform.storage import Evaluation
from knet_platform.tracking.mlflow import MLflowTracker

TRACKING = Path(__file__).parents[3] / "cluster" / "tracking"

pytestmark = pytest.mark.slow


def status(uri: str, **headers: str) -> int:
    request = urllib.request.Request(f"{uri}/api/2.0/mlflow/experiments/search?max_results=1")
    for name, value in headers.items():
        request.add_header(name, value)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def test_nobody_gets_in_without_a_password(team_server, monkeypatch) -> None:
    assert status(team_server.uri) == 401
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "password1234")
    with pytest.raises(MlflowException):
        MlflowClient(team_server.uri).search_experiments()


def test_a_foreign_name_is_refused(team_server) -> None:
    assert status(team_server.uri, Host="evil.example") == 403


def test_secrets_are_for_the_owner_alone_and_stay(team_server) -> None:
    before = {file.name: file.read_text() for file in team_server.secrets.iterdir()}
    assert set(before) == {"database_password", "admin_password", "session_key"}
    assert all(len(value) == 32 for value in before.values())
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in team_server.secrets.iterdir())
    folder = team_server.secrets.parent
    subprocess.run([TRACKING / "init.sh", "elsewhere", "s3://other", folder], check=True)
    assert {file.name: file.read_text() for file in team_server.secrets.iterdir()} == before
    assert "elsewhere" not in (folder / ".env").read_text()


def test_compose_names_what_init_writes(team_server) -> None:
    compose = yaml.safe_load((TRACKING / "compose.yaml").read_text())
    files = {secret["file"] for secret in compose["secrets"].values()}
    assert files == {f"secrets/{file.name}" for file in team_server.secrets.iterdir()}
    assert set(compose["services"]["server"]["secrets"]) == set(compose["secrets"])


def test_large_files_go_to_the_bucket_in_parts_without_its_credentials(
    team_server, account, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "true")
    monkeypatch.setenv("MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE", str(6 * 2**20))
    monkeypatch.setenv("MLFLOW_MULTIPART_UPLOAD_CHUNK_SIZE", str(5 * 2**20))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "weights.bin"
    file.write_bytes(bytes(range(256)) * (11 * 2**12))
    client = MlflowClient(team_server.uri)
    run = client.create_run(client.create_experiment("parts")).info.run_id
    client.log_artifact(run, str(file))
    back = Path(client.download_artifacts(run, "weights.bin"))
    assert back.read_bytes() == file.read_bytes()


def test_a_backup_brings_everything_back(
    team_server, account, s3_uri: str, sweep, tmp_path: Path
) -> None:
    tracker = MLflowTracker(team_server.uri, artifacts=tmp_path)
    tracker.start_sweep(sweep.run)
    tracker.start_trial(sweep.trial, 1)
    tracker.log_points(sweep.trial.hash, [Evaluation(step=3, time=1e9, metrics={"val/AP": 0.3})])
    tracker.log_file(sweep.trial.hash, "patch.diff", b"the patch")
    tracker.finish_trial(sweep.trial.hash, "FINISHED")
    run = tracker._runs[sweep.trial.hash]

    backup = tmp_path / "backup"
    subprocess.run([TRACKING / "backup.sh", backup], env=team_server.environment, check=True)
    team_server.kill()
    team_server.database.clear()
    name, _, prefix = s3_uri.removeprefix("s3://").partition("/")
    boto3.resource("s3").Bucket(name).objects.filter(Prefix=f"{prefix}/mlflow/").delete()
    subprocess.run([TRACKING / "restore.sh", backup], env=team_server.environment, check=True)
    team_server.start()

    client = MlflowClient(team_server.uri)
    found = client.get_run(run)
    assert (found.info.status, found.data.metrics) == ("FINISHED", {"val/AP": 0.3})
    assert found.data.tags["trial_hash"] == sweep.trial.hash
    assert Path(client.download_artifacts(run, "patch.diff")).read_bytes() == b"the patch"


def test_a_backup_never_replaces_another(team_server, tmp_path: Path) -> None:
    (tmp_path / "backup").mkdir()
    done = subprocess.run(
        [TRACKING / "backup.sh", tmp_path / "backup"],
        env=team_server.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.strip() == f"{tmp_path}/backup: exists; expected a new folder"
