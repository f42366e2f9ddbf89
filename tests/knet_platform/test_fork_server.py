"""Processes made by the fork server are what a new interpreter would be, but for the waiting."""

import json
import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from knet_platform.fork_server import RAYS, SHARED, executable

ROOT = Path(__file__).parents[2]
SCRIPT = """\
import atexit, json, os, random, signal, sys
known = sorted(sys.modules)
import numpy
from ray._raylet import UniqueID
atexit.register(print, json.dumps({
    "argv": sys.argv, "cwd": os.getcwd(), "job": os.environ["RAY_JOB_ID"], "path": sys.path[0],
    "session": os.getsid(0) == os.getpid(), "parent": os.getppid(), "name": __name__,
    "children": signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL, "modules": known,
    "random": [random.random(), numpy.random.rand(), UniqueID.from_random().hex()],
}))
"""


@pytest.fixture
def call(tmp_path: Path) -> Callable[..., tuple[list[dict[str, Any]], str]]:
    """Return what runs a script so many times, as a raylet would.

    It gives what the script printed each time, and all errors, once everything has ended.
    """
    script = tmp_path / "there" / "script.py"
    script.parent.mkdir()
    script.write_text(SCRIPT)

    def run(times: int, first: Path | None = None) -> tuple[list[dict[str, Any]], str]:
        command = f"{executable()} {shlex.quote(str(script))} --option 'a b'"
        calls = f"(exec {command}); " * times + "true"
        searched = [*([first] if first else []), ROOT, ROOT / "platform"]
        environment = os.environ | {
            "TMPDIR": str(tmp_path),
            "RAY_JOB_ID": "01000000",
            "PYTHONPATH": os.pathsep.join(map(str, searched)),
        }
        process = subprocess.Popen(
            ["bash", "-c", calls],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        output, errors = process.communicate(timeout=120)
        return [json.loads(line) for line in output.splitlines()], errors

    return run


def test_a_forked_process_is_as_a_new_one_that_has_imported_what_takes_long(
    call: Callable[..., tuple[list[dict[str, Any]], str]], tmp_path: Path
) -> None:
    (first, second), errors = call(2)
    assert errors == ""
    folder = tmp_path / "there"
    for process in (first, second):
        assert process["argv"] == [str(folder / "script.py"), "--option", "a b"]
        assert (process["cwd"], process["path"]) == (str(tmp_path), str(folder))
        assert process["name"] == "__main__"
        assert process["session"]
        assert process["children"]
        assert {*SHARED, *RAYS} <= set(process["modules"])
        assert not [name for name in process["modules"] if name.startswith("knet_")]
        assert process["job"] == "01000000"
    assert first["parent"] == second["parent"], "one server made both"
    for ours, theirs in zip(first["random"], second["random"], strict=True):
        assert ours != theirs
    assert list(tmp_path.glob("knet-fork-*/*")) == [], "the server ended with the raylet"


def test_without_a_server_it_is_a_plain_interpreter(
    call: Callable[..., tuple[list[dict[str, Any]], str]], tmp_path: Path
) -> None:
    """Where others could listen in its place, or where it breaks."""
    folder = tmp_path / f"knet-fork-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    (process,), errors = call(1)
    assert "timm" not in process["modules"]
    assert f"fork server: {folder}: expected a folder of this user alone" in errors

    folder.chmod(0o700)
    (tmp_path / "timm.py").write_text("raise ImportError('broken')")
    (process,), errors = call(1, first=tmp_path)
    assert "timm" not in process["modules"]
    assert "ImportError: broken" in errors
