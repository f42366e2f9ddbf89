"""`knet ui`, up to the point where it becomes MLflow's server."""

import os
import socket
from pathlib import Path

import pytest

from knet_platform.cli.main import main
from knet_platform.cli.ui import free_port


def test_a_port_in_use_is_one_line_with_the_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["ui", "--port", str(port)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--port {port}" in line
    assert "--port 0" in line


def test_port_0_is_a_free_port_of_the_systems_choice() -> None:
    assert free_port(0) > 1023


def test_a_tracking_server_in_use_is_only_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert main(["ui"]) == 0
    assert capsys.readouterr().out.strip() == "http://tracking:5000"


def test_where_nothing_is_tracked_there_is_nothing_to_open(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    assert main(["ui"]) == 2
    assert "so no run is tracked" in capsys.readouterr().err


def test_it_becomes_a_server_on_this_machine_only_with_the_store_in_use(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    became: list[list[str]] = []

    def execve(path: str, command: list[str], environment: dict[str, str]) -> int:
        became.append(command)
        return 0

    monkeypatch.setattr(os, "execve", execve)
    assert main(["ui", "--port", "0"]) == 0
    (command,) = became
    options = dict(zip(command[4::2], command[5::2], strict=True))
    assert options["--backend-store-uri"] == f"sqlite:///{home}/mlflow.db"
    assert options["--host"] == "127.0.0.1"
    assert f"http://127.0.0.1:{options['--port']}" in capsys.readouterr().out
