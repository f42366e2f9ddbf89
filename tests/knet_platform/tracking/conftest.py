"""A small sweep for trackers to follow, and a proxy that misbehaves as it is told."""

import http.client
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

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
