"""A small sweep for trackers to follow, and a real MLflow server that can be killed."""

import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from knet_platform.cli.ui import free_port, server_command
from knet_platform.planning import load_sweep
from knet_platform.tracking import SweepRun, TrialRun

SWEEP = """\
# Rounds of kernel update
name: NAME
base: recipe.yaml
metric: {name: val/AP, mode: max}
seeds: [0, 1]
baseline: "2"
arms:
  "1": {model.stages: 1}
  "2": {model.stages: 2}
"""


@dataclass(frozen=True, kw_only=True)
class Followed:
    """A sweep and its trials as trackers hear of them."""

    run: SweepRun
    trials: tuple[TrialRun, ...]

    @property
    def trial(self) -> TrialRun:
        return self.trials[0]


@pytest.fixture
def sweep(tmp_path: Path, request: pytest.FixtureRequest) -> Followed:
    """Under a name of its own for each test, since tests share a store."""
    name = f"{request.cls.__name__}-{request.node.name}" if request.cls else request.node.name
    (tmp_path / "recipe.yaml").write_text("data: {format: shapes}\n")
    path = tmp_path / "stages.yaml"
    path.write_text(SWEEP.replace("NAME", "".join(c if c.isalnum() else "-" for c in name)))
    loaded = load_sweep(path)
    return Followed(
        run=SweepRun.of(loaded), trials=tuple(TrialRun.of(trial) for trial in loaded.trials)
    )


@pytest.fixture(scope="session")
def store_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One MLflow store for all: making its tables takes seconds."""
    return tmp_path_factory.mktemp("store")


class Server:
    """A real `mlflow server` over that store, on a port of the system's choice."""

    def __init__(self, folder: Path) -> None:
        # Another database and bucket may be given: what is tested is the same.
        self._backend = os.environ.get("KNET_TEST_MLFLOW_STORE", f"sqlite:///{folder}/mlflow.db")
        self._artifacts = os.environ.get("KNET_TEST_MLFLOW_ARTIFACTS", f"{folder}/served")
        self._log = folder / "server.log"
        self._port = free_port(0)
        self.uri = f"http://127.0.0.1:{self._port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = server_command(self._backend, self._port)
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--artifacts-destination", self._artifacts],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 90
        while True:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                    return
            except OSError:
                assert self.process.poll() is None, self._log.read_text()[-2000:]
                assert time.monotonic() < deadline, self._log.read_text()[-2000:]
                time.sleep(0.05)  # nothing tells when a server of its own process listens

    def kill(self) -> None:
        """End it and its workers as a power cut would."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)
            self.process = None


@pytest.fixture(scope="session")
def server(store_folder: Path) -> Iterator[Server]:
    server = Server(store_folder)
    server.start()
    yield server
    server.kill()
