"""Makes Ray's worker processes by forking one that has imported what all of them import.

`python -m knet_platform.fork_server SCRIPT ...` does what `python SCRIPT ...` would,
in a child of a server that a job's first call on a node starts (docs/adr/0020-fork-server.md).
Nothing of the project is imported before the fork.
"""

import atexit
import fcntl
import gc
import hashlib
import importlib
import json
import os
import random
import runpy
import select
import shlex
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

SHARED = (
    *("ray.train.torch", "ray.tune", "ray.experimental.channel", "pyarrow.dataset", "pyarrow.fs"),
    *("timm", "torchvision.transforms.v2", "scipy.optimize", "scipy.ndimage", "pycocotools.mask"),
    "omegaconf",
)
"""What takes the most time of what drivers and workers import."""
IDLE_SECONDS = 300.0
"""After which a server that nobody asks ends."""
_SERVE = "--serve"
_CHUNK = 2**20


def executable() -> str:
    """Return what Ray's `py_executable` takes, also for nodes that have Python elsewhere."""
    here = shlex.quote(sys.executable)
    return f"$(test -x {here} && echo {here} || echo python3) -m knet_platform.fork_server"


def _ask(argv: Sequence[str]) -> None:
    """Have a process made with this one's streams and surroundings; without a server be it."""
    request = {"argv": argv, "env": dict(os.environ), "cwd": str(Path.cwd())}
    try:
        with _connected() as connection:
            socket.send_fds(connection, [b"3"], [0, 1, 2])
            connection.sendall(json.dumps(request).encode())
            connection.shutdown(socket.SHUT_WR)
            done = connection.recv(1)
    except OSError as error:
        print(f"fork server: {error}", file=sys.stderr)
        done = b""
    if not done:
        os.execv(sys.executable, [sys.executable, *argv])


def _connected() -> socket.socket:
    """Connect to the server of the raylet, which is this process's parent; start it if need be."""
    # All that an import may look at. Ray's looks at its job, so each job has a server.
    told = json.dumps([sys.executable, sys.path, dict(os.environ)], sort_keys=True)
    address = _folder() / f"{os.getppid()}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
    connection = socket.socket(socket.AF_UNIX)
    with _locked(address.parent):
        try:
            connection.connect(str(address))
        except (FileNotFoundError, ConnectionRefusedError):
            _start(address)
            connection.connect(str(address))
    return connection


def _folder() -> Path:
    """Return where this user's servers listen, and nobody else's.

    Raises:
        PermissionError: Others could put theirs there.
    """
    folder = Path(tempfile.gettempdir(), f"knet-fork-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    private = stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o077
    if found.st_uid != os.getuid() or not private:
        raise PermissionError(f"{folder}: expected a folder of this user alone")
    return folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _start(address: Path) -> None:
    """Start a server; whoever connects waits until it has imported everything."""
    address.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen(128)
        place = str(listener.fileno())
        subprocess.Popen(
            [sys.executable, "-m", __spec__.name, _SERVE, place, str(os.getppid()), str(address)],
            pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def _serve(listener: socket.socket, raylet: int, address: Path) -> dict[str, Any]:
    """Fork for every request until the raylet ends, or nobody asks; return in the forked alone."""
    ended = os.pidfd_open(raylet)
    asked = listener.fileno()
    with _class_ids_from_the_system():
        for name in SHARED:
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # no collection of the forked looks at all this again, which would copy it
    atexit.register(gc.unfreeze)  # else nanobind takes what is never freed for leaks, and says so
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # leaves no zombies
    while True:
        ready, _, _ = select.select([asked, ended], [], [], IDLE_SECONDS)
        if asked not in ready:
            _end_unless_asked(listener, address)
        connection, _ = listener.accept()
        with connection:
            _, streams, _, _ = socket.recv_fds(connection, 1, 3)
            data = b"".join(iter(partial(connection.recv, _CHUNK), b""))
            with warnings.catch_warnings():
                # Python's, about threads: jemalloc's and OpenBLAS's, which are made for forks.
                warnings.simplefilter("ignore", DeprecationWarning)
                forked = os.fork() == 0
            if forked:
                os.close(ended)
                listener.close()
                for place, stream in enumerate(streams):
                    os.dup2(stream, place)
                    os.close(stream)
                request: dict[str, Any] = json.loads(data)
                return request
            with suppress(BrokenPipeError):  # killed while it waited
                connection.send(b"1")
            for stream in streams:
                os.close(stream)


@contextmanager
def _class_ids_from_the_system() -> Iterator[None]:
    """Let modules define actors without taking a random number from Ray.

    Its generator, once begun, would be copied into the forked: all would draw the same numbers,
    for the names of what they ask for.
    """
    import ray.actor

    known = vars(ray.actor)
    kind = known["ActorClassID"]

    class FromTheSystem:
        @staticmethod
        def from_random() -> Any:
            return kind(os.urandom(kind.size()))

    known["ActorClassID"] = FromTheSystem
    try:
        yield
    finally:
        known["ActorClassID"] = kind


def _end_unless_asked(listener: socket.socket, address: Path) -> None:
    with _locked(address.parent):  # nobody connects meanwhile
        if not select.select([listener], [], [], 0)[0]:
            address.unlink(missing_ok=True)
            sys.exit()


def _become(argv: Sequence[str], env: dict[str, str], cwd: str) -> NoReturn:
    """Be what a new interpreter would be that runs a script."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    random.seed()  # else all of them would draw the same
    sys.modules["numpy"].random.seed()
    for name in [name for name in sys.modules if name.partition(".")[0] == "knet_platform"]:
        del sys.modules[name]
    sys.argv = list(argv)
    sys.path[0] = str(Path(argv[0]).parent)
    runpy.run_path(argv[0], run_name="__main__")
    sys.exit()


if __name__ == "__main__":
    if sys.argv[1] == _SERVE:
        listening = socket.socket(fileno=int(sys.argv[2]))
        _become(**_serve(listening, int(sys.argv[3]), Path(sys.argv[4])))
    _ask(sys.argv[1:])
