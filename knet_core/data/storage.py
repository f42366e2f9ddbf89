"""The one place where files of a data set are listed and opened; nothing outside it is.

What a set's own files name must lie in the set: below its root or in a folder that the recipe
names. The recipe is trusted, so its folders may be links to other disks; a link below them that
leads out is not followed. A root that is an address (s3://, file://) is read from the folder that
whoever fetched it names for this process.
"""

import functools
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from knet_core.errors import DataError

_served: dict[str, Path] = {}
"""Folders of this machine by the address whose files they hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The names in one folder."""

    names: frozenset[str]
    """What may be read."""
    outside: frozenset[str]
    """Links, or everything where the folder is reached by one, that lead out of the set."""


def is_address(root: str) -> bool:
    """Tell whether a root names a place from which files are fetched, and no folder."""
    return "://" in root


@contextmanager
def served_from(address: str, folder: Path) -> Iterator[None]:
    """Read the data set whose root is `address` from a folder, in this process, in the block."""
    before = _served.get(address)
    _served[address] = folder
    try:
        yield
    finally:
        if before is None:
            del _served[address]
        else:
            _served[address] = before


def served_folder(address: str) -> Path:
    """Return the folder that holds the files of an address.

    Raises:
        DataError: Nobody has fetched them.
    """
    if address not in _served:
        raise DataError(
            f"data.root: {address} is an address whose files are not here; expected a folder: "
            f"use a knet command, which fetches s3:// and file://, or copy the data set to a disk"
        )
    return _served[address]


class SetFiles(Protocol):
    """A data set's files by their names below its root, as far as its fingerprint needs them."""

    def is_dir(self, name: str) -> bool:
        """Tell whether there is such a folder."""

    def is_file(self, name: str) -> bool:
        """Tell whether there is such a file."""

    def sizes(self, folder: str, pattern: str) -> Mapping[str, int]:
        """Return the bytes of the files below a folder whose path from there matches."""

    def read(self, name: str) -> bytes:
        """Return a file's content."""

    def digest(self, name: str) -> bytes:
        """Return the SHA-256 of a file's content."""

    def tails(self, names: Iterable[str], count: int) -> Iterable[bytes]:
        """Return the last `count` bytes of each file, or all that it has."""


class FolderFiles:
    """Files below a folder; see `SetFiles`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def is_dir(self, name: str) -> bool:
        """See `SetFiles`."""
        return (self._root / name).is_dir()

    def is_file(self, name: str) -> bool:
        """See `SetFiles`."""
        return (self._root / name).is_file()

    def sizes(self, folder: str, pattern: str) -> Mapping[str, int]:
        """See `SetFiles`."""
        base = self._root / folder
        return {
            path.relative_to(base).as_posix(): path.stat().st_size for path in base.glob(pattern)
        }

    def read(self, name: str) -> bytes:
        """See `SetFiles`."""
        return (self._root / name).read_bytes()

    def digest(self, name: str) -> bytes:
        """See `SetFiles`."""
        path = self._root / name
        stat = path.stat()
        return _file_digest(path, stat.st_size, stat.st_mtime_ns)

    def tails(self, names: Iterable[str], count: int) -> Iterator[bytes]:
        """See `SetFiles`."""
        for name in names:
            with (self._root / name).open("rb") as file:
                file.seek(-min(count, os.fstat(file.fileno()).st_size), os.SEEK_END)
                yield file.read()


@functools.lru_cache(maxsize=16)
def _file_digest(path: Path, size: int, mtime_ns: int) -> bytes:
    """Hash a file once per content; a sweep asks for the same file in every trial."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


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
