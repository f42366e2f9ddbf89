"""What makes two trials the same: the hash of everything that can change a result.

The resolved recipe with its seed, the data's fingerprint and the core's source code (ADR 0004).
The same inputs give the same hash in every process and on every machine, so what means another
thing elsewhere, or nothing at all, is refused.
"""

import functools
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import knet_core
from knet_core import ConfigError, Recipe

# Where things lie and how often they are shown; none of it can change a result.
_NOT_HASHED = (
    ("data", "root"),
    ("data", "num_workers"),
    ("train", "log_every"),
    ("train", "checkpoint_minutes"),
    ("eval", "probe_images"),
    ("eval", "fps_iterations"),
)


def trial_hash(recipe: Recipe, fingerprint: str, code: str | None = None) -> str:
    """Return the 16 hex digits that identify a run.

    Args:
        recipe: What is run, with its seed.
        fingerprint: Of the data.
        code: Digest of the source code; unset: of the core in use.

    Raises:
        ConfigError: Values that are not the same thing on every machine, all of them.
    """
    return digest(identity(recipe), fingerprint, code_digest() if code is None else code)


def digest(*content: Any) -> str:
    """Return 16 hex digits of plain values."""
    return hashlib.sha256(_canonical(content).encode()).hexdigest()[:16]


def identity(recipe: Recipe) -> dict[str, Any]:
    """Return the part of a recipe that can change a result, in plain values.

    Raises:
        ConfigError: Values that are not the same thing on every machine, all of them.
    """
    values = recipe.to_dict()
    for section, key in _NOT_HASHED:
        del values[section][key]
    backbone = values["model"]["backbone"]
    problems = []
    if backbone["checkpoint"]:  # what is in it counts, not where it lies
        weights = Path(backbone["checkpoint"])
        backbone["checkpoint"] = None
        if weights.is_file():
            stat = weights.stat()
            backbone["checkpoint"] = _file_digest(weights, stat.st_size, stat.st_mtime_ns)
        else:
            problems = [f"model.backbone.checkpoint: no file {weights}; expected one of weights"]
    problems += _problems(values)
    if problems:
        raise ConfigError(problems)
    return values


def same_run(recipe: Recipe) -> str:
    """Return a text that is equal for recipes of the same run and different for all others."""
    return _canonical(identity(recipe))


@functools.cache
def code_digest() -> str:
    """Return the hash of the core's source files and their names."""
    root = Path(knet_core.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(root).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True, allow_nan=False)


def _problems(values: Any, key: str = "") -> Iterator[str]:
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _problems(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for value in values:
            yield from _problems(value, key)
    elif isinstance(values, float) and not math.isfinite(values):
        yield f"{key}: {values} equals nothing, so no trial is found again; expected a number"
    elif isinstance(values, str) and Path(values).is_absolute():
        yield (
            f"{key}: '{values}' is a path of one machine, so the trial would be another one "
            f"elsewhere; expected a path below data.root"
        )
    elif not isinstance(values, str | int | float | None):
        kind = type(values).__name__
        yield f"{key}: a {kind} has no one way to be written down; expected text or a number"


@functools.lru_cache(maxsize=16)
def _file_digest(path: Path, size: int, mtime_ns: int) -> str:
    """Hash a file once per content; every trial of a sweep asks for it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
