"""Arrays kept between runs below the user's cache folder, and mapped into memory from there.

All processes of a machine share the mapped pages. An entry belongs to one file as it was: its
path, size and time of change. It is written whole or not at all, holds no pickles, and is only an
economy: what is missing, damaged or cannot be written is built from the file again.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]

_WORTH = 8 * 2**20
"""Bytes of a file below which parsing is fast enough."""
_VERSION = "2"
"""Of the arrays' meaning; another one makes another entry."""


def load(path: Path, kind: str) -> Arrays | None:
    """Return the arrays kept for a file, read-only; None where there are none."""
    entry = _entry(path, kind)
    if entry is None or not entry.is_dir():
        return None
    try:
        return {
            file.stem: np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
            for file in sorted(entry.iterdir())
        }
    except (OSError, ValueError, EOFError):
        return None


def save(path: Path, kind: str, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Keep a file's arrays, in place of those of its earlier states."""
    entry = _entry(path, kind)
    if entry is None:
        return
    try:
        entry.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".", dir=entry.parent))
    except OSError:
        return
    try:
        for name, array in arrays.items():
            np.save(unfinished / f"{name}.npy", array, allow_pickle=False)
        for earlier in entry.parent.iterdir():
            if not earlier.name.startswith("."):  # those are other processes' unfinished ones
                shutil.rmtree(earlier, ignore_errors=True)
        unfinished.rename(entry)
    except OSError:  # a full disk, or another process was first
        shutil.rmtree(unfinished, ignore_errors=True)


def pack(value: object) -> NDArray[np.uint8]:
    """Return plain values as an array of JSON text."""
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)


def unpack(text: NDArray[np.uint8]) -> Any:
    """Return what was packed.

    Raises:
        ValueError: The text is damaged.
    """
    return json.loads(text.tobytes())


def is_partition(first: NDArray[np.int64], groups: int, length: int) -> bool:
    """Tell whether `first` (groups + 1,) cuts `length` rows into consecutive groups."""
    return (
        first.shape == (groups + 1,)
        and bool((np.diff(first) >= 0).all())
        and (int(first[0]), int(first[-1])) == (0, length)
    )


def _entry(path: Path, kind: str) -> Path | None:
    """Return where a file's arrays lie; None for a file that needs none."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    try:
        stat = path.stat()
    except OSError:
        return None
    if stat.st_size < _WORTH or not base.is_absolute():
        return None
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    state = f"{kind}-{_VERSION}-{stat.st_size}-{stat.st_mtime_ns}"
    return base / "knet" / "annotations" / name / state
