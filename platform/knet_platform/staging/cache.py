"""The folder of fetched data sets on a machine's own disk: every content once, least used out.

    objects/ab/cdef...     each content by its SHA-256, once
    sets/<id>/files/       one data set as its source listed it: hard links to objects
    sets/<id>/index        what of it is here, a line of JSON each: name, size, version, SHA-256
    sets/<id>/address      where it comes from; its time of change is that of the last use
    sets/<id>/complete     is there when all of it is
    sets/<id>/unfinished/  what is on its way, or broke off
    locks/                 of sets in use, of addresses being fetched, and of making room

Locks are the kernel's (`flock`): whoever dies lets go of them.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from stat import S_IWUSR
from typing import BinaryIO

from knet_core import DiskFullError
from knet_platform.files import disk_explained
from knet_platform.home import cache_folder, cache_gb
from knet_platform.staging.sources import Listed

Advance = Callable[[int, int], None]
"""Takes (done, total) in bytes."""

MOST_OF_DISK = 0.9
"""Share of the disk's free space that sets may take: checkpoints and logs need some, too."""
_MOST_LINKS = 60_000
"""Of one content, before another copy is begun: ext4 allows 65,000."""
_FETCH = ".fetch"
_DELETED = "deleted"
_POLL_SECONDS = 0.2
_STATUS_BYTES = 64


@dataclass(frozen=True, slots=True)
class Kept:
    """One file that was fetched and verified."""

    name: str
    size: int
    version: str
    """As its source listed it."""
    digest: str
    """SHA-256 in hex digits."""
    mtime_ns: int
    """Time of change on this disk: whoever writes into the file changes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SetState:
    """One data set in the cache, for people."""

    address: str
    bytes: int
    """Of its files, some of which other sets may share."""
    complete: bool


class Cache:
    """The cache in a folder; nothing is created before something is fetched.

    Args:
        folder: On a disk that has hard links.
        gb: What data sets may take, in GB; None: `MOST_OF_DISK`.
    """

    def __init__(self, folder: Path, gb: float | None) -> None:
        self.folder = folder
        self._gb = gb

    @classmethod
    def in_use(cls) -> "Cache":
        """Return the cache that the environment names.

        Raises:
            UsageError: Its size is none.
        """
        return cls(cache_folder(), cache_gb())

    def sets(self, address: str | None = None) -> list["CachedSet"]:
        """Return the sets that are here, or those of one address; last used first."""
        found = []
        for folder in self._folders("sets"):
            cached = CachedSet(self, folder.name)
            with suppress(FileNotFoundError):  # deleted meanwhile
                if address in (None, cached.address()):
                    found.append((cached.last_used(), cached))
        return [cached for _, cached in sorted(found, key=lambda pair: -pair[0])]

    def set(self, address: str, listing: Iterable[Listed]) -> "CachedSet":
        """Return the set of an address as it is listed now."""
        files = [[file.name, file.size, file.version] for file in listing]
        return CachedSet(self, _short_digest(json.dumps([address, files])))

    @contextmanager
    def fetching(self, address: str, advance: Advance) -> Iterator[Advance]:
        """Be the only process of this machine that fetches an address; waits for that.

        Args:
            address: What will be fetched.
            advance: Told meanwhile how far whoever fetches has come.

        Yields:
            What to tell how far this one has come.
        """
        path = self.lock(f"{_short_digest(address)}{_FETCH}")
        with path.open("r+b", buffering=0) as file:
            while not _lock(file, fcntl.LOCK_EX):
                if status := _status(file):
                    advance(*status)
                time.sleep(_POLL_SECONDS)

            def tell(done: int, total: int) -> None:
                os.pwrite(file.fileno(), f"{done} {total}".ljust(_STATUS_BYTES).encode(), 0)
                advance(done, total)

            file.truncate(0)
            yield tell

    def pending(self) -> int:
        """Return the bytes that other processes are about to add."""
        left = 0
        for path in self._folders("locks"):
            if path.suffix == _FETCH:
                with path.open("rb", buffering=0) as file:
                    if not _lock(file, fcntl.LOCK_SH) and (status := _status(file)):
                        left += status[1] - status[0]
        return left

    @contextmanager
    def room_for(self, size: int) -> Iterator[None]:
        """Delete what was not used for longest and is not in use, until there is room.

        Raises:
            DiskFullError: What is in use leaves too little.
        """
        with self.lock("room").open("r+b") as file, self.explained("make room"):
            fcntl.flock(file, fcntl.LOCK_EX)
            shutil.rmtree(self.folder / _DELETED, ignore_errors=True)  # by whoever was killed
            wanted = size + self.pending()
            while (used := self._sweep()) + wanted > (limit := self.limit(used)):
                if not any(cached.evict() for cached in reversed(self.sets())):
                    raise DiskFullError(
                        f"{self.folder}: {_gb(size)} GB are to be fetched, but {_gb(used)} of "
                        f"{_gb(limit)} GB are in use; raise KNET_CACHE_GB, or point KNET_CACHE "
                        f"at a larger disk"
                    )
            yield

    def used(self) -> int:
        """Return the bytes that all sets take."""
        total = 0
        for path in self._objects():
            with suppress(FileNotFoundError):  # deleted meanwhile
                total += path.stat().st_size
        return total

    def limit(self, used: int) -> int:
        """Return the bytes that they may take."""
        existing = next(path for path in (self.folder, *self.folder.parents) if path.exists())
        disk = int(MOST_OF_DISK * (shutil.disk_usage(existing).free + used))
        return disk if self._gb is None else min(disk, int(self._gb * 1e9))

    def states(self) -> list[SetState]:
        """Return what is here, last used first."""
        found = []
        for cached in self.sets():
            with suppress(FileNotFoundError):  # deleted meanwhile
                state = SetState(
                    address=cached.address(),
                    bytes=sum(file.size for file in cached.index().values()),
                    complete=cached.is_complete(),
                )
                found.append(state)
        return found

    def object(self, digest: str) -> Path:
        """Return where a content is, or would be."""
        return self.folder / "objects" / digest[:2] / digest[2:]

    def lock(self, name: str) -> Path:
        """Return the file of a lock; it is never deleted, which two could not agree upon."""
        path = self.folder / "locks" / name
        with self.explained("write"):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.parent.mkdir(exist_ok=True)
            path.touch()
        return path

    def explained(self, verb: str) -> AbstractContextManager[None]:
        """Name this cache in errors of the disk."""
        return disk_explained(str(self.folder), verb, "KNET_CACHE")

    def _folders(self, name: str) -> list[Path]:
        with suppress(FileNotFoundError, NotADirectoryError):
            return sorted((self.folder / name).iterdir())
        return []

    def _objects(self) -> Iterator[Path]:
        for folder in self._folders("objects"):
            yield from folder.iterdir()

    def _sweep(self) -> int:
        """Delete contents that no set has, and return the bytes of the others.

        One that is being added has two links before it is here.
        """
        used = 0
        for path in self._objects():
            stat = path.stat()
            if stat.st_nlink > 1:
                used += stat.st_size
            else:
                path.unlink()
        return used


class CachedSet:
    """One listing of one address."""

    def __init__(self, cache: Cache, key: str) -> None:
        self._cache = cache
        self._key = key
        self._folder = cache.folder / "sets" / key
        self.files = self._folder / "files"

    def address(self) -> str:
        """Return where it comes from."""
        return (self._folder / "address").read_text()

    def last_used(self) -> float:
        """Return when, in Unix seconds."""
        return (self._folder / "address").stat().st_mtime

    def is_complete(self) -> bool:
        """Tell whether all files were fetched."""
        return (self._folder / "complete").exists()

    def set_complete(self) -> None:
        """Note that all files were fetched."""
        (self._folder / "complete").touch()

    @contextmanager
    def used(self, address: str) -> Iterator[None]:
        """Keep the set from being deleted while the block runs; makes it where it is not."""
        with self._cache.lock(f"{self._key}.use").open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            with self._cache.explained("write"):
                self.files.mkdir(parents=True, exist_ok=True)
                if not (name := self._folder / "address").exists():
                    new = self._folder / f"address.{os.getpid()}"
                    new.write_text(address)
                    new.replace(name)
                os.utime(name)
            yield

    def evict(self) -> bool:
        """Delete the set, unless it is in use; its contents go with the last set that has them."""
        with self._cache.lock(f"{self._key}.use").open("r+b") as file:
            if not _lock(file, fcntl.LOCK_EX):
                return False
            deleted = self._cache.folder / _DELETED
            deleted.mkdir(exist_ok=True)
            self._folder.rename(deleted / self._key)  # at once, whatever happens next
            shutil.rmtree(deleted)
            return True

    def index(self) -> dict[str, Kept]:
        """Return the files that were fetched; whoever was killed may have left half a line."""
        found = {}
        with suppress(FileNotFoundError, ValueError, TypeError), self._index.open() as lines:
            for line in lines:
                kept = Kept(*json.loads(line))
                found[kept.name] = kept
        return found

    @contextmanager
    def indexing(self, known: Iterable[Kept]) -> Iterator[Callable[[Kept], None]]:
        """Write the index anew, and yield what adds to it."""
        unfinished = self._folder / "index.new"
        with unfinished.open("w", buffering=1) as lines:

            def add(kept: Kept) -> None:
                lines.write(f"{json.dumps(list(asdict(kept).values()))}\n")

            for kept in known:
                add(kept)
            unfinished.replace(self._index)
            yield add

    def is_sound(self, kept: Kept, *, verify: bool) -> bool:
        """Tell whether a file is here as it was fetched.

        Args:
            kept: The file.
            verify: Compare its content; else its size and time of change must do.
        """
        path = self.files / kept.name
        with suppress(OSError):
            stat = path.stat()
            same = (stat.st_size, stat.st_mtime_ns) == (kept.size, kept.mtime_ns)
            return same and not (verify and _file_digest(path) != kept.digest)
        return False

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Yield the folder of what is on its way; what breaks off stays in it for next time."""
        folder = self._folder / "unfinished"
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            if not path.stat().st_mode & S_IWUSR:  # it had arrived, and may be an object
                path.unlink()
        try:
            yield folder
        finally:
            with suppress(OSError):
                folder.rmdir()

    def settle(self, arrived: Path, file: Listed, digest: str) -> Kept:
        """Put a file that has arrived in its place, as the one file that has its content."""
        arrived.chmod(0o444)
        content, link = self._cache.object(digest), arrived.with_name(f"{arrived.name}.link")
        content.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with suppress(FileExistsError):
                os.link(arrived, content)
                break
            with suppress(FileNotFoundError):  # deleted since
                usable = content.stat().st_nlink < _MOST_LINKS and _file_digest(content) == digest
                os.link(content if usable else arrived, link)
                link.replace(arrived if usable else content)
                break
        return self._place(arrived, file, digest)

    def borrow(self, other: "CachedSet", kept: Kept, link: Path) -> Kept | None:
        """Take a file from another set; None where that has it no more as it was."""
        with suppress(OSError):
            os.link(other.files / kept.name, link)
            if other.is_sound(kept, verify=False):
                return self._place(link, Listed(kept.name, kept.size, kept.version), kept.digest)
            link.unlink()
        return None

    def _place(self, arrived: Path, file: Listed, digest: str) -> Kept:
        place = self.files / file.name
        place.parent.mkdir(parents=True, exist_ok=True)
        arrived.replace(place)
        arrived.unlink(missing_ok=True)  # a rename onto the same content does nothing
        mtime_ns = place.stat().st_mtime_ns
        return Kept(file.name, file.size, file.version, digest, mtime_ns)

    @property
    def _index(self) -> Path:
        return self._folder / "index"


def _lock(file: BinaryIO, kind: int) -> bool:
    """Take a lock if it is free."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _status(file: BinaryIO) -> tuple[int, int] | None:
    """Return what whoever fetches has said: bytes done and in all."""
    words = os.pread(file.fileno(), _STATUS_BYTES, 0).split()
    return (int(words[0]), int(words[1])) if len(words) == 2 else None


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g}"
