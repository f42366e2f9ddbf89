"""`knet run` refuses early, in one line, before any Ray is started."""

import os
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from knet_platform.cli.main import main
from knet_platform.locks import sweep_lock

SWEEP = """\
name: tiny
base: tiny.yaml
metric: {name: val/AP, mode: max}
baseline: "1"
arms: {"1": {}}
"""


@pytest.fixture
def sweep(recipe: Path) -> Path:
    path = recipe.parent / "sweep.yaml"
    path.write_text(SWEEP)
    return path


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    """Return the exit code and the one line."""
    code = main(["run", *argv])
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return code, line


def test_an_unreachable_tracking_server_is_refused(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    code, line = refused(capsys, str(sweep))
    assert code == 2
    assert line.startswith("error: MLFLOW_TRACKING_URI: http://127.0.0.1:9: ")


def test_a_full_disk_is_refused(
    sweep: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")(2**40, 2**40, 2**20)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    code, line = refused(capsys, str(sweep))
    assert code == 1
    assert "0.00 GiB free, expected at least 1" in line
    assert not home.exists()


@pytest.mark.parametrize("name", ["KNET_HOME", "KNET_STORAGE"])
def test_a_folder_that_takes_no_files_is_refused(
    sweep: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, f"{sweep}/folder")
    code, line = refused(capsys, str(sweep))
    assert code == 2
    assert line.startswith(f"error: {sweep}/folder: cannot write in {sweep}; ")


def test_a_dashboards_address_is_refused(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    code, line = refused(capsys, str(sweep))
    assert code == 2
    assert "use `knet submit`" in line


def test_importing_the_verb_loads_no_ray_torch_or_mlflow() -> None:
    code = (
        "import sys, knet_platform.cli.run, knet_platform.cli.submit;"
        "print(sorted({'ray', 'torch', 'mlflow'} & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_a_sweep_beyond_its_budget_is_not_started(
    sweep: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = refused(capsys, str(sweep), "--max-usd", "0.00001")
    assert code == 4
    assert "budget: forecast" in line
    assert "raise --max-usd" in line
    assert not home.exists()


def test_the_budget_of_the_file_holds_and_the_command_line_wins(
    sweep: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep.write_text(SWEEP + "budget: {usd: 0.00001}\n")
    assert refused(capsys, str(sweep))[0] == 4
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    code, line = refused(capsys, str(sweep), "--max-usd", "100")
    assert (code, "MLFLOW_TRACKING_URI" in line) == (2, True)  # past the budget


def test_a_negative_cap_is_refused(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = refused(capsys, str(sweep), "--max-usd", "-1")
    assert (code, line) == (2, "error: --max-usd: expected an amount >= 0, got -1")


def test_retry_says_what_it_retries(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["retry", str(sweep)]) == 2
    assert "the following arguments are required: --failed" in capsys.readouterr().err


def test_the_second_run_of_a_sweep_says_who_runs_it(
    sweep: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with sweep_lock("tiny", home):
        code, line = refused(capsys, str(sweep))
    assert code == 2
    assert f"sweep tiny: process {os.getpid()} on {socket.gethostname()} is running it" in line
    assert "wait for it, or end it and run the same command again" in line
