"""One process per sweep."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from knet_platform.errors import UsageError


@contextmanager
def sweep_lock(name: str, home: Path) -> Iterator[None]:
    """Keep other processes from running the same sweep; the kernel frees it if this one dies.

    Raises:
        UsageError: Another process runs it.
    """
    folder = home / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UsageError(
                f"sweep {name}: {file.read().strip() or 'another process'} is running it in "
                f"{home}; wait for it, or end it and run the same command again"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")  # home may be shared
        file.flush()
        yield
