"""Files of a store by their names below its root, whatever lies underneath.

Names use slashes. A file appears whole or not at all, and so does a folder that is put. Local
folders are served here, buckets in `s3_files`.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from knet_core import DiskFullError
from knet_platform.errors import StorageError

_UNFINISHED = ".tmp"
"""Ends the name of what is being written; what a killed process left of it is never read."""


class Files(Protocol):
    """What a store needs of the place it lies in.

    Every method raises `StorageError` where the place refuses or is out of reach, and those that
    write `DiskFullError` where it is full.
    """

    uri: str
    """Address of the root, without a slash at its end."""

    def read(self, name: str) -> bytes:
        """Return a file's content; a missing one is an error."""

    def write(self, name: str, content: bytes) -> None:
        """Write or replace a file."""

    def delete(self, name: str) -> None:
        """Delete a file if it is there."""

    def list(self, folder: str) -> list[str]:
        """Return the names of the files and folders in a folder, sorted; none in a missing one."""

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the bytes of every file below a folder, by its name from there."""

    def put_folder(self, source: Path, folder: str, last: str) -> None:
        """Copy a local folder of files; whoever sees the file `last` sees all, and no others."""

    def delete_folder(self, folder: str, first: str) -> None:
        """Delete a folder; whoever does not see the file `first` any more may miss others."""

    def local_folder(self, folder: str) -> AbstractContextManager[Path]:
        """Give a folder of files as one of this machine, to be read."""


def open_files(uri: str) -> Files:
    """Open a place; nothing is created.

    Args:
        uri: A local path or s3://bucket/prefix.

    Raises:
        StorageError: The address is of another kind.
    """
    if uri.startswith("s3://"):
        from knet_platform.s3_files import S3Files  # loads boto3, which a local store is without

        return S3Files(uri)
    if "://" in uri:
        raise StorageError(
            f"KNET_STORAGE: got '{uri}', expected a local path or s3://bucket/prefix"
        )
    return LocalFiles(uri)


class LocalFiles:
    """A folder of this machine, or one that it shares with others."""

    def __init__(self, path: str) -> None:
        self.uri = path.rstrip("/")
        self._root = Path(path).absolute()

    def read(self, name: str) -> bytes:
        """See `Files`."""
        with self._explained(name, "read"):
            return (self._root / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        """See `Files`."""
        target = self._root / name
        with self._explained(name, "write"):
            target.parent.mkdir(parents=True, exist_ok=True)
            written = _unfinished(target)
            try:
                with written.open("wb") as stream:
                    stream.write(content)
                    stream.flush()
                    os.fsync(stream.fileno())
                written.replace(target)
            except OSError:
                written.unlink(missing_ok=True)
                raise

    def delete(self, name: str) -> None:
        """See `Files`."""
        with self._explained(name, "delete"):
            (self._root / name).unlink(missing_ok=True)

    def list(self, folder: str) -> list[str]:
        """See `Files`."""
        with self._explained(folder, "read"), suppress(FileNotFoundError):
            names = sorted(path.name for path in (self._root / folder).iterdir())
            return [name for name in names if not _is_unfinished(name)]
        return []

    def sizes(self, folder: str) -> dict[str, int]:
        """See `Files`."""
        root = self._root / folder
        found = {}
        with self._explained(folder, "read"):
            for path in root.rglob("*"):
                with suppress(FileNotFoundError):  # deleted meanwhile
                    if path.is_file():
                        found[path.relative_to(root).as_posix()] = path.stat().st_size
        return found

    def put_folder(self, source: Path, folder: str, last: str) -> None:
        """See `Files`; a rename makes all of it visible at once."""
        target = self._root / folder
        unfinished, replaced = _unfinished(target), _unfinished(target)
        with self._explained(folder, "write"):
            try:
                unfinished.mkdir(parents=True)
                for path in sorted(source.iterdir(), key=lambda path: path.name == last):
                    with path.open("rb") as origin, (unfinished / path.name).open("wb") as copy:
                        shutil.copyfileobj(origin, copy, 2**20)
                        copy.flush()
                        os.fsync(copy.fileno())
                _sync_folder(unfinished)
                with suppress(FileNotFoundError):
                    target.replace(replaced)
                unfinished.replace(target)
                _sync_folder(target.parent)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
                shutil.rmtree(replaced, ignore_errors=True)

    def delete_folder(self, folder: str, first: str) -> None:
        """See `Files`."""
        self.delete(f"{folder}/{first}")
        with self._explained(folder, "delete"), suppress(FileNotFoundError):
            shutil.rmtree(self._root / folder)

    @contextmanager
    def local_folder(self, folder: str) -> Iterator[Path]:
        """See `Files`; it is the folder itself."""
        yield self._root / folder

    def _explained(self, name: str, verb: str) -> AbstractContextManager[None]:
        return disk_explained(f"{self.uri}/{name}", verb, "KNET_STORAGE")


@contextmanager
def disk_explained(where: str, verb: str, setting: str) -> Iterator[None]:
    """Turn what the system raises about a local path into one line that names what to check.

    Args:
        where: The path.
        verb: What failed.
        setting: What led there.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(f"{where}: no space left; free some and run again") from error
        raise StorageError(
            f"{where}: cannot {verb} ({error.strerror or error}); "
            f"check {setting} and its permissions"
        ) from error


def _unfinished(target: Path) -> Path:
    return target.with_name(f".{target.name}.{uuid4().hex}{_UNFINISHED}")


def _is_unfinished(name: str) -> bool:
    return name.startswith(".") and name.endswith(_UNFINISHED)


def _sync_folder(folder: Path) -> None:
    """Make names survive a power cut, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
