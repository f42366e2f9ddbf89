"""Brings data sets from their sources into the cache, and lets the core read them there."""

import fnmatch
import functools
import hashlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from knet_core import DataConfig, DataError, data_fingerprint, is_address, served_from
from knet_platform.staging.cache import Advance, Cache, CachedSet, Kept
from knet_platform.staging.sources import THREADS, Listed, Source, folders_of, open_source

TELL_SECONDS = 5.0
"""Between two lines about a data set that is being fetched."""


@contextmanager
def staged(
    data: DataConfig,
    *,
    cache: Cache | None = None,
    expected: str | None = None,
    verify: bool = False,
) -> Iterator[None]:
    """Let a data set be read while the block runs; one behind an address is fetched before.

    The first process of a machine fetches it and says on stderr how far it is; the others wait,
    say so as well, and share it. It is not deleted while the block runs.

    Args:
        data: The data set.
        cache: Where it is kept; unset: where the environment says.
        expected: Its fingerprint when it was planned. If it is here already, its source is not
            asked.
        verify: Compare the content of all that is here already with its digest.

    Raises:
        DataError: There is nothing at the address, a name in it leads out of the set, or it is
            not as expected.
        StorageError: The source refuses or is out of reach, or the cache cannot be written.
        DiskFullError: There is no room.
    """
    if not _is_remote(data):
        yield
        return
    cache = cache or Cache.in_use()
    with ExitStack() as held:
        cached = _as_expected(data, cache, expected, held)
        if cached is None:
            with cache.fetching(data.root, _Teller(data.root)) as tell:
                cached = _as_expected(data, cache, expected, held)
                if cached is None:
                    cached = _fetch_all(data.root, cache, tell, held, verify=verify)
                    _require(data, cached, expected)
        held.enter_context(served_from(data.root, cached.files))
        yield


def fingerprint(data: DataConfig) -> str:
    """Return `data_fingerprint`, wherever the data set is; the same for the same content.

    Behind an address it is taken once in a process. Its annotations are fetched for that.

    Raises:
        DataError: A file is missing, or see `staged`.
        StorageError: See `staged`.
        DiskFullError: See `staged`.
    """
    return _outline(_description(data)).fingerprint if _is_remote(data) else data_fingerprint(data)


def num_train_images(data: DataConfig) -> int:
    """Return how many files the folder of training images has, behind an address.

    Raises:
        DataError: See `fingerprint`.
        StorageError: See `fingerprint`.
        DiskFullError: See `fingerprint`.
    """
    return _outline(_description(data)).num_train_images


@dataclass(frozen=True, slots=True)
class _Outline:
    """What a plan needs to know of a data set."""

    fingerprint: str
    num_train_images: int


def _is_remote(data: DataConfig) -> bool:
    return data.format != "shapes" and is_address(data.root)


def _description(data: DataConfig) -> DataConfig:
    """Return what says which data set it is; arms that crop it differently share its outline."""
    return DataConfig(
        format=data.format, root=data.root, train=data.train, val=data.val, classes=data.classes
    )


@functools.lru_cache(maxsize=64)
def _outline(data: DataConfig) -> _Outline:
    cache = Cache.in_use()
    with ExitStack() as held, cache.fetching(data.root, _Teller(data.root)) as tell:
        source = open_source(data.root)
        listing = source.list()
        cached = cache.set(data.root, listing)
        held.enter_context(cached.used(data.root))
        files = _ListedFiles(source, listing, cache, cached, tell)
        identity = data_fingerprint(data, files)
        folder = next(filter(files.is_dir, data.train.images))
        return _Outline(identity, len(files.below(folder)))


def _as_expected(
    data: DataConfig, cache: Cache, expected: str | None, held: ExitStack
) -> CachedSet | None:
    """Return a set that is here whole and has the expected fingerprint; `held` keeps it."""
    for cached in cache.sets(data.root) if expected else ():
        with ExitStack() as stack:
            stack.enter_context(cached.used(data.root))
            sound = (cached.is_sound(kept, verify=False) for kept in cached.index().values())
            if cached.is_complete() and all(sound) and _has(data, cached, expected):
                held.enter_context(stack.pop_all())
                return cached
    return None


def _has(data: DataConfig, cached: CachedSet, expected: str | None) -> bool:
    with served_from(data.root, cached.files), suppress(DataError):
        return data_fingerprint(data) == expected
    return False


def _require(data: DataConfig, cached: CachedSet, expected: str | None) -> None:
    if expected and not _has(data, cached, expected):
        raise DataError(
            f"data.root: {data.root} is not what it was when the run was planned (fingerprint "
            f"{expected[:12]}); run the same command again, which plans with what is there"
        )


def _fetch_all(
    address: str, cache: Cache, tell: Advance, held: ExitStack, *, verify: bool
) -> CachedSet:
    source = open_source(address)
    listing = source.list()
    cached = cache.set(address, listing)
    held.enter_context(cached.used(address))
    with cache.explained("write"):
        _fetch(source, listing, cache, cached, tell, verify=verify)
        cached.set_complete()
    return cached


def _fetch(
    source: Source,
    wanted: Sequence[Listed],
    cache: Cache,
    cached: CachedSet,
    tell: Advance,
    *,
    verify: bool = False,
) -> Mapping[str, Kept]:
    """Fetch what of the wanted files is not here as it was; return the index of all that is."""
    index = cached.index()
    missing = {
        file.name: file
        for file in sorted(wanted, key=lambda file: -file.size)  # no large one begins last
        if file.name not in index or not cached.is_sound(index[file.name], verify=verify)
    }
    if not missing:
        return index
    known = [kept for kept in index.values() if kept.name not in missing]
    with cached.indexing(known) as add, cached.scratch() as scratch:
        for kept in _borrowed(missing, cache, cached, scratch):
            add(kept)
            del missing[kept.name]
        places = {
            scratch / hashlib.sha256(name.encode()).hexdigest(): file
            for name, file in missing.items()
        }
        begun = sum(path.stat().st_size for path in scratch.iterdir() if path in places)
        total, done = sum(file.size for file in missing.values()), 0
        with cache.room_for(total - begun):
            tell(0, total)

        def fetch(place: Path, file: Listed) -> Kept:
            with place.open("a+b") as target:
                digest = source.fetch(file, target)
            return cached.settle(place, file, digest)

        with ThreadPoolExecutor(THREADS, "fetch") as pool:
            left = {pool.submit(fetch, *item) for item in places.items()}
            try:
                for future in as_completed(set(left)):
                    kept = future.result()
                    left.remove(future)
                    add(kept)
                    done += kept.size
                    tell(done, total)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                for future in left:  # what has arrived meanwhile need not come again
                    if not future.cancelled() and not future.exception():
                        add(future.result())
                raise
    return cached.index()


def _borrowed(
    missing: Mapping[str, Listed], cache: Cache, cached: CachedSet, scratch: Path
) -> Iterator[Kept]:
    """Take from what was fetched of the address before what has not changed since."""
    for other in cache.sets(cached.address()):
        if other.files == cached.files:
            continue
        for kept in other.index().values():
            file = missing.get(kept.name)
            same = file and (file.size, file.version) == (kept.size, kept.version)
            if same and (taken := cached.borrow(other, kept, scratch / "link")):
                yield taken


class _ListedFiles:
    """A listing as the core's fingerprint reads it: contents are fetched, the rest is known."""

    def __init__(
        self,
        source: Source,
        listing: Iterable[Listed],
        cache: Cache,
        cached: CachedSet,
        tell: Advance,
    ) -> None:
        self._source = source
        self._listed = {file.name: file for file in listing}
        self._folders = {folder for name in self._listed for folder in folders_of(name)}
        self._cache = cache
        self._cached = cached
        self._tell = tell

    def is_dir(self, name: str) -> bool:
        """See `SetFiles`."""
        plain = _plain(name)
        return plain == "." or plain in self._folders

    def is_file(self, name: str) -> bool:
        """See `SetFiles`."""
        return _plain(name) in self._listed

    def below(self, folder: str) -> dict[str, Listed]:
        """Return the files in a folder and its folders, by their path from there."""
        start = "" if _plain(folder) == "." else f"{_plain(folder)}/"
        return {
            name.removeprefix(start): file
            for name, file in self._listed.items()
            if name.startswith(start)
        }

    def sizes(self, folder: str, pattern: str) -> Mapping[str, int]:
        """See `SetFiles`."""
        return {
            name: file.size for name, file in self.below(folder).items() if _matches(name, pattern)
        }

    def read(self, name: str) -> bytes:
        """See `SetFiles`."""
        self._fetched([name])
        return (self._cached.files / name).read_bytes()

    def digest(self, name: str) -> bytes:
        """See `SetFiles`."""
        return bytes.fromhex(self._fetched([name])[_plain(name)].digest)

    def tails(self, names: Iterable[str], count: int) -> Iterator[bytes]:
        """See `SetFiles`."""
        names = list(names)
        self._fetched(names)
        for name in names:
            with (self._cached.files / name).open("rb") as file:
                file.seek(-min(count, os.fstat(file.fileno()).st_size), os.SEEK_END)
                yield file.read()

    def _fetched(self, names: Iterable[str]) -> Mapping[str, Kept]:
        wanted = [self._listed[_plain(name)] for name in names]
        with self._cache.explained("write"):
            return _fetch(self._source, wanted, self._cache, self._cached, self._tell)


def _plain(name: str) -> str:
    return PurePosixPath(name).as_posix()


def _matches(name: str, pattern: str) -> bool:
    """Tell whether a path matches as `Path.glob` has it: part by part."""
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


class _Teller:
    """Says on stderr now and then how far a data set is."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last >= TELL_SECONDS:
            self._last = now
            print(
                f"data: {self._address}: {done / 1e9:.2f} of {total / 1e9:.2f} GB fetched",
                file=sys.stderr,
                flush=True,
            )
