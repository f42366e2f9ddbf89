"""Where a data set's files lie, and what identifies their content. Loads no torch."""

import functools
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from knet_core.config import DataConfig
from knet_core.data.storage import refuse_remote
from knet_core.errors import DataError

Split = Literal["train", "val"]

CLASSES_FILE = "classes.txt"
"""In the root of an ADE20K-like set: line n names category id n."""
_MAPS = {"ade20k": "*.png", "cityscapes": "*/*_gtFine_*Ids.png"}
"""Formats whose annotations are a folder, and the files in it that identify them."""
DATA_HOMES = ("KNET_DATA", "DETECTRON2_DATASETS")
"""Variables that name the folder of relative roots, the first one set."""
_PNG_TAIL = 20
"""Adler-32 of all pixels, CRC-32 of the last data chunk, and the closing chunk of a PNG."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitFiles:
    """One split as found on disk; both paths are absolute and exist."""

    root: Path
    images: Path
    annotations: Path


def data_home() -> Path:
    """Return the folder that relative roots lie below.

    `KNET_DATA`, else `DETECTRON2_DATASETS`, whose layout is the same, else the working folder.
    """
    return Path(next((os.environ[name] for name in DATA_HOMES if os.environ.get(name)), "."))


def resolve_root(config: DataConfig) -> Path:
    """Return the absolute folder that `data.root` names; a relative one lies below `data_home()`.

    Raises:
        DataError: The folder does not exist.
    """
    refuse_remote(config.root)
    root = (data_home() / Path(config.root).expanduser()).resolve()
    if not root.is_dir():
        homes = ", ".join(f"{name}={os.environ.get(name, 'not set')}" for name in DATA_HOMES)
        raise DataError(
            f"data.root: no folder at {root} (data.root={config.root}, {homes}); expected the "
            f"data set's folder: set data.root to it, or KNET_DATA to the folder above"
        )
    return root


def find_split(config: DataConfig, split: Split) -> SplitFiles:
    """Return the first existing candidates of one split's images and annotations.

    Annotations are a folder in the layouts of ADE20K and Cityscapes and a file in the others.

    Raises:
        DataError: The root, every image folder or all annotations are missing.
    """
    root = resolve_root(config)
    candidates = config.train if split == "train" else config.val
    images = next((root / name for name in candidates.images if (root / name).is_dir()), None)
    kind = "folder" if config.format in _MAPS else "file"
    exists = Path.is_dir if kind == "folder" else Path.is_file
    annotations = next(
        (root / name for name in candidates.annotations if exists(root / name)), None
    )
    missing = []
    if annotations is None:
        line = _nothing_of("annotations", kind, split, root, candidates.annotations)
        alone = kind == "folder" and images is not None and split == "val"
        hint = "; images without maps are for knet predict" if alone else ""
        missing.append(f"{line}{hint}")
    if images is None:
        missing.append(_nothing_of("images", "folder", split, root, candidates.images))
    if annotations is None or images is None:
        raise DataError("\n".join(missing))
    return SplitFiles(root=root, images=images, annotations=annotations)


def data_fingerprint(config: DataConfig) -> str:
    """Return 64 hex digits that change whenever either split's annotations change.

    The same on every machine: times of files do not count. Synthetic shapes are identified by
    their parameters, since those determine every pixel. Annotation files are hashed whole. Folders
    of label maps may hold 20,000 of them, so of each only name, size and last bytes are taken: a
    PNG ends with the checksum of its pixels. The segments of a panoptic JSON file state area and
    box of each, so of their PNGs only names and sizes are taken.

    Raises:
        DataError: A file of the data set is missing.
    """
    if config.format == "shapes":
        parameters = json.dumps(asdict(config.shapes), sort_keys=True)
        return hashlib.sha256(f"shapes {parameters}".encode()).hexdigest()
    digest = hashlib.sha256(config.format.encode())
    splits: tuple[Split, ...] = ("train", "val")
    for split in splits:
        annotations = find_split(config, split).annotations
        if config.format in _MAPS:
            _add_folder(digest, annotations, _MAPS[config.format], tail=_PNG_TAIL)
            continue
        stat = annotations.stat()
        digest.update(_file_digest(annotations, stat.st_size, stat.st_mtime_ns))
        if config.format == "coco_panoptic":
            _add_folder(digest, annotations.with_suffix(""), "*.png", tail=0)
    names = resolve_root(config) / CLASSES_FILE
    if config.format == "ade20k" and not config.classes and names.is_file():
        digest.update(names.read_bytes())
    return digest.hexdigest()


def _add_folder(digest: "hashlib._Hash", folder: Path, pattern: str, *, tail: int) -> None:
    """Add name, size and the last `tail` bytes of every matching file in a folder."""
    for path in sorted(folder.glob(pattern)):
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        if tail:
            with path.open("rb") as file:
                file.seek(-min(tail, path.stat().st_size), os.SEEK_END)
                digest.update(file.read())


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
