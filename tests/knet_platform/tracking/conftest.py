"""A small sweep for trackers to follow, a proxy that misbehaves as told, and a team's server."""

import http.client
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from knet_platform.planning import load_sweep
from knet_platform.tracking import SweepRun, TrialRun

TRACKING = Path(__file__).parents[3] / "cluster" / "tracking"

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
def proxy(server) -> Iterator[Proxy]:
    proxy = Proxy(server.uri)
    yield proxy
    proxy.close()


class Database:
    """A PostgreSQL of its own, on a Unix socket only, with a password.

    Args:
        folder: Short (a socket's path has 107 characters), and open to the account that runs it:
            PostgreSQL refuses to be root's.
        password: Of its user `mlflow`.
        start: Starts its process.
    """

    def __init__(self, folder: Path, password: str, start: Callable[..., Any]) -> None:
        versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
        assert versions, "no PostgreSQL; expected Debian's: apt-get install postgresql"
        self._programs = versions[-1]
        self._user = "postgres" if os.geteuid() == 0 else None
        if self._user:
            shutil.chown(folder, self._user)
        self.environment = {
            "PATH": f"{self._programs}{os.pathsep}{os.environ['PATH']}",
            "PGHOST": str(folder),
            "PGUSER": "mlflow",
            "PGPASSWORD": password,
        }
        (folder / "password").write_text(password)
        (folder / "password").chmod(0o644)
        self._run(
            *("initdb", "--pgdata", folder / "data", "--username", "mlflow"),
            *("--auth", "scram-sha-256", "--pwfile", folder / "password", "--no-sync"),
        )
        self._process = start(
            [
                *(self._programs / "postgres", "-D", folder / "data", "-F"),
                *("-c", "listen_addresses=", "-c", f"unix_socket_directories={folder}"),
            ],
            folder / "log",
            user=self._user,
            cwd=folder,
        )
        deadline = time.monotonic() + 60
        while self._run("pg_isready", "--quiet", check=False):
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.05)  # nothing tells when a server of its own process listens
        self._run("createdb", "mlflow")

    def clear(self) -> None:
        """Lose everything."""
        self._run("dropdb", "--force", "mlflow")
        self._run("createdb", "mlflow")

    def stop(self) -> None:
        self._process.stop()  # whoever is connected

    def _run(self, program: str, *arguments: object, check: bool = True) -> int:
        return subprocess.run(
            [self._programs / program, *map(str, arguments)],
            user=self._user,
            cwd="/",
            env={**os.environ, **self.environment},
            check=check,
            stdout=subprocess.DEVNULL,
        ).returncode


class TeamServer:
    """What `cluster/tracking` deploys, from its own files: accounts, PostgreSQL and a bucket."""

    def __init__(
        self,
        folder: Path,
        port: int,
        artifacts: str,
        s3: dict[str, str],
        start: Callable[..., Any],
    ) -> None:
        self._start = start
        self._log = folder / "server.log"
        self._port = port
        self.uri = f"http://127.0.0.1:{port}"
        subprocess.run([TRACKING / "init.sh", "127.0.0.1:*", artifacts, folder], check=True)
        self.secrets = folder / "secrets"
        self.password = (self.secrets / "admin_password").read_text()
        socket_folder = Path(tempfile.mkdtemp(prefix="knet-pg-"))
        self._socket_folder = socket_folder
        password = (self.secrets / "database_password").read_text()
        self.database = Database(socket_folder, password, start)
        settings = dict(
            line.split("=", 1)
            for line in (folder / ".env").read_text().splitlines()
            if line and not line.startswith("#")
        )
        self.environment = {
            **os.environ,
            **self.database.environment,
            **settings,
            **s3,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}"
            f"{self.database.environment['PATH']}",
        }
        self._process: Any = None

    def start(self) -> None:
        places = {
            "KNET_SECRETS": str(self.secrets),
            "KNET_BIND": "127.0.0.1",
            "KNET_PORT": str(self._port),
            "KNET_WORKERS": "1",
        }
        self._process = self._start(
            [TRACKING / "serve.sh"],
            self._log,
            f"{self.uri}/health",
            env={**self.environment, **places},
        )

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process = None

    def close(self) -> None:
        self.kill()
        self.database.stop()
        shutil.rmtree(self._socket_folder)


@pytest.fixture(scope="session")
def team_server(
    tmp_path_factory: pytest.TempPathFactory,
    bucket: str,
    s3_environment: dict[str, str],
    start_process: Callable[..., Any],
    reserve_port: Callable[[], int],
) -> Iterator[TeamServer]:
    folder = tmp_path_factory.mktemp("team")
    artifacts = f"{bucket}/mlflow"
    server = TeamServer(folder, reserve_port(), artifacts, s3_environment, start_process)
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture
def account(team_server: TeamServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What MLflow's clients read."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", team_server.password)
