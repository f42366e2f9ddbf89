"""Where state is kept: `KNET_HOME`, `KNET_STORAGE`, `KNET_CACHE` and `MLFLOW_TRACKING_URI`.

They are read here only.
"""

import math
import os
from pathlib import Path

from knet_platform.errors import UsageError

UNTRACKED = "none"
"""Value of `MLFLOW_TRACKING_URI` that switches tracking off."""


def knet_home() -> Path:
    """Return the absolute state folder; it need not exist yet.

    Raises:
        UsageError: In the working folder of a Ray job without `KNET_HOME`: Ray deletes that
            folder, and every result in it, when the job ends.
    """
    home = os.environ.get("KNET_HOME")
    if home:
        return Path(home).expanduser().absolute()
    here = Path.cwd()
    # Ray unpacks a job's working folder as .../working_dir_files/_ray_pkg_<hash>.
    if any(part.startswith("_ray_pkg_") for part in here.parts):
        raise UsageError(
            "KNET_HOME: not set inside a Ray job, whose working folder is deleted when it ends; "
            "expected a folder that stays: submit with `knet submit`, or add --runtime-env-json "
            '\'{"env_vars": {"KNET_HOME": "/absolute/path"}}\''
        )
    return here / ".knet"


def storage_uri() -> str:
    """Return where results and checkpoints go: an absolute local path or an s3:// address."""
    storage = os.environ.get("KNET_STORAGE")
    if not storage:
        return str(knet_home() / "storage")
    return storage.rstrip("/") if "://" in storage else str(Path(storage).expanduser().absolute())


def cache_folder() -> Path:
    """Return the absolute folder of fetched data sets; it need not exist yet."""
    folder = os.environ.get("KNET_CACHE")
    return Path(folder).expanduser().absolute() if folder else knet_home() / "cache"


def cache_gb() -> float | None:
    """Return how much fetched data sets may take, in GB; None: most of the disk's free space.

    Raises:
        UsageError: `KNET_CACHE_GB` is no size.
    """
    text = os.environ.get("KNET_CACHE_GB")
    if not text:
        return None
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < math.inf:
        raise UsageError(f"KNET_CACHE_GB: got '{text}', expected a size in GB such as 200")
    return size


def tracking_uri() -> str:
    """Return MLflow's store: `MLFLOW_TRACKING_URI`, else a SQLite file in the state folder.

    `UNTRACKED` in its place means that nobody is told of runs.
    """
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{knet_home() / 'mlflow.db'}"


def nearest_existing(folder: Path) -> Path:
    """Return a path's nearest part that is there."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def is_writable(folder: Path) -> bool:
    """Tell whether files can be made in a folder, which need not exist yet."""
    existing = nearest_existing(folder)
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def require_writable(
    folder: Path, named_by: str = "KNET_HOME, and KNET_STORAGE if that is set,"
) -> None:
    """Refuse a local folder for state in which nothing can be kept, before there is any.

    Args:
        folder: It, which need not exist.
        named_by: What sets it.

    Raises:
        UsageError: It is read-only, or of somebody else.
    """
    if not is_writable(folder):
        raise UsageError(
            f"{folder}: cannot write in {nearest_existing(folder)}; expected a folder of yours: "
            f"set {named_by} to one"
        )
