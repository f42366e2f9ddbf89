"""`knet submit`: run a sweep as a job of a Ray cluster, follow its log, end as it ends."""

import argparse
import os
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import knet_core
import knet_platform
from knet_core import DataError, data_home
from knet_platform.cli import run as run_verb
from knet_platform.cli.sweeps import load_priced_sweep
from knet_platform.cluster import prepare_environment
from knet_platform.config import read_yaml
from knet_platform.errors import StorageError, UsageError
from knet_platform.home import cache_folder, knet_home, storage_uri
from knet_platform.source import read_source

EXAMPLES = """\
examples:
  knet submit sweeps/stages.yaml --scale laptop
  RAY_ADDRESS=http://10.0.0.5:8265 RAY_AUTH_MODE=token knet submit sweeps/stages.yaml

From the project's folder. The job gets KNET_HOME, KNET_DATA, KNET_STORAGE, KNET_CACHE and
MLFLOW_TRACKING_URI as they are here, so name folders as the cluster sees them; credentials stay
here, the cluster has its own. Submitting the same again continues an interrupted sweep."""

EXCLUDED = (".git", ".venv", ".knet", "/data", "/demo", "/dist", "__pycache__", ".*_cache")
"""What a job has no use for, as in .gitignore, which Ray heeds as well."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments: those of `knet run`."""
    run_verb.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Submit, follow, and return the job's exit code."""
    sweep = _inside(args.sweep)
    # What is wrong with the sweep is better said here and now than in a job's log.
    # The data may lie where only the cluster sees it, or be behind credentials that it has.
    with suppress(DataError, StorageError):
        load_priced_sweep(args)
    prepare_environment()
    from knet_platform.cluster.jobs import SWEEP, Jobs, require_small

    jobs, environment = Jobs(), runtime_env()
    require_small(Path.cwd(), environment["excludes"])
    name = str(read_yaml(sweep).get("name", sweep.stem))
    job = jobs.submit(_entrypoint(sweep, args), environment, {SWEEP: name})
    print(f"job {job}", file=sys.stderr)
    try:
        for text in jobs.follow(job):
            print(text, end="", flush=True)
        return jobs.exit_code(job)
    except KeyboardInterrupt:
        print(
            f"job {job} goes on; knet logs -f {job} follows it, knet cancel {job} ends it",
            file=sys.stderr,
        )
        raise


def runtime_env() -> dict[str, Any]:
    """Return what the job needs of this folder: its files, our packages, where state is kept."""
    here = Path.cwd()
    settings = {
        "KNET_HOME": str(knet_home()),
        "KNET_DATA": str(data_home().absolute()),
    } | read_source().as_environment()
    for name in ("KNET_STORAGE", "KNET_CACHE", "KNET_CACHE_GB", "MLFLOW_TRACKING_URI"):
        if value := os.environ.get(name):
            settings[name] = value
    packages = [Path(str(package.__file__)).parent for package in (knet_core, knet_platform)]
    environment: dict[str, Any] = {
        "working_dir": str(here),
        "excludes": [*EXCLUDED, *_state_folders(here)],
        "env_vars": settings,
    }
    # The working folder alone does not make `platform/knet_platform` importable. An installed
    # wheel is taken to be installed on the cluster, too.
    if all(package.is_relative_to(here) for package in packages):
        environment["py_modules"] = [str(package) for package in packages]
    return environment


def _state_folders(here: Path) -> list[str]:
    """Return the folders of state and data below `here`; the job uses them where they are."""
    folders = [knet_home(), cache_folder(), Path(storage_uri()), data_home()]
    below = [folder.absolute() for folder in folders if folder.absolute().is_relative_to(here)]
    return [f"/{folder.relative_to(here)}" for folder in below if folder != here]


def _inside(sweep: Path) -> Path:
    path = sweep.absolute()
    if not path.is_relative_to(Path.cwd()):
        raise UsageError(
            f"{sweep}: not below {Path.cwd()}, which is what a job takes along; "
            f"submit from the project's folder"
        )
    return path.relative_to(Path.cwd())


def _entrypoint(sweep: Path, args: argparse.Namespace) -> str:
    words = ["python", "-m", "knet_platform.cli.main", "run", str(sweep), *args.overrides]
    for flag, value in (
        ("--scale", args.scale),
        ("--seeds", args.seeds),
        ("--max-usd", args.max_usd),
        ("--instance", args.instance),
        ("--prices", args.prices),
    ):
        words += [] if value is None else [flag, str(value)]
    words += [
        flag
        for flag, given in (("--spot", args.spot), ("--yes", args.yes), ("--json", args.json))
        if given
    ]
    return shlex.join(words)
