"""The one place where files of a data set are listed and opened; nothing outside it is.

What a set's own files name must lie in the set: below its root or in a folder that the recipe
names. The recipe is trusted, so its folders may be links to other disks; a link below them that
leads out is not followed. Roots in an object store would be served here.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from knet_core.errors import DataError

_REMOTE = "://"


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The names in one folder."""

    names: frozenset[str]
    """What may be read."""
    outside: frozenset[str]
    """Links, or everything where the folder is reached by one, that lead out of the set."""


def refuse_remote(root: str) -> None:
    """Refuse a root that is no folder of this machine.

    Raises:
        DataError: The root is a URL.
    """
    if _REMOTE in root:
        raise DataError(
            f"data.root: {root} is in an object store; expected a folder, since staging is not "
            f"built yet: copy the data set to a disk and set data.root to it"
        )


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading.

    Raises:
        OSError: It cannot be opened.
    """
    return path.open("rb")


class Folders:
    """Lists folders of one data set, each once.

    Args:
        trusted: The set's root and the folders that the recipe names.
    """

    def __init__(self, trusted: Iterable[Path]) -> None:
        self._allowed = tuple(
            {f"{os.path.realpath(folder).rstrip(os.sep)}{os.sep}" for folder in trusted}
        )
        self._listings: dict[str, Listing] = {}

    def list(self, folder: str | Path) -> Listing:
        """Return the names in a folder; none where it cannot be read."""
        key = str(folder)
        if key not in self._listings:
            self._listings[key] = self._list(key)
        return self._listings[key]

    def _list(self, folder: str) -> Listing:
        try:
            place = os.path.realpath(folder)
            with os.scandir(place) as entries:
                found = [
                    (entry.name, entry.path if entry.is_symlink() else "") for entry in entries
                ]
        except (OSError, ValueError):  # ValueError: a null byte or half a surrogate in the name
            return Listing(names=frozenset(), outside=frozenset())
        if not self._holds(f"{place}{os.sep}"):
            return Listing(names=frozenset(), outside=frozenset(name for name, _ in found))
        outside = frozenset(
            name for name, link in found if link and not self._holds(os.path.realpath(link))
        )
        return Listing(names=frozenset(name for name, _ in found) - outside, outside=outside)

    def _holds(self, place: str) -> bool:
        return place.startswith(self._allowed)
