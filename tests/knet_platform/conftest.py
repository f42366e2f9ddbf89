"""What a finished trial leaves, for tests that need no training."""

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import pytest

from knet_platform.storage import TrialResult, TrialStore

Meddle = Callable[[str, int], bytes | None]
"""See `Proxy`."""

_RESULT = TrialResult(
    trial_hash="",
    step=100,
    metrics={"val/AP": 0.3},
    evaluations=(),
    checkpoint="checkpoint_100",
    num_parameters=1,
    seconds=60.0,
    wall_seconds=70.0,
    device="cpu",
    workers=1,
    finished_at="2026-01-01T00:00:00+00:00",
)


@pytest.fixture
def finished() -> Callable[..., TrialResult]:
    """Return a function that makes the result of the trial of that hash, changed as asked."""

    def make(trial_hash: str, **changes: Any) -> TrialResult:
        return replace(_RESULT, trial_hash=trial_hash, **changes)

    return make


@pytest.fixture
def save() -> Callable[[TrialStore, int, float], None]:
    """Return a function that gives a trial a checkpoint of a step, evaluated every ten."""

    def save(store: TrialStore, step: int, ap: float) -> None:
        evaluations = [
            {"step": at, "time": 0.0, "metrics": {"val/AP": ap}} for at in range(10, step + 1, 10)
        ]
        state = {
            "format": 1, "step": step, "epoch": 1.0, "categories": [], "metrics": {},
            "evaluations": evaluations, "seconds": 1.0, "num_parameters": 1,
        }  # fmt: skip
        for name in ("model.safetensors", "trainer.pt", "recipe.yaml", "state.json"):
            store.write_bytes(f"checkpoint_{step}/{name}", json.dumps(state).encode())

    return save


class Proxy:
    """Stands before a server and, once told so, answers or cuts what passes.

    Args:
        target: Host and port of the server.
        meddle: Takes a request's first line and how many came before; returns bytes to answer
            in the server's place (none: the connection just ends), None to pass it on.
    """

    def __init__(self, target: tuple[str, int], meddle: Meddle) -> None:
        self._target, self._meddle = target, meddle
        self._count = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            data = client.recv(65536)
            if not data:
                return
            answer = self._meddle(data.split(b"\r\n", 1)[0].decode(), self._count)
            self._count += 1
            if answer is not None:
                client.sendall(answer)
                return
            data = data.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1)
            with socket.create_connection(self._target) as server:
                server.sendall(data)
                back = threading.Thread(target=_pump, args=(server, client), daemon=True)
                back.start()
                _pump(client, server)
                back.join()

    def close(self) -> None:
        self._listener.close()


def _pump(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


@pytest.fixture
def before_s3(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[Meddle], AbstractContextManager[None]]:
    """Return a function that puts a meddling `Proxy` before the S3 server for a block."""

    @contextmanager
    def meddled(meddle: Meddle) -> Iterator[None]:
        host, port = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://").split(":")
        proxy = Proxy((host, int(port)), meddle)
        with monkeypatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", proxy.url)
            yield
        proxy.close()

    return meddled
