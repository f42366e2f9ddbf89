"""Where a data set's files lie, and what identifies their content. Loads no torch."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from knet_core.config import DataConfig
from knet_core.data.storage import FolderFiles, SetFiles, is_address, served_folder
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
        DataError: The folder does not exist, or the root is an address that nobody has fetched.
    """
    if is_address(config.root):
        return served_folder(config.root)
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
    images, annotations = _find(config, split, FolderFiles(root), str(root))
    return SplitFiles(root=root, images=root / images, annotations=root / annotations)


def _find(config: DataConfig, split: Split, files: SetFiles, root: str) -> tuple[str, str]:
    """Return the names of one split's images and annotations."""
    candidates = config.train if split == "train" else config.val
    kind = "folder" if config.format in _MAPS else "file"
    exists = files.is_dir if kind == "folder" else files.is_file
    images = next(filter(files.is_dir, candidates.images), None)
    annotations = next(filter(exists, candidates.annotations), None)
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
    return images, annotations


def data_fingerprint(config: DataConfig, files: SetFiles | None = None) -> str:
    """Return 64 hex digits that change whenever either split's annotations change.

    The same on every machine: times of files do not count. Synthetic shapes are identified by
    their parameters, since those determine every pixel. Annotation files are hashed whole. Folders
    of label maps may hold 20,000 of them, so of each only name, size and last bytes are taken: a
    PNG ends with the checksum of its pixels. The segments of a panoptic JSON file state area and
    box of each, so of their PNGs only names and sizes are taken.

    Args:
        config: The data set.
        files: Where its files are looked up; unset: in the folder of its root.

    Raises:
        DataError: A file of the data set is missing.
    """
    if config.format == "shapes":
        parameters = json.dumps(asdict(config.shapes), sort_keys=True)
        return hashlib.sha256(f"shapes {parameters}".encode()).hexdigest()
    root = config.root
    if files is None:
        folder = resolve_root(config)
        files, root = FolderFiles(folder), str(folder)
    digest = hashlib.sha256(config.format.encode())
    splits: tuple[Split, ...] = ("train", "val")
    for split in splits:
        _, annotations = _find(config, split, files, root)
        if config.format in _MAPS:
            _add_folder(digest, files, annotations, _MAPS[config.format], tail=_PNG_TAIL)
            continue
        digest.update(files.digest(annotations))
        if config.format == "coco_panoptic":
            maps = PurePosixPath(annotations).with_suffix("").as_posix()
            _add_folder(digest, files, maps, "*.png", tail=0)
    if config.format == "ade20k" and not config.classes and files.is_file(CLASSES_FILE):
        digest.update(files.read(CLASSES_FILE))
    return digest.hexdigest()


def _add_folder(
    digest: "hashlib._Hash", files: SetFiles, folder: str, pattern: str, *, tail: int
) -> None:
    """Add name, size and the last `tail` bytes of every matching file in a folder."""
    sizes = files.sizes(folder, pattern)
    names = sorted(sizes, key=lambda name: name.split("/"))
    tails = (
        files.tails([f"{folder}/{name}" for name in names], tail) if tail else [b""] * len(names)
    )
    for name, end in zip(names, tails, strict=True):
        digest.update(f"{name.rpartition('/')[2]} {sizes[name]} ".encode())
        digest.update(end)


def _nothing_of(key: str, kind: str, split: Split, root: str, candidates: tuple[str, ...]) -> str:
    return (
        f"data.{split}.{key}: no {kind} found below {root}; looked for {', '.join(candidates)}; "
        f"add one of them or set data.{split}.{key}"
    )
