"""Where a data set's files lie, and what identifies their content. Loads no torch."""

import functools
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from knet_core.config import DataConfig
from knet_core.errors import DataError

Split = Literal["train", "val"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitFiles:
    """One split as found on disk; both paths are absolute and exist."""

    root: Path
    images: Path
    annotations: Path


def resolve_root(config: DataConfig) -> Path:
    """Return the absolute folder that `data.root` names; a relative one lies below `KNET_DATA`.

    Raises:
        DataError: The folder does not exist.
    """
    base = Path(os.environ.get("KNET_DATA", "."))
    root = (base / Path(config.root).expanduser()).resolve()
    if not root.is_dir():
        raise DataError(
            f"data.root: no folder at {root} (data.root={config.root}, "
            f"KNET_DATA={os.environ.get('KNET_DATA', 'not set')}); expected the data set's "
            f"folder: set data.root to it, or KNET_DATA to the folder above"
        )
    return root


def find_split(config: DataConfig, split: Split) -> SplitFiles:
    """Return the first existing candidates of one split's image folder and annotation file.

    Raises:
        DataError: The root, every image folder or every annotation file is missing.
    """
    root = resolve_root(config)
    candidates = config.train if split == "train" else config.val
    images = next((root / name for name in candidates.images if (root / name).is_dir()), None)
    annotations = next(
        (root / name for name in candidates.annotations if (root / name).is_file()), None
    )
    missing = []
    if annotations is None:
        missing.append(_nothing_of("annotations", "file", split, root, candidates.annotations))
    if images is None:
        missing.append(_nothing_of("images", "folder", split, root, candidates.images))
    if annotations is None or images is None:
        raise DataError("\n".join(missing))
    return SplitFiles(root=root, images=images, annotations=annotations)


def data_fingerprint(config: DataConfig) -> str:
    """Return 64 hex digits that change whenever either split's annotations change.

    Synthetic shapes are identified by their parameters, since those determine every pixel.

    Raises:
        DataError: A file of the data set is missing.
    """
    if config.format == "shapes":
        parameters = json.dumps(asdict(config.shapes), sort_keys=True)
        return hashlib.sha256(f"shapes {parameters}".encode()).hexdigest()
    digest = hashlib.sha256(b"coco")
    splits: tuple[Split, ...] = ("train", "val")
    for split in splits:
        path = find_split(config, split).annotations
        stat = path.stat()
        digest.update(_file_digest(path, stat.st_size, stat.st_mtime_ns))
    return digest.hexdigest()


@functools.lru_cache(maxsize=16)
def _file_digest(path: Path, size: int, mtime_ns: int) -> bytes:
    """Hash a file once per content; a sweep asks for the same file in every trial."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _nothing_of(key: str, kind: str, split: Split, root: Path, candidates: tuple[str, ...]) -> str:
    return (
        f"data.{split}.{key}: no {kind} found below {root}; looked for {', '.join(candidates)}; "
        f"add one of them or set data.{split}.{key}"
    )
