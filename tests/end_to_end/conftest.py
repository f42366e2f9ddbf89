"""What happens in processes that tell nobody."""

import time
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def wait_for() -> Callable[..., Any]:
    """Return what waits until something holds in other processes, and gives what it was."""

    def wait(happens: Callable[[], Any], seconds: float = 180) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := happens()):
            assert time.monotonic() < deadline
            time.sleep(0.1)  # workers and buckets tell nobody
        return found

    return wait
