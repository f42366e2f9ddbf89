"""What is wrong with a cluster's address, token, version or with the folder is one line."""

import asyncio
import json
import random
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import ray
from aiohttp import web

from knet_platform.cli.main import main
from knet_platform.cluster.jobs import SWEEP, require_small
from knet_platform.errors import UsageError


class Dashboard(BaseHTTPRequestHandler):
    """Answers as Ray's dashboard does, as far as it is asked here."""

    answers: ClassVar[dict[str, tuple[int, str]]] = {}

    def do_GET(self) -> None:
        status, text = self.answers.get(self.path, (404, "not found"))
        self.send_response(status)
        self.send_header("Content-Type", "application/json" if status == 200 else "text/plain")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: object) -> None: ...


def version(ray_version: str) -> tuple[int, str]:
    known = {"version": "4", "ray_version": ray_version, "ray_commit": "", "session_name": ""}
    return 200, json.dumps(known)


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Dashboard]]:
    Dashboard.answers = {"/api/version": version(ray.__version__)}
    with HTTPServer(("127.0.0.1", 0), Dashboard) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Dashboard
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (401, "Unauthorized: Missing authentication token"),
        (403, "Forbidden: Invalid authentication token"),
    ],
)
def test_a_missing_or_expired_token_is_one_line(
    dashboard: type[Dashboard], capsys: pytest.CaptureFixture[str], status: int, text: str
) -> None:
    dashboard.answers["/api/version"] = (status, text)
    assert main(["status"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: RAY_AUTH_TOKEN: http://127.0.0.1:")
    assert "refuses the token" in line
    assert "export RAY_AUTH_MODE=token" in line


def test_another_version_of_ray_is_one_line(
    dashboard: type[Dashboard], capsys: pytest.CaptureFixture[str]
) -> None:
    dashboard.answers["/api/version"] = version("2.1.0")
    assert main(["logs", "-f"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"runs Ray 2.1.0, and this is {ray.__version__}" in line


def test_what_is_no_dashboard_is_one_line(
    dashboard: type[Dashboard], capsys: pytest.CaptureFixture[str]
) -> None:
    del dashboard.answers["/api/version"]
    assert main(["status"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: RAY_ADDRESS: cannot reach http://127.0.0.1:")


def job(number: int, sweep: str | None, status: str = "SUCCEEDED") -> dict[str, object]:
    return {
        "type": "SUBMISSION",
        "submission_id": f"raysubmit_{number}",
        "status": status,
        "entrypoint": "knet run",
        "metadata": {SWEEP: sweep} if sweep else {},
        "start_time": 1_700_000_000_000 + number,
    }


def test_jobs_are_found_by_id_by_sweep_or_as_the_latest(
    dashboard: type[Dashboard], capsys: pytest.CaptureFixture[str]
) -> None:
    listed = [job(1, "stages"), job(3, None, "RUNNING"), job(2, "kernels", "FAILED")]
    dashboard.answers["/api/jobs/"] = (200, json.dumps(listed))
    for number in (1, 2, 3):
        answer = json.dumps({"logs": f"log of {number}\n"})
        dashboard.answers[f"/api/jobs/raysubmit_{number}/logs"] = (200, answer)
    assert main(["status", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["job"] for row in rows] == ["raysubmit_3", "raysubmit_2", "raysubmit_1"]
    assert rows[1] | {"ended": None} == rows[1]
    assert (rows[1]["sweep"], rows[1]["status"]) == ("kernels", "FAILED")
    for name, number in (("stages", 1), ("raysubmit_3", 3), (None, 2)):
        assert main(["logs", *([name] if name else [])]) == 0
        assert capsys.readouterr().out == f"log of {number}\n"
    assert main(["logs", "raysubmit_4"]) == 2
    assert "no job 'raysubmit_4'; did you mean 'raysubmit_" in capsys.readouterr().err


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A dashboard with one job, whose log comes in two parts; gives what it says of the job."""
    told: dict[str, Any] = {}
    loop = asyncio.new_event_loop()

    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path.endswith("/logs/tail"):
            socket = web.WebSocketResponse()
            await socket.prepare(request)
            for part in ("first\n", "last\n"):
                await socket.send_str(part)
            await socket.close()
            return socket
        if request.path == "/api/version":
            return web.json_response(text=version(ray.__version__)[1])
        return web.json_response([told] if request.path == "/api/jobs/" else told)

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app)

    async def serve() -> None:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{runner.addresses[0][1]}")

    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(serve(), loop).result(30)
    yield told
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 3, 3),
        ("FAILED", -9, 137),
        ("STOPPED", None, 75),
        ("FAILED", None, 2),
    ],
)
def test_a_followed_log_ends_with_the_job_and_as_the_job(
    followed: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    status: str,
    driver: int | None,
    code: int,
) -> None:
    followed.update(job(1, "stages", status), driver_exit_code=driver, message="no driver")
    assert main(["logs", "--follow", "stages"]) == code
    assert capsys.readouterr().out == "first\nlast\n"


def test_a_folder_over_rays_limit_is_refused_with_what_makes_it_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray._private.runtime_env.packaging.GCS_STORAGE_MAX_SIZE", 2**20)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "large.bin").write_bytes(random.Random(0).randbytes(2 * 2**20))
    (tmp_path / "sweep.yaml").write_text("name: s\n")
    with pytest.raises(
        UsageError, match=r"2\.0 MiB would go along, .* less than 1 MiB .*weights 2"
    ):
        require_small(tmp_path, [])
    require_small(tmp_path, ["/weights"])
    (tmp_path / ".gitignore").write_text("*.bin\n")
    require_small(tmp_path, [])
