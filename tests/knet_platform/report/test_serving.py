"""The page while the sweep runs, over real sockets."""

import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import pytest

from knet_platform.errors import StorageError, UsageError
from knet_platform.report import Report, build_report, serving
from knet_platform.report.serving import LivePage, page_server
from knet_platform.storage import Store, TrialResult
from knet_platform.sweep import Sweep


class Server:
    """A server of a sweep's page, and what stands between it and the store."""

    def __init__(self, sweep: Sweep, store: Store) -> None:
        self.looks = 0
        self.problem: StorageError | None = None
        self._sweep, self._store = sweep, store
        self._server = page_server(LivePage(self._build), 0)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def _build(self) -> Report:
        self.looks += 1
        if self.problem:
            raise self.problem
        return build_report(self._sweep, self._store)

    def get(self, path: str, host: str | None = None) -> tuple[int, str]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}")
        if host:
            request.add_header("Host", host)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def server(sweep: Sweep, store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(serving, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(serving, "_SHARE", 1e9)
    server = Server(sweep, store)
    yield server
    server.close()


def test_the_version_changes_when_the_sweep_comes_further_and_only_then(
    server: Server, sweep: Sweep, store: Store, make_result: Callable[..., TrialResult]
) -> None:
    status, page = server.get("/")
    assert (status, "1 of 3" in page) == (200, True)
    version = server.get("/version")
    assert f'data-version="{version[1]}"' in page
    assert server.get("/version") == version
    trial = next(trial for trial in sweep.trials if trial.name == "1/1")
    store.trial(trial.hash).write_result(make_result(trial.hash, 0.15))
    page = server.get("/")[1]
    assert "2 of 3" in page
    assert server.looks == 4


def test_the_store_is_left_alone_between_two_looks(
    sweep: Sweep, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "LEAST_SECONDS", 1000.0)
    server = Server(sweep, store)
    try:
        assert [server.get(path)[0] for path in ("/", "/version", "/version")] == [200] * 3
        assert server.looks == 1
    finally:
        server.close()


def test_a_store_that_is_away_is_one_line_until_it_is_back(server: Server) -> None:
    server.problem = StorageError("s3://bucket: no answer")
    assert server.get("/version") == (503, "s3://bucket: no answer")
    server.problem = None
    assert server.get("/version")[0] == 200


def test_only_this_machine_by_its_own_name_is_answered(server: Server) -> None:
    assert server.get("/", host=f"evil.example:{server.port}")[0] == 403
    assert server.get("/", host=f"localhost:{server.port}")[0] == 200
    assert server.get("/../report.json")[0] == 404


def test_a_port_in_use_is_one_line(server: Server) -> None:
    with pytest.raises(UsageError, match="--port"):
        page_server(LivePage(lambda: pytest.fail("nobody asked")), server.port)
