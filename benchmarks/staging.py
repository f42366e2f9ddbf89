"""How fast is a data set fetched, against `aws s3 sync` of the same files.

python benchmarks/staging.py [--files 3000] [--kib 20] [--latency-ms 0] [--rounds 5] [--aws aws]

Needs awscli (uv tool install awscli). Without `--address`, which names a set in a bucket with the
credentials in use, a server of this script's own answers from memory: a plain loop in a process
of its own that costs little, so that the clients are measured, after `--latency-ms` as a distant
bucket would. Every round runs both as processes from their start to their end, into new folders,
in turn. Ours verifies each file by its ETag and keeps it by its SHA-256.
"""

import argparse
import asyncio
import hashlib
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

PAGE = 1000
STAGE = """
import sys
from knet_core import DataConfig
from knet_platform.staging import staged
with staged(DataConfig(root=sys.argv[1])):
    pass
"""


class Server:
    """Lists and gives a bucket's objects, as far as reading needs it."""

    def __init__(self, files: int, size: int, latency: float) -> None:
        drawn = random.Random(0)
        self._objects = {
            f"set/train/{number:06d}.jpg": drawn.randbytes(size) for number in range(files)
        }
        self._etags = {
            key: hashlib.md5(content, usedforsecurity=False).hexdigest()
            for key, content in self._objects.items()
        }
        self._latency = latency

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        while head := await self._head(reader):
            url = urlsplit(head.split(" ", 2)[1])
            await asyncio.sleep(self._latency)
            _, _, key = url.path.lstrip("/").partition("/")
            if key:
                writer.write(self._header("image/jpeg", len(self._objects[key]), self._etags[key]))
                writer.write(self._objects[key])
            else:
                page = self._page(parse_qs(url.query))
                writer.write(self._header("application/xml", len(page), "") + page)
            await writer.drain()
        writer.close()

    async def _head(self, reader: asyncio.StreamReader) -> str:
        try:
            return (await reader.readuntil(b"\r\n\r\n")).decode()
        except (asyncio.IncompleteReadError, ConnectionError):
            return ""

    def _header(self, kind: str, length: int, etag: str) -> bytes:
        return (
            f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n"
            f'ETag: "{etag}"\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n\r\n'
        ).encode()

    def _page(self, query: dict[str, list[str]]) -> bytes:
        keys = sorted(self._objects)
        start = int(query.get("continuation-token", ["0"])[0])
        end = start + PAGE
        items = "".join(
            f"<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f'<ETag>"{self._etags[key]}"</ETag><Size>{len(self._objects[key])}</Size></Contents>'
            for key in keys[start:end]
        )
        more = end < len(keys)
        token = f"<NextContinuationToken>{end}</NextContinuationToken>" if more else ""
        return (
            f"<ListBucketResult><IsTruncated>{str(more).lower()}</IsTruncated>{token}{items}"
            f"</ListBucketResult>"
        ).encode()


def serve(told: Connection, files: int, size: int, latency: float) -> None:
    async def run() -> None:
        server = await asyncio.start_server(Server(files, size, latency).answer, "127.0.0.1", 0)
        told.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


@contextmanager
def served(files: int, size: int, latency: float) -> Iterator[dict[str, str]]:
    """Serve a set while the block runs; gives the environment that leads there."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=serve, args=(theirs, files, size, latency)
    )
    process.start()
    try:
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ours.recv()}",
            "AWS_ACCESS_KEY_ID": "benchmark",
            "AWS_SECRET_ACCESS_KEY": "benchmark",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
        }
    finally:
        process.kill()
        process.join()


def seconds(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Return the wall-clock and the CPU time of a command."""
    before, began = os.times(), time.perf_counter()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    after, ended = os.times(), time.perf_counter()
    cpu = after.children_user + after.children_system
    return ended - began, cpu - before.children_user - before.children_system


def measure(args: argparse.Namespace, address: str, environment: dict[str, str]) -> None:
    walls: dict[str, list[float]] = {"aws s3 sync": [], "staged": []}
    cpus: dict[str, list[float]] = {"aws s3 sync": [], "staged": []}
    for turn in range(args.rounds):
        with tempfile.TemporaryDirectory(prefix="knet-staging-") as folder:
            commands = {
                "aws s3 sync": [args.aws, "s3", "sync", "--no-progress", address, f"{folder}/aws"],
                "staged": [sys.executable, "-c", STAGE, address],
            }
            for name in sorted(commands, reverse=bool(turn % 2)):
                wall, cpu = seconds(commands[name], environment | {"KNET_CACHE": f"{folder}/knet"})
                walls[name].append(wall)
                cpus[name].append(cpu)
            synced = sum(path.is_file() for path in Path(folder, "aws").rglob("*"))
            (kept,) = Path(folder, "knet", "sets").iterdir()
            count = sum(path.is_file() for path in (kept / "files").rglob("*"))
            assert synced == count, f"{synced} and {count} files"
    for name in walls:
        wall, cpu = statistics.median(walls[name]), statistics.median(cpus[name])
        listed = ", ".join(f"{value:.2f}" for value in walls[name])
        print(f"{name:12} {wall:6.2f} s, {count / wall:5.0f} files/s, CPU {cpu:.2f} s  ({listed})")
    ratios = [theirs / ours for theirs, ours in zip(*walls.values(), strict=True)]
    listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"as fast as sync, times: median {statistics.median(ratios):.2f} ({listed})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", help="s3://bucket/prefix (default: the script's own server)")
    parser.add_argument("--files", type=int, default=3000)
    parser.add_argument("--kib", type=int, default=20, help="size of a file")
    parser.add_argument("--latency-ms", type=float, default=0, help="before each answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--aws", default="aws", help="the command")
    args = parser.parse_args()
    if args.address:
        measure(args, args.address, dict(os.environ))
        return
    with served(args.files, args.kib * 1024, args.latency_ms / 1000) as settings:
        measure(args, "s3://bucket/set", dict(os.environ) | settings)


if __name__ == "__main__":
    main()
