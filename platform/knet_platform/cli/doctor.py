"""`knet doctor`: what on this machine or cluster would stop a run, and the mend."""

import argparse
import dataclasses
import json
import os
import shutil
import socket
import sqlite3
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from knet_platform.checks import Check, disk_status
from knet_platform.cluster import prepare_environment
from knet_platform.errors import StorageError, UsageError
from knet_platform.home import (
    UNTRACKED,
    is_writable,
    knet_home,
    nearest_existing,
    storage_uri,
    tracking_uri,
)
from knet_platform.storage import Store

EXAMPLES = """\
examples:
  knet doctor
  knet doctor --json
  RAY_ADDRESS=http://10.0.0.5:8265 RAY_AUTH_MODE=token knet doctor --cluster

With --cluster the same is asked on the head, and every node is: versions, GPUs, an all-reduce
between them, the store, clocks and the cache's disk. Nothing is left behind."""

TIMEOUT = 3.0
"""Seconds to wait for any one server."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "--cluster", action="store_true", help="ask every node of the cluster of RAY_ADDRESS"
    )
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")


def run(args: argparse.Namespace) -> int:
    """Print every check; exit code 2 if one would stop a run."""
    if args.cluster and _is_dashboard(os.environ.get("RAY_ADDRESS")):
        return _as_job(args)
    checks = list(fast_checks())
    if args.cluster:
        prepare_environment()
        from knet_platform.cluster.diagnosis import cluster_checks

        checks += cluster_checks(storage_uri(), knet_home())
    if args.json:
        print(json.dumps([dataclasses.asdict(check) for check in checks], indent=2))
    else:
        _show(checks)
    return 2 if any(check.status == "fail" for check in checks) else 0


def _is_dashboard(address: str | None) -> bool:
    return address is not None and address.startswith(("http://", "https://"))


def _as_job(args: argparse.Namespace) -> int:
    """Ask on the head, which reaches nodes that this machine cannot."""
    prepare_environment()
    from knet_platform.cli.submit import runtime_env
    from knet_platform.cluster.jobs import Jobs

    words = ["python", "-m", "knet_platform.cli.main", "doctor", "--cluster"]
    jobs = Jobs()
    job = jobs.submit(" ".join(words + ["--json"] * args.json), runtime_env(), {})
    for text in jobs.follow(job):
        print(text, end="", flush=True)
    return jobs.exit_code(job)


def fast_checks() -> Iterator[Check]:
    """Yield the checks that need seconds and leave nothing behind."""
    yield _python()
    yield from _packages()
    yield _devices()
    yield from _home()
    yield _ray_auth()
    yield from _ray_address()
    yield _store("storage", storage_uri())
    yield _tracking(tracking_uri())
    yield from _unsent()
    yield _data()
    yield _cache()


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return Check(name="python", status="ok", found=f"{version}, {sys.executable}")


def _packages() -> Iterator[Check]:
    from packaging.requirements import Requirement

    mend = "make setup"
    try:
        declared = metadata.requires("knet-platform") or []
    except metadata.PackageNotFoundError:
        yield Check(name="packages", status="fail", found="knet-platform: missing", mend=mend)
        return
    wrong, count = [], 0
    for requirement in map(Requirement, declared):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        count += 1
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name}: missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version}: needs {requirement.specifier}")
    if wrong:
        yield Check(name="packages", status="fail", found="; ".join(wrong), mend=mend)
        return
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "ray", "mlflow"))
    yield Check(name="packages", status="ok", found=f"all {count} present; {versions}")


def _devices() -> Check:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of CUDA is missing
        return Check(name="devices", status="fail", found=f"torch: {error}", mend="make setup")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Check(name="devices", status="ok", found=", ".join(names))
    if shutil.which("nvidia-smi"):
        return Check(
            name="devices",
            status="warn",
            found="an NVIDIA driver is installed, but torch sees no GPU",
            mend="compare `nvidia-smi` with torch.version.cuda; check CUDA_VISIBLE_DEVICES",
        )
    return Check(name="devices", status="ok", found=f"no GPU; {os.cpu_count()} CPU cores")


def _home() -> Iterator[Check]:
    home = knet_home()
    existing = nearest_existing(home)
    if is_writable(home):
        yield Check(name="KNET_HOME", status="ok", found=str(home))
    else:
        yield Check(
            name="KNET_HOME",
            status="fail",
            found=f"{home}: cannot write in {existing}",
            mend="export KNET_HOME=<a folder of yours>",
        )
    free = shutil.disk_usage(existing).free / 2**30
    status = disk_status(free)
    mend = "" if status == "ok" else "free some, or point KNET_HOME at a larger disk"
    yield Check(name="disk", status=status, found=f"{free:.0f} GiB free", mend=mend)


def _ray_auth() -> Check:
    name, mode = "RAY_AUTH_MODE", os.environ.get("RAY_AUTH_MODE")
    if mode is None:
        return Check(
            name=name,
            status="warn",
            found="unset: servers and clients of Ray then guess differently",
            mend="export RAY_AUTH_MODE=token",
        )
    if mode != "token":
        return Check(name=name, status="ok", found=mode)
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    if os.environ.get("RAY_AUTH_TOKEN") or token.is_file():
        return Check(name=name, status="ok", found="token, and there is a token")
    return Check(
        name=name,
        status="fail",
        found=f"token, but no RAY_AUTH_TOKEN and no file {token}",
        mend="ray get-auth-token --generate (or copy the cluster's token there)",
    )


def _ray_address() -> Iterator[Check]:
    address = os.environ.get("RAY_ADDRESS")
    if not address or address in ("auto", "local"):
        yield Check(
            name="RAY_ADDRESS", status="ok", found=address or "unset: knet run starts a local Ray"
        )
        return
    url = urlsplit(address if "://" in address else f"//{address}")
    yield _reachable("RAY_ADDRESS", address, url.hostname, url.port or 8265, "start the cluster")


def _reachable(name: str, what: str, host: str | None, port: int, mend: str) -> Check:
    try:
        socket.create_connection((host or "localhost", port), timeout=TIMEOUT).close()
    except OSError as error:
        return Check(name=name, status="fail", found=f"{what}: {error}", mend=mend)
    return Check(name=name, status="ok", found=what)


def _store(name: str, uri: str) -> Check:
    """Check a place by its address: a folder, a bucket, or a server."""
    url = urlsplit(uri)
    if url.scheme in ("", "file"):
        existing = nearest_existing(Path(url.path))
        if is_writable(existing):
            return Check(name=name, status="ok", found=uri)
        mend = "make it writable, or name another place"
        return Check(
            name=name, status="fail", found=f"{uri}: cannot write in {existing}", mend=mend
        )
    if url.scheme == "s3":
        try:
            Store(uri).hashes()
        except StorageError as error:
            found, _, mend = str(error).rpartition("; ")
            return Check(name=name, status="fail", found=found, mend=mend)
        return Check(name=name, status="ok", found=uri)
    return Check(name=name, status="ok", found=f"{uri} (not contacted)")


def _tracking(uri: str) -> Check:
    name, url = "tracking", urlsplit(uri)
    if uri == UNTRACKED:
        return Check(name=name, status="ok", found="none: runs are not tracked")
    if url.scheme in ("http", "https"):
        try:
            with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=TIMEOUT):
                return Check(name=name, status="ok", found=uri)
        except (OSError, urllib.error.URLError) as error:
            mend = "start the server, or unset MLFLOW_TRACKING_URI to use a file"
            return Check(name=name, status="fail", found=f"{uri}: {error}", mend=mend)
    if url.scheme == "sqlite":
        file = Path(uri.removeprefix("sqlite:///"))
        if not file.exists():
            return _store(name, str(file))
        try:
            with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as database:
                database.execute("PRAGMA schema_version").fetchone()
        except sqlite3.Error as error:
            mend = "move the file away; results stay in the store"
            return Check(name=name, status="fail", found=f"{file}: {error}", mend=mend)
        return Check(name=name, status="ok", found=uri)
    if url.scheme.startswith("postgresql"):
        return _reachable(name, uri.rpartition("@")[2], url.hostname, url.port or 5432, "start it")
    return _store(name, uri)


def _unsent() -> Iterator[Check]:
    from knet_platform.tracking import journals

    if names := [path.name for path in journals(knet_home())]:
        mend = "knet sync, but for sweeps that run: they send theirs themselves"
        found = f"{', '.join(names)} in {knet_home() / 'tracking'}: not all sent"
        yield Check(name="journals", status="warn", found=found, mend=mend)


def _data() -> Check:
    from knet_core import DATA_HOMES, data_home

    name = next((name for name in DATA_HOMES if os.environ.get(name)), None)
    folder = data_home()
    if name is None:
        found = f"unset: relative data roots lie below {Path.cwd()}"
        return Check(name=DATA_HOMES[0], status="ok", found=found)
    if folder.is_dir():
        return Check(name=name, status="ok", found=str(folder))
    mend = f"export {name}=<the folder that holds the data sets>"
    return Check(name=name, status="fail", found=f"{folder}: no such folder", mend=mend)


def _cache() -> Check:
    """Say what fetched data sets take, and how much of it is still on its way."""
    from knet_platform.staging import Cache

    name = "cache"
    try:
        cache = Cache.in_use()
    except UsageError as error:
        return Check(name=name, status="fail", found=str(error), mend="correct or unset it")
    used, states, pending = cache.used(), cache.states(), cache.pending()
    limit = cache.limit(used)
    whole = sum(state.complete for state in states)
    found = (
        f"{cache.folder}: {used / 1e9:.1f} of {limit / 1e9:.1f} GB, {whole} of {len(states)} data "
        f"sets whole"
    )
    if pending:
        found += f", {pending / 1e9:.1f} GB on their way"
    if disk_status((limit - used) / 2**30) != "ok":
        mend = "nothing, if data sets lie in folders; else point KNET_CACHE at a larger disk"
        return Check(name=name, status="warn", found=found, mend=mend)
    return Check(name=name, status="ok", found=found)


def _show(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    styles = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    width = max(len(check.name) for check in checks)
    for check in checks:
        line = Text(f"{check.status:<5}", style=styles[check.status])
        line.append(f"{check.name:<{width}}  ", style="bold").append(check.found, style="default")
        console.print(line)
        if check.mend:
            console.print(Text(f"{'':{width + 5}}  -> {check.mend}", style="default"))
