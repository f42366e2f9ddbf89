"""What COCO's instance and panoptic files have in common: images, categories, problems.

Every problem found is one line; all problems of a file are reported together.
"""

import json
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from knet_core.data.paths import SplitFiles
from knet_core.data.source import Category
from knet_core.errors import DataError

_MOST_PROBLEMS = 20


class Problems:
    """Collects what is wrong with a data set, to report it together."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lines: list[str] = []

    def add(self, where: str, text: str) -> None:
        """Note one problem of the file."""
        self._lines.append(f"{self._file}: {where}: {text}")

    def raise_all(self) -> None:
        """Raise what was noted, if anything.

        Raises:
            DataError: One line for each problem, the first 20 of them.
        """
        if not self._lines:
            return
        shown = self._lines[:_MOST_PROBLEMS]
        if hidden := len(self._lines) - len(shown):
            shown.append(f"{self._file}: and {hidden} more problems")
        raise DataError("\n".join(shown))


def parse(path: Path, kind: str, compact: Callable[[dict[str, Any]], Any]) -> dict[str, list[Any]]:
    """Return a COCO file's lists of images, annotations and categories.

    Args:
        path: The JSON file.
        kind: What it should hold, for messages: instances or panoptic.
        compact: Applied to every JSON object while the file is still being parsed.

    Raises:
        DataError: The file cannot be read, is not JSON, or lacks a list.
    """
    try:
        document: Any = json.loads(path.read_bytes(), object_hook=compact)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not JSON ({error}); expected COCO {kind}: write or download it again"
        ) from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); check the file's permissions"
        ) from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(document, dict) or not isinstance(document.get(key), list):
            raise DataError(
                f"{path}: no list named {key!r}; expected COCO {kind} with images, "
                f"annotations and categories: check that this is the {kind} file"
            )
    checked: dict[str, list[Any]] = document
    return checked


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
                f"isthing is {entry.get('isthing')!r}; expected 1 for things or 0 for stuff",
            )
        else:
            isthing = bool(entry["isthing"]) if kinds else True
            found.append(Category(entry["id"], entry["name"], isthing))
    for number in repeated(category.id for category in found):
        problems.add(f"category id {number}", "listed twice; give every class its own id")
    if not entries:
        problems.add("categories", "empty; expected at least one class")
    return tuple(sorted(found, key=lambda category: (not category.isthing, category.id)))


def read_images(
    entries: Sequence[Any], files: SplitFiles, problems: Problems
) -> tuple[list[int], list[str], list[tuple[int, int]]]:
    """Return ids, file names and (height, width) of all images; every file is looked up."""
    ids, names, sizes = [], [], []
    for position, entry in enumerate(entries):
        number, name = get(entry, "id"), get(entry, "file_name")
        size = get(entry, "height"), get(entry, "width")
        if not (is_id(number) and isinstance(name, str)):
            problems.add(f"images[{position}]", "expected an integer id and a file_name")
        elif not all(is_id(side) and side > 0 for side in size):
            problems.add(
                f"image {number}",
                f"height {size[0]!r}, width {size[1]!r}; expected pixels, both > 0",
            )
        else:
            ids.append(number)
            names.append(name)
            sizes.append(size)
    for number in repeated(ids):
        problems.add(f"image id {number}", "listed twice; give every image its own id")
    _check_files(ids, names, files, problems)
    return ids, names, sizes


def _check_files(
    ids: Sequence[int], names: Sequence[str], files: SplitFiles, problems: Problems
) -> None:
    """Look every image up, reading each folder once."""
    root, images = str(files.root), posixpath.normpath(files.images)
    allowed = (root.rstrip("/") + "/", images + "/")  # the recipe may place images elsewhere
    listings: dict[str, set[str]] = {}
    for number, name in zip(ids, names, strict=True):
        path = posixpath.normpath(posixpath.join(images, name))
        if not path.startswith(allowed):
            problems.add(
                f"image {number}",
                f"file_name {name!r} points outside the data set {root}; expected a path "
                f"below {images}: correct the file_name",
            )
            continue
        folder, _, leaf = path.rpartition("/")
        if folder not in listings:
            listings[folder] = list_files(folder)
        if leaf not in listings[folder]:
            problems.add(
                f"image {number}",
                f"no image file {path}; add the file or remove the entry and its annotations",
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


def list_files(folder: str | Path) -> set[str]:
    """Return the names in a folder; none where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries}
    except (OSError, ValueError):  # ValueError: a null byte in the name
        return set()


def get(entry: Any, key: str, default: Any = None) -> Any:
    """Return a value of a JSON object, or the default where `entry` is none."""
    return entry.get(key, default) if isinstance(entry, dict) else default


def is_id(value: Any) -> bool:
    """Tell whether a JSON value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def repeated(ids: Iterable[int]) -> list[int]:
    """Return what occurs more than once."""
    return [number for number, times in Counter(ids).items() if times > 1]


def _short_list(ids: Sequence[int]) -> str:
    if len(ids) <= 12:
        return ", ".join(map(str, ids))
    return f"{len(ids)} ids from {ids[0]} to {ids[-1]}"
