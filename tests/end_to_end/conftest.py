"""Nodes that come and go, and what happens in processes that tell nobody."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture
def add_nodes(cluster: Any) -> Iterator[Callable[..., dict[str, Any]]]:
    """Return what adds nodes to the cluster and gives them by id; they go when the test ends."""
    added: list[Any] = []

    def add(count: int, **options: Any) -> dict[str, Any]:
        new = [cluster.add_node(**options) for _ in range(count)]
        added.extend(new)
        return {node.node_id: node for node in new}

    yield add
    for node in added:
        if node in cluster.worker_nodes:
            cluster.remove_node(node, allow_graceful=False)


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
