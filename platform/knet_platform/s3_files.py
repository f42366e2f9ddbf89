"""Files of a store in a bucket."""

import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from boto3.s3.transfer import TransferConfig
from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError

from knet_platform.errors import StorageError
from knet_platform.s3 import explained, open_client, split_uri

_TRANSFER = TransferConfig(multipart_threshold=16 * 2**20, multipart_chunksize=16 * 2**20)
"""Larger files go in parts, ten at a time: a lost connection costs one part."""
_READS = 4
"""Attempts to read an answer to its end: boto3 repeats requests, but not what follows them."""
_AT_ONCE = 1000
"""Most objects that S3 lists or deletes in one request."""


class S3Files:
    """The objects below a prefix; see `knet_platform.files.Files`.

    Each object is whole or not there by S3's nature. Of a folder the last file says so.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self._bucket, self._prefix = split_uri(uri)
        self._client = open_client()

    def read(self, name: str) -> bytes:
        """See `Files`."""
        with self._explained(name, "read"):
            for _ in range(_READS - 1):
                with suppress(ResponseStreamingError, ReadTimeoutError, IncompleteReadError):
                    return self._read(name)
            return self._read(name)

    def write(self, name: str, content: bytes) -> None:
        """See `Files`."""
        with self._explained(name, "write"):
            self._client.put_object(Bucket=self._bucket, Key=self._key(name), Body=content)

    def delete(self, name: str) -> None:
        """See `Files`."""
        with self._explained(name, "delete"):
            self._client.delete_object(Bucket=self._bucket, Key=self._key(name))

    def list(self, folder: str) -> list[str]:
        """See `Files`."""
        prefix = self._folder_key(folder)
        names = []
        with self._explained(folder, "read"):
            for page in self._pages(prefix, Delimiter="/"):
                names += [item["Key"] for item in page.get("Contents", ())]
                names += [item["Prefix"].rstrip("/") for item in page.get("CommonPrefixes", ())]
        return sorted(name.removeprefix(prefix) for name in names if name != prefix)

    def sizes(self, folder: str) -> dict[str, int]:
        """See `Files`."""
        prefix = self._folder_key(folder)
        with self._explained(folder, "read"):
            return {
                item["Key"].removeprefix(prefix): item["Size"]
                for page in self._pages(prefix)
                for item in page.get("Contents", ())
            }

    def put_folder(self, source: Path, folder: str, last: str) -> None:
        """See `Files`."""
        self.delete_folder(folder, last)
        for path in sorted(source.iterdir(), key=lambda path: path.name == last):
            name = f"{folder}/{path.name}"
            with self._explained(name, "write"):
                self._client.upload_file(
                    str(path), self._bucket, self._key(name), Config=_TRANSFER
                )

    def delete_folder(self, folder: str, first: str) -> None:
        """See `Files`."""
        names = sorted(self.sizes(folder), key=lambda name: name != first)
        if first in names:
            self.delete(f"{folder}/{first}")
        keys = [{"Key": self._key(f"{folder}/{name}")} for name in names if name != first]
        for start in range(0, len(keys), _AT_ONCE):
            with self._explained(folder, "delete"):
                answer = self._client.delete_objects(
                    Bucket=self._bucket,
                    Delete={"Objects": keys[start : start + _AT_ONCE], "Quiet": True},
                )
            if refused := answer.get("Errors"):
                raise StorageError(
                    f"{self.uri}/{folder}: cannot delete {len(refused)} objects "
                    f"({refused[0]['Code']}); allow these credentials s3:DeleteObject there"
                )

    @contextmanager
    def local_folder(self, folder: str) -> Iterator[Path]:
        """See `Files`; a copy that is deleted afterwards."""
        with tempfile.TemporaryDirectory(prefix="knet-") as scratch:
            for name in self.sizes(folder):
                target = Path(scratch, name)
                target.parent.mkdir(parents=True, exist_ok=True)
                with self._explained(f"{folder}/{name}", "read"):
                    self._client.download_file(
                        self._bucket, self._key(f"{folder}/{name}"), str(target), Config=_TRANSFER
                    )
            yield Path(scratch)

    def _read(self, name: str) -> bytes:
        answer = self._client.get_object(Bucket=self._bucket, Key=self._key(name))
        content: bytes = answer["Body"].read()
        return content

    def _pages(self, prefix: str, **arguments: str) -> Iterator[dict[str, Any]]:
        paginator = self._client.get_paginator("list_objects_v2")
        yield from paginator.paginate(Bucket=self._bucket, Prefix=prefix, **arguments)

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}".strip("/")

    def _folder_key(self, folder: str) -> str:
        key = self._key(folder)
        return f"{key}/" if key else ""

    def _explained(self, name: str, verb: str) -> AbstractContextManager[None]:
        return explained(f"{self.uri}/{name}", verb)
