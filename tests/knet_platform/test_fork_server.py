"""Processes made by the fork server are what a new interpreter would be, but for the waiting."""

import json
import os
import shlex
import socket
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
    "below": int(open(f"/proc/{os.getppid()}/stat").read().rpartition(")")[2].split()[1]),
    "children": signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL, "modules": known,
    "random": [random.random(), numpy.random.rand(), UniqueID.from_random().hex()],
}))
"""


@pytest.fixture
def call(tmp_path: Path) -> Callable[..., tuple[list[dict[str, Any]], str]]:
    """Return what runs a script as a raylet would, by each of some commands' beginnings.

    It gives what the script printed each time, and all errors, once everything has ended.
    """
    script = tmp_path / "there" / "script.py"
    script.parent.mkdir()
    script.write_text(SCRIPT)

    def run(*lines: str, first: Path | None = None) -> tuple[list[dict[str, Any]], str]:
        command = f"{executable()} {shlex.quote(str(script))} --option 'a b'"
        calls = "".join(f"({line} exec {command}); " for line in lines) + "true"
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
    own = tmp_path / "own"
    own.mkdir()
    (own / "timm.py").touch()
    other = "RAY_JOB_ID=02000000"
    changed = f"(echo new = 1 > {own}/timm.py); RAY_JOB_ID=03000000"
    (first, second, of_another_job, later), errors = call("", "", other, changed, first=own)
    assert errors.startswith("fork server: [Errno ")  # which one is a matter of moments
    assert errors.count("\n") == 1
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
    assert of_another_job["parent"] != first["parent"]
    assert of_another_job["below"] == first["below"], "one server made both servers"
    assert not {*SHARED, *RAYS} & set(later["modules"]), "a package had changed meanwhile"
    for ours, theirs in zip(first["random"], second["random"], strict=True):
        assert ours != theirs
    for address in tmp_path.glob("knet-fork-*/*"):  # the servers ended with the raylet
        with socket.socket(socket.AF_UNIX) as late, pytest.raises(ConnectionRefusedError):
            late.connect(str(address))


def test_without_a_server_it_is_a_plain_interpreter(
    call: Callable[..., tuple[list[dict[str, Any]], str]], tmp_path: Path
) -> None:
    """Where others could listen in its place, or where it breaks."""
    folder = tmp_path / f"knet-fork-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    (process,), errors = call("")
    assert "timm" not in process["modules"]
    assert f"fork server: {folder}: expected a folder of this user alone" in errors

    folder.chmod(0o700)
    (tmp_path / "timm.py").write_text("raise ImportError('broken')")
    (process,), errors = call("", first=tmp_path)
    assert "timm" not in process["modules"]
    assert "ImportError: broken" in errors
