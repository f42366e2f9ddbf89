"""`knet top` through the command line, with a terminal and without."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from knet_platform import attempts
from knet_platform.cli.main import main
from knet_platform.cli.top import duration
from knet_platform.home import storage_uri
from knet_platform.planning import load_sweep
from knet_platform.storage import Evaluation, Failure, Store, TrialResult

SWEEP = """\
name: width
base: tiny.yaml
metric: {name: val/AP, mode: max}
baseline: "narrow"
arms:
  narrow: {}
  wide: {model.channels: 64}
  odd: {model.num_kernels: 20}
resources: {gpus_per_worker: 1, price_per_gpu_hour: 2}
budget: {usd: 50}
"""


@pytest.fixture
def sweep(recipe: Path, finished: Callable[..., TrialResult]) -> Path:
    """The baseline is finished, one arm runs, one has failed."""
    path = recipe.with_name("width.yaml")
    path.write_text(SWEEP)
    narrow, wide, odd = (Store(storage_uri()).trial(t.hash) for t in load_sweep(path).trials)
    evaluations = (Evaluation(step=1, time=1e9, metrics={"val/AP": 0.2}),)
    trial_hash = load_sweep(path).trials[0].hash
    narrow.write_result(finished(trial_hash, evaluations=evaluations, step=2, seconds=3600.0))
    attempts.claim(wide, "run")
    attempts.begin(wide, "run")
    metrics = {"train/loss": 1.5, "sys/images_per_s": 8.0, "sys/data_wait": 0.5, "val/AP": 0.25}
    wide.write_points(0, [Evaluation(step=1, time=time.time(), metrics=metrics)])
    odd.write_failure(
        Failure(
            cause="crash",
            kind="Died",
            message="[red]no[/red]",
            action="stopped",
            attempt=1,
            step=0,
        )
    )
    return path


def test_without_a_terminal_it_looks_once_in_plain_lines(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["top", str(sweep)]) == 0
    first, second, wide, odd, narrow, trouble = capsys.readouterr().out.splitlines()
    assert first == "width: 1 of 3 trials finished (1 running, 1 failed, 1 finished)"
    assert second.startswith("1 GPUs in use; 1.00 GPU-hours, 2.00 USD of 50 up to the newest")
    assert re.search(r"time left: \d+[hm]\d\d[ms]$", second)
    assert wide.startswith("wide  50%  1 running  AP 25.0 (+5.0 to the baseline)  loss 1.500")
    assert "8.0 images/s  50% waiting for data" in wide
    assert odd.startswith("odd  0%  1 failed")
    assert narrow == "narrow (baseline)  100%  1 finished  AP 30.0"
    assert trouble == "odd/0: failed: Died: [red]no[/red]"


def test_a_sweep_that_has_not_begun_is_all_waiting(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe.with_name("width.yaml")
    path.write_text(SWEEP)
    assert main(["top", str(path)]) == 0
    first, second, *others = capsys.readouterr().out.splitlines()
    assert first == "width: 0 of 3 trials finished (3 waiting)"
    assert second.startswith("0 GPUs in use; 0.00 GPU-hours, 0.00 USD of 50")
    assert [line.split()[0] for line in others] == ["narrow", "wide", "odd"]
    assert all("1 waiting  AP -" in line for line in others)


def test_json_tells_every_trial(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", str(sweep), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["gpus"], values["usd"]) == (1, pytest.approx(2.0))
    wide = next(trial for trial in values["trials"] if trial["arm"] == "wide")
    assert (wide["state"], wide["step"], wide["total"]) == ("running", 1, 2)
    assert wide["difference"] == pytest.approx(0.05)


def test_on_a_terminal_it_follows_until_ctrl_c(sweep: Path) -> None:
    process, terminal = start(sweep)
    try:
        shown = read_until(
            terminal,
            "wide",
            "━",
            "+5.0",
            "[red]no[/red]",
            "1 failed",
            "Δ base",
            "1 GPUs in use",
            "USD of 50",
            "time left:",
        )
        assert "Traceback" not in shown
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


def test_on_a_terminal_it_ends_with_the_sweep(
    sweep: Path, finished: Callable[..., TrialResult]
) -> None:
    trial = load_sweep(sweep).trials[1]
    Store(storage_uri()).trial(trial.hash).write_result(finished(trial.hash, step=2))
    process, terminal = start(sweep)
    try:
        read_until(terminal, "2 of 3 trials finished")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


def start(sweep: Path) -> tuple[subprocess.Popen[bytes], int]:
    """Start it on a pseudo-terminal; return it and the other end."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "knet_platform.cli.main", "top", str(sweep)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "140", "LINES": "30"},
        start_new_session=True,
        # Tests that run in the background may have been told to ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(theirs)
    return process, ours


def read_until(terminal: int, *words: str) -> str:
    text, deadline = "", time.monotonic() + 90
    while not all(word in text for word in words):
        assert time.monotonic() < deadline, text
        if select.select([terminal], [], [], 1.0)[0]:
            try:
                text += os.read(terminal, 65536).decode(errors="replace")
            except OSError:  # it has ended
                break
            text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert all(word in text for word in words), text
    return text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0m00s"), (61.4, "1m01s"), (3599.7, "1h00m"), (90_000, "25h00m")]
)
def test_durations_read_like_a_clock(seconds: float, text: str) -> None:
    assert duration(seconds) == text
