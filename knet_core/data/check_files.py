"""What a split lists on disk, and the lister of ADE20K's layout.

Listers tolerate everything: faults become findings, the rest is kept.
"""

import posixpath
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knet_core.config import DataConfig
from knet_core.data.check_report import Id, Notes
from knet_core.data.coco_json import short
from knet_core.data.paths import CLASSES_FILE, SplitFiles
from knet_core.data.source import Category
from knet_core.data.storage import Folders

_IMAGE_ENDINGS = {".jpg", ".jpeg", ".png"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One annotation of an image, or one segment of its map."""

    id: Id
    label: int
    """Position of its category; -1 where that is not listed."""
    iscrowd: bool
    area: float | None
    """As stated, in pixels."""
    segmentation: Any = None
    """Polygons (a tuple of arrays where all are numbers) or run lengths, as the file has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One image as listed."""

    id: Id
    path: Path | None
    """None: not there, or not to be read."""
    size: tuple[int, int] | None
    """Height and width as stated; None where nothing or nonsense is."""
    listed_in: Path
    marks: tuple[Mark, ...] = ()
    map: Path | None = None
    """PNG of segments or classes; None: the format has none, or it is not to be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """One split; things come first among the categories, then stuff, both by id."""

    categories: tuple[Category, ...]
    entries: tuple[Entry, ...]
    annotated: bool = True
    """False: a file that lists images alone."""


def list_semantic_folder(files: SplitFiles, config: DataConfig, notes: Notes) -> Listing | None:
    """List a set in ADE20K's layout; images are known by their names without ending."""
    folders = Folders([files.root, files.images, files.annotations])
    names: dict[str, list[str]] = defaultdict(list)
    images, maps = folders.list(files.images), folders.list(files.annotations)
    for name in sorted(images.names):
        if Path(name).suffix.lower() in _IMAGE_ENDINGS:
            names[Path(name).stem].append(name)
    for folder, listing in ((files.images, images), (files.annotations, maps)):
        for name in sorted(listing.outside):
            _add_outside(notes, Path(name).stem, name, folder, files)
    there = {Path(name).stem for name in maps.names if name.endswith(".png")}
    linked = {Path(name).stem for name in images.outside | maps.outside}
    for stem in sorted(names.keys() - there - linked):
        notes.add(
            "missing-map",
            stem,
            f"image {stem} has no label map {stem}.png",
            file=files.images / names[stem][0],
        )
    for stem in sorted(there - names.keys() - linked):
        notes.add(
            "map-without-image",
            stem,
            f"label map {stem}.png has no image",
            file=files.annotations / f"{stem}.png",
        )
    for stem, found in names.items():
        if len(found) > 1:
            notes.add("duplicate-id", stem, f"images {', '.join(found)} share one label map")
    return Listing(
        categories=tuple(
            Category(number, name, isthing=False)
            for number, name in enumerate(_class_names(files, config, notes), start=1)
        ),
        entries=tuple(
            Entry(
                id=stem,
                path=files.images / found[0],
                size=None,
                listed_in=files.annotations,
                map=files.annotations / f"{stem}.png" if stem in there else None,
            )
            for stem, found in names.items()
        ),
    )


def locate(
    name: str,
    folder: Path,
    files: SplitFiles,
    folders: Folders,
    notes: Notes,
    number: Id,
    missing: str,
) -> Path | None:
    """Return where a listed file lies, or note that it is missing or not to be read."""
    path = posixpath.normpath(posixpath.join(folder, name))
    below = tuple(posixpath.normpath(place).rstrip("/") + "/" for place in (files.root, folder))
    listing = folders.list(posixpath.dirname(path)) if path.startswith(below) else None
    leaf = posixpath.basename(path)
    if listing is None or leaf in listing.outside:
        _add_outside(notes, number, name, folder, files)
    elif leaf not in listing.names:
        notes.add(missing, number, f"no file {path} of image {number}", file=Path(path))
    else:
        return Path(path)
    return None


def _add_outside(notes: Notes, number: Id, name: str, folder: Path, files: SplitFiles) -> None:
    notes.add(
        "outside-root",
        number,
        f"{short(name)} of image {number} leads out of {files.root}; not read",
        file=folder / name,
    )


def _class_names(files: SplitFiles, config: DataConfig, notes: Notes) -> Sequence[str]:
    path = files.root / CLASSES_FILE
    if config.classes:
        return config.classes
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        notes.add(
            "missing-files", None, f"no class names in data.classes or {path}: {error}", file=path
        )
        return []
