"""What a finished trial leaves, for tests that need no training; a bucket on a real server."""

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import boto3
import pytest

from knet_platform.storage import TrialResult

_RESULT = TrialResult(
    trial_hash="",
    step=100,
    metrics={"val/AP": 0.3},
    evaluations=(),
    checkpoint="checkpoint_100",
    num_parameters=1,
    seconds=60.0,
    wall_seconds=70.0,
    device="cpu",
    workers=1,
    finished_at="2026-01-01T00:00:00+00:00",
)


@pytest.fixture
def finished() -> Callable[..., TrialResult]:
    """Return a function that makes the result of the trial of that hash, changed as asked."""

    def make(trial_hash: str, **changes: Any) -> TrialResult:
        return replace(_RESULT, trial_hash=trial_hash, **changes)

    return make


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Moto's S3 in a process of its own; gives its address."""
    from knet_platform.cli.ui import free_port

    port = free_port(0)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(f"{address}/moto-api/", timeout=1):
                break
        except OSError:
            assert server.poll() is None, "moto's server has ended"
            assert time.monotonic() < deadline, "moto's server does not answer"
            time.sleep(0.05)  # nothing tells when a server of its own process listens
    yield address
    server.kill()
    server.wait(10)


@pytest.fixture
def s3_uri(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix in a bucket: `KNET_TEST_S3` with the credentials in use, else on moto's server."""
    if given := os.environ.get("KNET_TEST_S3"):
        return given
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("s3_server"))
    boto3.client("s3").create_bucket(Bucket="knet-test")
    return "s3://knet-test/some/prefix"
