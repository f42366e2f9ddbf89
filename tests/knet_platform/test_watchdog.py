"""A process that hangs leaves its stacks and ends; one that moves, or takes its time, does not."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path


def run(body: str, tmp_path: Path, first_factor: float = 4) -> "subprocess.CompletedProcess[str]":
    """Run a watched block in a process of its own; stacks go to a file."""
    program = f"""
    import time
    from pathlib import Path
    from knet_platform import watchdog

    watchdog._GRACE_SECONDS, watchdog.FIRST_FACTOR = 0.1, {first_factor}
    def waits_for_ever():
        time.sleep(90)
    with watchdog.Watchdog({{seconds}}, Path({str(tmp_path / "stacks")!r}).write_bytes) as dog:
        {{body}}
    """
    seconds, _, body = body.partition(": ")
    program = textwrap.dedent(program).format(seconds=seconds, body=body)
    return subprocess.run([sys.executable, "-c", program], timeout=80, check=False, text=True)


def test_a_process_without_a_beat_leaves_its_stacks_and_is_killed(tmp_path: Path) -> None:
    assert run("0.2: dog.beat(); waits_for_ever()", tmp_path).returncode == -signal.SIGKILL
    stacks = (tmp_path / "stacks").read_text()
    assert "in waits_for_ever" in stacks
    assert "in _watch" in stacks


def test_the_patience_for_the_first_beat_ends_with_it(tmp_path: Path) -> None:
    """Else a hang in the second step would be waited for as long as one in the first."""
    done = run("0.2: time.sleep(0.1); dog.beat(); waits_for_ever()", tmp_path, first_factor=600)
    assert done.returncode == -signal.SIGKILL


def test_the_end_comes_even_if_the_stacks_cannot_be_kept(tmp_path: Path) -> None:
    (tmp_path / "stacks").mkdir()
    assert run("0.2: dog.beat(); waits_for_ever()", tmp_path).returncode == -signal.SIGKILL


def test_the_first_beat_may_come_later_and_every_beat_counts(tmp_path: Path) -> None:
    assert (
        run(
            "1: time.sleep(2); [(dog.beat(), time.sleep(.3)) for _ in 'abcd']", tmp_path
        ).returncode
        == 0
    )
    assert run("float('inf'): pass", tmp_path).returncode == 0
    assert not (tmp_path / "stacks").exists()
