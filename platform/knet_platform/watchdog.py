"""Ends a process in which nothing moves any more, and leaves the stacks of its threads."""

import faulthandler
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from types import TracebackType

FIRST_FACTOR = 4
"""The first step may take so much longer: data are indexed, kernels compiled, weights fetched."""
_GRACE_SECONDS = 5.0
"""Between the stacks and the end: other workers that wait for this one leave theirs."""


class Watchdog:
    """Watches this process from a thread of its own while its block runs.

    Args:
        seconds: Without a `beat`, after which the process is ended.
        keep: Takes the stacks of all threads as text, before the end.
    """

    def __init__(self, seconds: float, keep: Callable[[bytes], None]) -> None:
        self._seconds = seconds
        self._keep = keep
        self._deadline = time.monotonic() + FIRST_FACTOR * seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """Tell that something moved."""
        self._deadline = time.monotonic() + self._seconds

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while (left := self._deadline - time.monotonic()) > 0:
            # The first step's time may have shrunk to that of the others meanwhile.
            if self._over.wait(min(left, self._seconds, threading.TIMEOUT_MAX)):
                return
        try:
            self._keep(_stacks())
        finally:
            time.sleep(_GRACE_SECONDS)
            os.kill(os.getpid(), signal.SIGKILL)  # whatever hangs may not hear less


def _stacks() -> bytes:
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read()
