"""One process per sweep, and per folder of a single run."""

import fcntl
import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from knet_platform.errors import UsageError


def sweep_lock(name: str, home: Path) -> AbstractContextManager[None]:
    """Keep other processes from running the same sweep; the kernel frees it if this one dies.

    Raises:
        UsageError: Another process runs it.
    """
    return _lock(home / "locks" / f"{name}.lock", f"sweep {name}", home)


def output_lock(output: Path, home: Path) -> AbstractContextManager[None]:
    """Keep other processes with the same `home` from training into a folder, likewise.

    Raises:
        UsageError: Another process does.
    """
    digest = hashlib.sha256(os.path.realpath(output).encode()).hexdigest()[:16]
    return _lock(home / "locks" / f"output-{digest}.lock", "knet train", output)


@contextmanager
def _lock(path: Path, what: str, where: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UsageError(
                f"{what}: {file.read().strip() or 'another process'} is running it in "
                f"{where}; wait for it, or end it and run the same command again"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")  # home may be shared
        file.flush()
        yield
