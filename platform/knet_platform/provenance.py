"""What made a result: data, code, environment and command, recorded once when a trial starts."""

import hashlib
import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import knet_core
from knet_core import Recipe, data_home, is_address
from knet_platform.identity import code_digest
from knet_platform.redaction import clean_command
from knet_platform.source import Source
from knet_platform.staging import fingerprint

PACKAGES = (
    *("boto3", "faster-coco-eval", "jinja2", "mlflow", "numpy", "nvidia-ml-py", "omegaconf"),
    *("optuna", "packaging", "pillow", "plotly", "pyarrow", "pycocotools", "pyyaml", "ray"),
    *("rich", "safetensors", "scipy", "timm", "torch", "torchvision"),
)
"""The project's direct dependencies; a job's copy of the code has no metadata that lists them."""

EVALUATION_CODE = (
    # What turns a trained network and a data set into a score. The network itself is not part of
    # it, nor is the training: rows of one table differ in those on purpose.
    *("evaluation.py", "prediction.py", "tasks.py", "postprocess.py", "resizing.py"),
    *("panoptic_paste.py", "panoptic_tiles.py"),
    *("metrics/mask_ap.py", "metrics/mean_iou.py", "metrics/metric.py"),
    "metrics/panoptic_quality.py",
    *("data/dataset.py", "data/source.py", "data/transforms.py"),
)
"""Files of `knet_core`."""
EVALUATION_PACKAGES = ("faster-coco-eval", "pycocotools", "torchvision")

_CORE = Path(knet_core.__file__).parent
_LOCK = "requirements.lock"


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Everything that a run depends on, apart from the data itself; plain values."""

    recipe: dict[str, Any]
    """Fully resolved, with the seed and the absolute folder of the data."""
    workers: int
    """Processes that share a batch."""
    data_fingerprint: str
    code_digest: str
    """Of `knet_core`, as in the trial's hash."""
    code_files: dict[str, str]
    """First digits of the digest of every file of `knet_core`, by path."""
    evaluation_digest: str
    """Of what decides a score: `EVALUATION_CODE` and the versions of `EVALUATION_PACKAGES`."""
    git_sha: str | None
    """None outside a repository."""
    patch: bool
    """Whether uncommitted changes are recorded beside this, in `patch.diff`."""
    notes: tuple[str, ...]
    """What of the code could not be recorded, and why."""
    lock_digest: str | None
    """Of `requirements.lock`, where there is one."""
    packages: dict[str, str]
    """Versions of the direct dependencies."""
    python: str
    platform: str
    accelerator: dict[str, str] | None
    """Name, driver and CUDA version of the first worker's GPU; None for a run on CPUs."""
    threads: int | None = None
    """Threads of the first worker's torch, which decide the order of sums on CPUs; None before it
    started."""
    command: str
    """As it was typed, without secrets."""
    started_at: str
    """ISO 8601."""


def capture(recipe: Recipe, *, workers: int, source: Source) -> Provenance:
    """Describe a run that starts in this process now.

    Args:
        recipe: The run.
        workers: Processes that share a batch.
        source: The code in use.

    Raises:
        DataError: A file of the data set is missing.
    """
    files = _code_files()
    versions = _versions()
    return Provenance(
        recipe=with_absolute_root(recipe).to_dict(),
        workers=workers,
        data_fingerprint=fingerprint(recipe.data),
        code_digest=code_digest(),
        code_files=dict(files),
        evaluation_digest=_evaluation_digest(files, versions),
        git_sha=source.git_sha,
        patch=source.has_changes,
        notes=source.notes,
        lock_digest=_lock_digest(),
        packages=dict(versions),
        python=platform.python_version(),
        platform=platform.platform(),
        accelerator=None,
        command=_command(tuple(sys.argv)),
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def with_absolute_root(recipe: Recipe) -> Recipe:
    """Return the recipe with its data's folder as other processes need it, who run elsewhere."""
    if is_address(recipe.data.root):
        return recipe
    root = (data_home() / Path(recipe.data.root).expanduser()).absolute()
    return replace(recipe, data=replace(recipe.data, root=str(root)))


def accelerator() -> dict[str, str] | None:
    """Describe this process's GPU; None without one. Loads torch."""
    import torch

    if not torch.cuda.is_available():
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        driver = found.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = "unknown"
    return {
        "name": torch.cuda.get_device_name(),
        "driver": driver,
        "cuda": torch.version.cuda or "none",
    }


@cache
def _code_files() -> Mapping[str, str]:
    return {
        file.relative_to(_CORE).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()[:12]
        for file in sorted(_CORE.rglob("*.py"))
    }


@cache
def _versions() -> Mapping[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def _evaluation_digest(files: Mapping[str, str], versions: Mapping[str, str]) -> str:
    parts = [f"{name} {files[name]}" for name in EVALUATION_CODE]
    parts += [f"{name} {versions[name]}" for name in EVALUATION_PACKAGES]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _lock_digest() -> str | None:
    # A job's packages are unpacked apart from its working folder, which holds the lock.
    for folder in (_CORE.parent, Path.cwd()):
        if (folder / _LOCK).is_file():
            return hashlib.sha256((folder / _LOCK).read_bytes()).hexdigest()
    return None


@cache
def _command(argv: Sequence[str]) -> str:
    program = Path(argv[0]).name
    # python -m knet_platform.cli.main
    return clean_command(["knet" if program == "main.py" else program, *argv[1:]])
