"""Where data sets are fetched from: objects below a prefix, or a folder that machines share."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from knet_core import DataError
from knet_platform.errors import StorageError
from knet_platform.files import disk_explained

THREADS = 32
"""Files fetched at a time: an object store answers each in tens of milliseconds."""
_READS = 4
"""Attempts to read a file to its end: boto3 repeats requests, but not what follows them."""
_CHUNK = 2**20
_ETAG = re.compile(r"[0-9a-f]{32}(?:-(\d+))?")
"""MD5 of the content, or of the MD5s of so many parts; encryption by KMS makes others."""


@dataclass(frozen=True, slots=True)
class Listed:
    """One file as its source lists it."""

    name: str
    """Below the data set's root."""
    size: int
    version: str
    """Changes with the content: the ETag of an object, the time of change of a file."""


class Source(Protocol):
    """A place that holds a data set."""

    def list(self) -> list[Listed]:
        """Return every file, sorted by name.

        Raises:
            DataError: There is none, or one whose name leads out of the set.
            StorageError: The place refuses or is out of reach.
        """

    def fetch(self, file: Listed, target: BinaryIO) -> str:
        """Write the content of a listed file, and return its SHA-256 in hex digits.

        Args:
            file: The file.
            target: Read and appended to. It may have what an earlier attempt began, and has it
                after an error.

        Raises:
            StorageError: It is not what was listed any more, or did not arrive whole.
        """


def open_source(address: str) -> Source:
    """Return the source that an address names; nothing is contacted.

    Raises:
        DataError: The address is of another kind.
        StorageError: It names no bucket.
    """
    if address.startswith("s3://"):
        return _Bucket(address)
    if address.startswith("file:///"):
        return _Folder(address)
    raise DataError(
        f"data.root: got '{address}', expected a folder, s3://bucket/prefix or file:///folder"
    )


class _Bucket:
    """The objects below a prefix."""

    def __init__(self, address: str) -> None:
        from knet_platform import s3  # loads boto3, which data on a disk are without

        self._s3 = s3
        self._address = address.rstrip("/")
        self._bucket, prefix = s3.split_uri(address)
        self._prefix = f"{prefix}/" if prefix else ""
        self._client = s3.open_client(THREADS)

    def list(self) -> list[Listed]:
        """See `Source`."""
        pages = self._client.get_paginator("list_objects_v2")
        with self._s3.explained(self._address, "list"):
            objects = [
                Listed(
                    item["Key"].removeprefix(self._prefix), item["Size"], item["ETag"].strip('"')
                )
                for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix)
                for item in page.get("Contents", ())
            ]
        # Consoles mark folders by empty objects.
        files = [item for item in objects if item.size or not item.name.endswith("/")]
        return _checked(self._address, (item for item in files if item.name))

    def fetch(self, file: Listed, target: BinaryIO) -> str:
        """See `Source`."""
        from botocore.exceptions import (
            FlexibleChecksumError,
            IncompleteReadError,
            ReadTimeoutError,
            ResponseStreamingError,
        )

        where = f"{self._address}/{file.name}"
        broken = (ResponseStreamingError, ReadTimeoutError, IncompleteReadError)
        damaged = (FlexibleChecksumError, _DamagedError)
        with self._s3.explained(where, "read"):
            for left in reversed(range(_READS)):
                try:
                    return self._read(where, file, target)
                except (*broken, *damaged) as error:
                    if isinstance(error, damaged):
                        target.truncate(0)
                    if not left:
                        raise
        raise AssertionError("the last attempt returns or raises")

    def _read(self, where: str, file: Listed, target: BinaryIO) -> str:
        key = {"Bucket": self._bucket, "Key": f"{self._prefix}{file.name}"}
        etag = _ETAG.fullmatch(file.version)
        parts = int(etag[1]) if etag and etag[1] else 0
        size = self._client.head_object(**key, PartNumber=1)["ContentLength"] if parts else None
        content, found = hashlib.sha256(), _ETags(size)
        # One byte at least is left to ask for.
        target.truncate(min(target.seek(0, os.SEEK_END), max(file.size - 1, 0)))
        target.seek(0)
        while chunk := target.read(_CHUNK):
            content.update(chunk)
            found.update(chunk)
        begun = target.tell()
        rest = {"Range": f"bytes={begun}-"} if begun else {}
        answer = self._client.get_object(**key, **rest, IfMatch=f'"{file.version}"')
        verifiable = etag is not None and not _encrypted(answer)
        if begun and not (verifiable and "ContentRange" in answer):
            answer["Body"].close()
            target.truncate(0)  # nothing would tell whether the rest fits to it
            return self._read(where, file, target)
        for chunk in answer["Body"].iter_chunks(_CHUNK):
            target.write(chunk)
            content.update(chunk)
            found.update(chunk)
        if target.tell() != file.size:
            raise _DamagedError(
                f"{where}: {target.tell()} bytes arrived, expected {file.size}; run again"
            )
        # Parts of different sizes make another number of them here: then the length must do.
        known = verifiable and found.parts == parts
        if (known and found.etag() != file.version) or (begun and not known):
            raise _DamagedError(
                f"{where}: the content that arrived is not that of its ETag {file.version}; run "
                f"again, and if it stays so, upload the object once more"
            )
        return content.hexdigest()


class _DamagedError(StorageError):
    """What arrived is not what was listed."""


def _encrypted(answer: dict[str, Any]) -> bool:
    """Tell whether the server encrypts so that an ETag is no MD5."""
    by_kms = str(answer.get("ServerSideEncryption", "")).startswith("aws:kms")
    return by_kms or "SSECustomerAlgorithm" in answer


class _ETags:
    """Computes the ETag of content that was uploaded whole, or in parts of one size in bytes."""

    def __init__(self, size: int | None) -> None:
        self._size = size
        self._ended: list[bytes] = []
        self._part = hashlib.md5(usedforsecurity=False)
        self._room = size

    def update(self, chunk: bytes) -> None:
        """Take the next bytes."""
        while self._room is not None and len(chunk) > self._room:
            self._part.update(chunk[: self._room])
            chunk = chunk[self._room :]
            self._ended.append(self._part.digest())
            self._part, self._room = hashlib.md5(usedforsecurity=False), self._size
        self._part.update(chunk)
        if self._room is not None:
            self._room -= len(chunk)

    @property
    def parts(self) -> int:
        """Return the number of parts so far; 0 where the content was uploaded whole."""
        return 0 if self._size is None else len(self._ended) + 1

    def etag(self) -> str:
        """Return the ETag."""
        if self._size is None:
            return self._part.hexdigest()
        digests = b"".join([*self._ended, self._part.digest()])
        return f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{self.parts}"


class _Folder:
    """The files below a folder."""

    def __init__(self, address: str) -> None:
        self._address = address.rstrip("/")
        self._root = Path(os.path.realpath(address.removeprefix("file://")))

    def list(self) -> list[Listed]:
        """See `Source`."""
        if not self._root.is_dir():
            raise DataError(f"{self._address}: no such folder; expected the data set's")
        with disk_explained(self._address, "list", "data.root"):
            return _checked(self._address, self._walk(self._root))

    def fetch(self, file: Listed, target: BinaryIO) -> str:
        """See `Source`; always from the start: nothing would tell whether a rest fits."""
        content = hashlib.sha256()
        target.seek(0)
        target.truncate()
        with (
            disk_explained(f"{self._address}/{file.name}", "read", "data.root"),
            (self._root / file.name).open("rb") as source,
        ):
            while chunk := source.read(_CHUNK):
                target.write(chunk)
                content.update(chunk)
            if target.tell() != file.size or _version(os.fstat(source.fileno())) != file.version:
                raise StorageError(
                    f"{self._address}/{file.name}: changed while it was fetched; run again"
                )
        return content.hexdigest()

    def _walk(self, folder: Path) -> Iterator[Listed]:
        with os.scandir(folder) as entries:
            for entry in entries:
                path = Path(entry.path)
                name = path.relative_to(self._root).as_posix()
                if entry.is_dir(follow_symlinks=False):
                    yield from self._walk(path)
                elif entry.is_file() and path.resolve().is_relative_to(self._root):
                    stat = path.stat()
                    yield Listed(name, stat.st_size, _version(stat))
                else:
                    raise DataError(
                        f"{self._address}/{name}: neither a file nor a folder of the set, but a "
                        f"link to a folder, out of it or to nothing; expected a copy in its place"
                    )


def _version(stat: os.stat_result) -> str:
    return str(stat.st_mtime_ns)


def _checked(address: str, found: Iterable[Listed]) -> list[Listed]:
    """Return what was found, sorted; every name is one of a file below a folder.

    Raises:
        DataError: A name is not, or there are none.
    """
    files = sorted(found, key=lambda file: file.name)
    if not files:
        raise DataError(f"{address}: nothing there; expected the data set's folders and files")
    folders = {folder for file in files for folder in folders_of(file.name)}
    for file in files:
        if {"", ".", ".."} & set(file.name.split("/")) or "\0" in file.name:
            raise DataError(
                f"{address}: {file.name[:200]!r} is no name of a file below a folder; rename it, "
                f"or name a prefix without it"
            )
        if file.name in folders:
            raise DataError(
                f"{address}: {file.name[:200]!r} is both a file and a folder, which no disk can "
                f"hold; rename one of them"
            )
    return files


def folders_of(name: str) -> list[str]:
    """Return the folders that a file lies in, outermost first; the root itself is none."""
    parts = name.split("/")[:-1]
    return ["/".join(parts[: depth + 1]) for depth in range(len(parts))]
