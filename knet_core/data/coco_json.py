"""What COCO's instance and panoptic files have in common: images, categories, problems.

Every problem found is one line; all problems of a file are reported together.
"""

import posixpath
import reprlib
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knet_core.data.json_stream import Consumer, read_lists
from knet_core.data.paths import SplitFiles
from knet_core.data.source import MOST_PIXELS, Category
from knet_core.data.storage import Folders
from knet_core.errors import DataError

_MOST_PROBLEMS = 20
_MOST_SIDE = 2**16


class Problems:
    """Collects what is wrong with a data set, to report it together."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lines: list[str] = []
        self._count = 0

    def add(self, where: str, text: str) -> None:
        """Note one problem of the file."""
        self._count += 1
        if self._count <= _MOST_PROBLEMS:
            self._lines.append(printable(f"{self._file}: {where}: {text}"))

    def raise_all(self) -> None:
        """Raise what was noted, if anything.

        Raises:
            DataError: One line for each problem, the first 20 of them.
        """
        if not self._lines:
            return
        shown = list(self._lines)
        if hidden := self._count - len(shown):
            shown.append(printable(f"{self._file}: and {hidden} more problems"))
        raise DataError("\n".join(shown))


class Images:
    """Takes a file's images one by one; keeps ids, file names and sizes of those without fault."""

    def __init__(self) -> None:
        self.ids = array("q")
        self.names: list[str] = []
        self._sizes = array("i")
        self._faults: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self.ids) + len(self._faults)

    @property
    def sizes(self) -> NDArray[np.int32]:
        """(I, 2) height and width."""
        return np.array(self._sizes, dtype=np.int32).reshape(-1, 2)

    def add(self, position: int, entry: Any) -> None:
        """Take one image."""
        number, name = get(entry, "id"), get(entry, "file_name")
        size = get(entry, "height"), get(entry, "width")
        if not (is_id(number) and isinstance(name, str)):
            where, fault = f"images[{position}]", "expected an integer id and a file_name"
        elif not all(is_id(side) and 0 < side <= _MOST_SIDE for side in size):
            where, fault = (
                f"image {number}",
                f"height {short(size[0])}, width {short(size[1])}; expected pixels, both > 0 and "
                f"at most {_MOST_SIDE}",
            )
        elif size[0] * size[1] > MOST_PIXELS:
            where, fault = (
                f"image {number}",
                f"{size[1]} x {size[0]} pixels; expected at most {MOST_PIXELS}: cut it into tiles",
            )
        else:
            self.ids.append(number)
            self.names.append(name)
            self._sizes.extend(size)
            return
        self._faults.append((where, fault))

    def report(self, problems: Problems) -> None:
        """Note what is wrong with the images."""
        for where, fault in self._faults:
            problems.add(where, fault)
        for number in repeated(self.ids):
            problems.add(f"image id {number}", "listed twice; give every image its own id")


def parse(
    path: Path, kind: str, consume: Consumer, *, needed: bool = True
) -> tuple[Images, list[Any], bool]:
    """Return a COCO file's images and categories; its annotations are handed over one by one.

    Args:
        path: The JSON file.
        kind: What it should hold, for messages: instances or panoptic.
        consume: Takes position and value of every annotation.
        needed: A file of images and categories alone is refused.

    Returns:
        Images, categories, and whether the file has a list of annotations.

    Raises:
        DataError: The file cannot be read, is not JSON, or lacks a list.
    """
    images = Images()
    categories: list[Any] = []
    found = read_lists(
        path,
        kind,
        {
            "images": images.add,
            "annotations": consume,
            "categories": lambda position, entry: categories.append(entry),
        },
    )
    optional = set() if needed or not images else {"annotations"}
    for key in ("images", "annotations", "categories"):
        if key not in found | optional:
            raise DataError(
                f"{path}: no list named {key!r}; expected COCO {kind} with images, "
                f"annotations and categories: check that this is the {kind} file"
            )
    return images, categories, "annotations" in found


def read_categories(
    entries: Sequence[Any], problems: Problems, *, kinds: bool
) -> tuple[Category, ...]:
    """Return the classes, things first, then stuff, each by id.

    Args:
        entries: The file's list.
        problems: Where to note what is wrong.
        kinds: The file tells things from stuff; otherwise all are things.
    """
    found = []
    for position, entry in enumerate(entries):
        if not (is_id(get(entry, "id")) and isinstance(get(entry, "name"), str)):
            problems.add(f"categories[{position}]", "expected an integer id and a name")
        elif kinds and get(entry, "isthing") not in (0, 1):
            problems.add(
                f"category id {entry['id']}",
                f"isthing is {short(entry.get('isthing'))}; expected 1 for things or 0 for stuff",
            )
        else:
            isthing = bool(entry["isthing"]) if kinds else True
            found.append(Category(entry["id"], entry["name"], isthing))
    for number in repeated(category.id for category in found):
        problems.add(f"category id {number}", "listed twice; give every class its own id")
    if not entries:
        problems.add("categories", "empty; expected at least one class")
    return tuple(sorted(found, key=lambda category: (not category.isthing, category.id)))


def check_files(
    ids: Iterable[int],
    names: Iterable[str],
    files: SplitFiles,
    problems: Problems,
    *,
    folder: Path | None = None,
) -> None:
    """Look every image up, reading each folder once; nothing outside the set is looked at.

    Args:
        ids: Of the images.
        names: Their files, relative to `folder`.
        files: The split.
        problems: Where to note what is missing or lies outside.
        folder: Of the files; unset: of the images.
    """
    kind = "image file" if folder is None else "segments"
    base = posixpath.normpath(folder or files.images)
    # The recipe may place images elsewhere.
    allowed = (posixpath.normpath(files.root).rstrip("/") + "/", base + "/")
    folders = Folders([files.root, folder or files.images])
    direct = folders.list(base).names
    for number, name in zip(ids, names, strict=True):
        if name in direct:
            continue
        path = posixpath.normpath(posixpath.join(base, name))
        inside = path.startswith(allowed)
        listing = folders.list(posixpath.dirname(path)) if inside else None
        if listing is None or posixpath.basename(path) in listing.outside:
            problems.add(
                f"image {number}",
                f"file_name {short(name)} points outside the data set {files.root}; expected a "
                f"path below {base}"
                + (": correct the file_name" if listing is None else ", no link: copy the file"),
            )
        elif posixpath.basename(path) not in listing.names:
            problems.add(
                f"image {number}",
                f"no {kind} {path}; add the file or remove the entry and its annotations",
            )


def report_unknown(
    kind: str, unknown: Counter[str], categories: Sequence[Category], problems: Problems
) -> None:
    """Note every category or image id that annotations use and the file does not list."""
    if kind == "image":
        listed, remedy = "images", "add the image or remove the annotations"
    else:
        ids = sorted(category.id for category in categories)
        listed = f"categories ({_short_list(ids)})"
        remedy = "add the category or correct the annotations"
    for number, times in unknown.items():
        problems.add(
            f"{kind} id {number}",
            f"used by {times} annotations but not in the list of {listed}; {remedy}",
        )


def get(entry: Any, key: str, default: Any = None) -> Any:
    """Return a value of a JSON object, or the default where `entry` is none."""
    return entry.get(key, default) if isinstance(entry, dict) else default


def is_id(value: Any) -> bool:
    """Tell whether a JSON value is a whole number of at most 64 bits."""
    return type(value) is int and -(2**63) <= value < 2**63  # asked millions of times; no bool


def short(value: Any) -> str:
    """Return any JSON value as a few characters."""
    return reprlib.repr(value) if not isinstance(value, str) else f"{value[:200]!r}"


def printable(text: str) -> str:
    """Return one line that any terminal can show, whatever names from a file it repeats."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in text
    )


def repeated(ids: Iterable[int]) -> list[int]:
    """Return what occurs more than once."""
    return [number for number, times in Counter(ids).items() if times > 1]


def _short_list(ids: Sequence[int]) -> str:
    if len(ids) <= 12:
        return ", ".join(map(str, ids))
    return f"{len(ids)} ids from {ids[0]} to {ids[-1]}"
