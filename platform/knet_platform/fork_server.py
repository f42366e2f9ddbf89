"""Makes Ray's worker processes by forking one that has imported what all of them import.

`python -m knet_platform.fork_server SCRIPT ...` does what `python SCRIPT ...` would,
in a child of a server that a job's first call on a node starts (docs/adr/0020-fork-server.md).
That server is a child itself: of one below all jobs, which knows nothing of Ray.
Nothing of the project is imported before the last fork.
"""

import atexit
import ctypes
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

SHARED = (
    *("pandas", "pyarrow.dataset", "pyarrow.fs", "timm", "torchvision.transforms.v2"),
    *("scipy.optimize", "scipy.ndimage", "pycocotools.mask", "omegaconf"),
)
"""What takes the most time of what drivers and workers import, but for Ray."""
RAYS = ("ray.train.torch", "ray.tune", "ray.experimental.channel")
"""The same of Ray, which notes its job when it is imported."""
IDLE_SECONDS = 300.0
"""After which a server that nobody asks ends."""
_UNREAD = ("PL_", "RAY_", "TUNE_")
"""Beginnings of the variables that Ray sets, which no import of `SHARED` looks at."""
_SERVE = "--serve"
_CHUNK = 2**20


def executable() -> str:
    """Return what Ray's `py_executable` takes, also for nodes that have Python elsewhere."""
    here = shlex.quote(sys.executable)
    return f"$(test -x {here} && echo {here} || echo python3) -m knet_platform.fork_server"


def _ask(argv: Sequence[str]) -> None:
    """Have a process made with this one's streams and surroundings; without a server be it."""
    try:
        with _job_server() as server:
            _request(server, [0, 1, 2], argv=argv, env=dict(os.environ), cwd=str(Path.cwd()))
            done = server.recv(1)
    except OSError as error:
        print(f"fork server: {error}", file=sys.stderr)
        done = b""
    if not done:
        os.execv(sys.executable, [sys.executable, *argv])


def _request(server: socket.socket, streams: Sequence[int], **what: object) -> None:
    socket.send_fds(server, [b"3"], streams)
    server.sendall(json.dumps(what).encode())
    server.shutdown(socket.SHUT_WR)


def _job_server() -> socket.socket:
    """Connect to the job's server of the raylet, which is this process's parent."""
    folder, raylet, env = _folder(), os.getppid(), dict(os.environ)
    rest = {name: value for name, value in env.items() if not name.startswith(_UNREAD)}
    address, below = folder / f"{raylet}-{_digest(env)}", folder / _digest(rest)

    def start_below(listener: socket.socket) -> None:
        command = [sys.executable, "-m", __spec__.name, _SERVE, str(below)]
        subprocess.Popen(command, stdin=listener.fileno(), env=rest, start_new_session=True)

    def start(listener: socket.socket) -> None:
        with _connected(below, start_below) as server:
            streams = [listener.fileno(), 1, 2]
            _request(server, streams, env=env, raylet=raylet, address=str(address))

    with _locked(folder):
        return _connected(address, start)


def _digest(env: Mapping[str, str]) -> str:
    """Return a name for all that an import may look at."""
    told = json.dumps([sys.executable, sys.path, env], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:12]


def _connected(address: Path, start: Callable[[socket.socket], None]) -> socket.socket:
    """Connect to the server at an address, which is started if need be.

    Whoever connects waits until it has imported everything.
    """
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(address))
    except (FileNotFoundError, ConnectionRefusedError):
        address.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(address))
            listener.listen(128)
            start(listener)
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


def _serve(address: Path) -> NoReturn:
    """Be the server below all jobs; its forks are their servers, and those fork what is asked."""
    atexit.register(_end)  # comes last: handlers are called from the newest to the oldest
    _import(SHARED)
    job = _forked(address)
    os.environ.clear()
    os.environ.update(job["env"])
    with _class_ids_from_the_system():
        _import(RAYS)
    _become(**_forked(Path(job["address"]), raylet=job["raylet"]))


def _end() -> None:
    """End without taking apart what was imported: two seconds of work. Nobody sees the status."""
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).fflush(None)  # what libraries have printed
    os._exit(0)


def _import(names: Sequence[str]) -> None:
    for name in names:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # no collection of the forked looks at all this again, which would copy it


def _forked(address: Path, raylet: int | None = None) -> dict[str, Any]:
    """Fork for each request, and return it in the forked alone, with the streams it came with.

    Requests come from the standard input, a socket that listens at the address. It ends when
    nobody asks for long, and with the raylet; without one, with the last that it has forked, or
    when a file that it has imported is another now: jobs that come later must not have the old.
    """
    listener = socket.socket(fileno=0)
    asked = listener.fileno()
    followed = [] if raylet is None else [os.pidfd_open(raylet)]
    imported = _imported_files()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # leaves no zombies
    while True:
        patience = IDLE_SECONDS if followed else 0
        ready, _, _ = select.select([asked, *followed], [], [], patience)
        if not ready:
            _end_unless_asked(listener, address)
        if asked not in ready:
            for ended in ready:
                followed.remove(ended)
                os.close(ended)
            continue
        if raylet is None and imported.items() - _imported_files().items():
            address.unlink(missing_ok=True)
            _end()
        connection, _ = listener.accept()
        with connection:
            _, streams, _, _ = socket.recv_fds(connection, 1, 3)
            data = b"".join(iter(partial(connection.recv, _CHUNK), b""))
            with warnings.catch_warnings():
                # Python's, about threads: jemalloc's and OpenBLAS's, which are made for forks.
                warnings.simplefilter("ignore", DeprecationWarning)
                forked = os.fork()
            if not forked:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.setsid()
                for each in followed:
                    os.close(each)
                listener.close()
                for place, stream in enumerate(streams):
                    os.dup2(stream, place)
                    os.close(stream)
                request: dict[str, Any] = json.loads(data)
                return request
            if raylet is None:
                with suppress(ProcessLookupError):  # has ended already
                    followed.append(os.pidfd_open(forked))
            with suppress(BrokenPipeError):  # killed while it waited, or does not wait
                connection.send(b"1")
            for stream in streams:
                os.close(stream)


def _imported_files() -> dict[str, tuple[int, int] | None]:
    """Return size and time of every file that a module came from; None: it is gone."""
    found: dict[str, tuple[int, int] | None] = {}
    for module in list(sys.modules.values()):
        if file := getattr(module, "__dict__", {}).get("__file__"):
            try:
                status = Path(file).stat()
            except OSError:
                found[file] = None
            else:
                found[file] = status.st_size, status.st_mtime_ns
    return found


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
            _end()


def _become(argv: Sequence[str], env: dict[str, str], cwd: str) -> NoReturn:
    """Be what a new interpreter would be that runs a script."""
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
        _serve(Path(sys.argv[2]))
    _ask(sys.argv[1:])
