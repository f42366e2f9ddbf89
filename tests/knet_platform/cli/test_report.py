"""`knet report` through the command line."""

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from knet_platform.cli.main import main
from knet_platform.home import storage_uri
from knet_platform.planning import load_sweep
from knet_platform.storage import Store, TrialResult


@pytest.fixture
def sweep(width_sweep: Path, finished: Callable[..., TrialResult]) -> Path:
    """All but one trial are finished."""
    for trial in load_sweep(width_sweep).trials:
        if trial.name != "model.channels=64/1":
            metrics = {"val/AP": 0.2 + 0.1 * trial.seed, "val/AP50": 0.5}
            result = finished(trial.hash, metrics=metrics)
            Store(storage_uri()).trial(trial.hash).write_result(result)
    return width_sweep


def test_it_prints_the_table_and_writes_every_file(
    sweep: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(sweep)]) == 0
    printed = capsys.readouterr().out
    assert "narrow (baseline)" in printed
    assert "model.channels=64/1: not started" in printed
    folder = home / "reports" / "width"
    assert f"page: {folder / 'index.html'}" in printed
    assert len(list(folder.iterdir())) == 5


def test_json_and_formats_print_nothing_else(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pages"
    assert main(["report", str(sweep), "--json", "--out", str(out)]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["arms"]["narrow"]["metrics"]["val/AP"]["mean"] == pytest.approx(25.0)
    for form, name in {"md": "table.md", "latex": "table.tex", "csv": "table.csv"}.items():
        assert main(["report", str(sweep), "--format", form, "--out", str(out)]) == 0
        printed = capsys.readouterr().out
        assert printed.replace("\r\n", "\n") == (out / name).read_text()


def test_other_settings_are_other_trials(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(sweep), "optim.lr=0.01", "--seeds", "1", "--json"]) == 0
    arms = json.loads(capsys.readouterr().out)["arms"]
    assert {name: (arm["n"], arm["status"]) for name, arm in arms.items()} == {
        "narrow": (0, "new"),
        "model.channels=64": (0, "new"),
    }


def test_it_serves_the_page_until_ctrl_c_and_leaves_the_port_free(sweep: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "knet_platform.cli.main", "report", str(sweep), "--serve"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background may have been told to ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stdout is not None
        told = next(line for line in process.stdout if line.startswith("live: "))
        found = re.fullmatch(r"live: (http://127\.0\.0\.1:(\d+)/)  \(stop with Ctrl-C\)\n", told)
        assert found, told
        with urllib.request.urlopen(found[1], timeout=60) as answer:
            assert "Width of the kernels" in answer.read().decode()
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, complaint) == (130, "interrupted\n")
    socket.create_server(("127.0.0.1", int(found[2]))).close()


def test_a_sweep_that_is_not_there_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
