"""What one node says of itself; runs there, in an actor of its own."""

import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path

from knet_platform.errors import PlatformError
from knet_platform.files import open_files

COMPARED = ("ray", "torch", "knet-platform", "mlflow")
"""Packages whose versions must be the same on all nodes."""
REDUCED_FLOATS = 2**22
"""Numbers that an all-reduce adds up: 16 MiB, about what a layer's gradients are."""
REDUCE_SECONDS = 60.0
"""After which nodes that do not reach each other give up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """What is known of one node."""

    host: str
    versions: dict[str, str]
    """By package, and python's; empty where one is missing."""
    gpus_promised: int
    """That Ray gives to trials."""
    gpus_seen: int
    """That the driver knows of."""
    storage_problem: str | None
    cache_free_gib: float
    skew_seconds: float
    """How far its clock is ahead of that of the process that asks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A node's part of its report."""

    host: str
    versions: dict[str, str]
    gpus_seen: int
    storage_problem: str | None
    cache_free_gib: float


class NodeProbe:
    """Answers for the node on which it runs."""

    def now(self) -> float:
        """Return this node's clock."""
        return time.time()

    def answer(self, storage: str, marker: str, home: str) -> Answer:
        """Look at this node.

        Args:
            storage: Address of the store.
            marker: A file there, which the asking process has written.
            home: `KNET_HOME`.
        """
        cache = Path(home) / "cache"
        existing = next(path for path in (cache, *cache.parents) if path.exists())
        return Answer(
            host=socket.gethostname(),
            versions={"python": platform.python_version()} | dict(map(_version, COMPARED)),
            gpus_seen=_gpus_seen(),
            storage_problem=_storage_problem(storage, marker),
            cache_free_gib=shutil.disk_usage(existing).free / 2**30,
        )

    def free_address(self) -> str:
        """Return host:port of this node, where nothing listens yet."""
        import ray

        host = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"{host}:{probe.getsockname()[1]}"

    def reduce(self, address: str, rank: int, world: int, backend: str) -> float:
        """Add numbers up together with all other ranks; return the seconds that it took.

        Raises:
            RuntimeError: They do not reach each other, or the sum is wrong.
        """
        import torch
        import torch.distributed as dist

        dist.init_process_group(
            backend,
            init_method=f"tcp://{address}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=REDUCE_SECONDS),
        )
        try:
            device = torch.device("cuda" if backend == "nccl" else "cpu")
            numbers = torch.full((REDUCED_FLOATS,), float(rank + 1), device=device)
            dist.all_reduce(torch.ones(1, device=device))  # connections are made on first use
            start = time.perf_counter()
            dist.all_reduce(numbers)
            total = float(numbers[-1])  # waits for the device
            seconds = time.perf_counter() - start
        finally:
            dist.destroy_process_group()
        if total != world * (world + 1) / 2:
            raise RuntimeError(f"the sum over {world} ranks is {total:g}")
        return seconds


def _version(package: str) -> tuple[str, str]:
    try:
        return package, metadata.version(package)
    except metadata.PackageNotFoundError:
        return package, ""


def _gpus_seen() -> int:
    """Count GPUs in a process that hides none, as Ray does from actors that ask for none."""
    code = "import torch; print(torch.cuda.device_count())"
    hidden = ("CUDA_VISIBLE_DEVICES",)
    shown = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=shown)
    return int(done.stdout) if done.returncode == 0 else 0


def _storage_problem(storage: str, marker: str) -> str | None:
    try:
        files = open_files(storage)
        files.read(marker)
        own = f"{marker}-{socket.gethostname()}-{os.getpid()}"
        files.write(own, b"")
        files.delete(own)
    except PlatformError as error:
        return str(error)
    return None
