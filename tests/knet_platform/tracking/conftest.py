"""A small sweep for trackers to follow, a real MLflow server that can be killed, and a proxy in
front of it that misbehaves as it is told."""

import http.client
import os
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

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
        self.store = os.environ.get("KNET_TEST_MLFLOW_STORE", f"sqlite:///{folder}/mlflow.db")
        self._artifacts = os.environ.get("KNET_TEST_MLFLOW_ARTIFACTS", f"{folder}/served")
        self._log = folder / "server.log"
        self._port = free_port(0)
        self.uri = f"http://127.0.0.1:{self._port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = server_command(self.store, self._port)
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


class Proxy:
    """A real HTTP proxy.

    What it does with a request is what `choose` returns, given its body: "pass"; "lose request",
    which cuts the connection before the server hears of it; "lose answer", after the server has
    done it; "slow", which answers when `released` is set; or an HTTP status, its own answer.
    """

    def __init__(self, upstream: str) -> None:
        self.choose: Callable[[bytes], str | int] = lambda body: "pass"
        self.chosen: list[str | int] = []
        self.released = threading.Event()
        self.upstream = upstream
        proxy, target = self, urlsplit(upstream).netloc

        class Handler(BaseHTTPRequestHandler):
            def forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                mode = proxy.choose(body)
                proxy.chosen.append(mode)
                if isinstance(mode, int):
                    self.answer(mode, b"<html>not now</html>", "text/html")
                elif mode != "lose request" and (found := self.ask(body)):
                    if mode == "slow":
                        proxy.released.wait(60)
                    if mode != "lose answer":
                        self.answer(*found)
                        return
                self.close_connection = True

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = forward  # noqa: N815

            def ask(self, body: bytes) -> tuple[int, bytes, str] | None:
                connection = http.client.HTTPConnection(target, timeout=60)
                try:
                    connection.request(self.command, self.path, body, dict(self.headers))
                    answer = connection.getresponse()
                    return answer.status, answer.read(), answer.headers["Content-Type"]
                except OSError:
                    return None
                finally:
                    connection.close()

            def answer(self, code: int, content: bytes, kind: str) -> None:
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: object) -> None:
                """Say nothing."""

        class Listener(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                """Say nothing: connections that break are the point."""

        self._server = Listener(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    proxy = Proxy(server.uri)
    yield proxy
    proxy.close()
