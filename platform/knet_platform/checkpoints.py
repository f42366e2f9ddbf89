"""A trial's checkpoints in the store: put whole, found complete, read verified, thinned out.

A checkpoint is complete when its `manifest.json` is there and every file it lists has its size;
the manifest is written last and deleted first. Whether the bytes are right is asked when a run is
about to use them.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from knet_core import CheckpointError, NewerFormatError
from knet_platform.files import Files

if TYPE_CHECKING:
    from knet_core import CheckpointState

KEPT_LAST = 2
"""Newest checkpoints that stay: should the last be damaged, there is one before it."""

_CHECKPOINT = re.compile(r"checkpoint_(\d+)")
_SET_ASIDE = "manifest.damaged.json"
"""Name of the manifest once a file was found to differ from it: a complete checkpoint no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Which checkpoints of a trial stay: the newest, and those of the best evaluations."""

    metric: str
    mode: Literal["min", "max"]
    best: int
    """How many of them, beside the newest `KEPT_LAST`."""


class Checkpoints:
    """The checkpoints in one trial's folder.

    Every method raises `StorageError` where the store refuses or is out of reach.
    """

    def __init__(self, files: Files, folder: str) -> None:
        self._files = files
        self._folder = folder

    def put(self, source: Path) -> None:
        """Copy a checkpoint of this machine into the store, in place of one of its step.

        Raises:
            CheckpointError: It is damaged.
            DiskFullError: The store is full; what it had is still there.
        """
        from knet_core import MANIFEST_FILE, verify_checkpoint

        verify_checkpoint(source)
        self._files.put_folder(source, self._path(source.name), MANIFEST_FILE)

    def take_over(self, name: str, source: "Checkpoints") -> None:
        """Copy a checkpoint of another run, and delete all others: there is no way back to them.

        Raises:
            CheckpointError: It is damaged.
            DiskFullError: The store is full; what it had is still there.
        """
        from knet_core import MANIFEST_FILE, verify_checkpoint

        with source.open(name) as folder:
            verify_checkpoint(folder)
            self._files.put_folder(folder, self._path(name), MANIFEST_FILE)
        for other in self.names():
            if other != name:
                self.delete(other)

    def names(self) -> list[str]:
        """Return the names of all checkpoints, also unfinished ones, newest first."""
        names = [name for name in self._files.list(self._folder) if _CHECKPOINT.fullmatch(name)]
        return sorted(names, key=step_of, reverse=True)

    def newest(self) -> str | None:
        """Return the name of the newest complete checkpoint.

        Raises:
            NewerFormatError: A newer version wrote it.
        """
        return next((name for name in self.names() if not self._flaw(name)), None)

    def complete(self) -> list[str]:
        """Return the names of all complete checkpoints, newest first.

        Raises:
            NewerFormatError: A newer version wrote one.
        """
        return [name for name in self.names() if not self._flaw(name)]

    def state(self, name: str) -> "CheckpointState":
        """Return how far the run had come at a checkpoint.

        Raises:
            CheckpointError: Its `state.json` is damaged.
        """
        from knet_core import parse_state

        place = self._path(f"{name}/state.json")
        return parse_state(self._files.read(place), f"{self._files.uri}/{place}")

    @contextmanager
    def open(self, name: str) -> Iterator[Path]:
        """Give a checkpoint as a folder of this machine; nobody has verified it yet."""
        with self._files.local_folder(self._path(name)) as folder:
            yield folder

    def newest_undamaged(self) -> tuple[str | None, list[str]]:
        """Return the newest checkpoint whose bytes are those that were written.

        Returns:
            Its name, and what is wrong with newer ones. A damaged one counts as incomplete from
            then on.

        Raises:
            NewerFormatError: A newer version wrote the newest.
        """
        problems: list[str] = []
        for name in self.names():
            flaw = self._flaw(name) or self._damage(name)
            if flaw is None:
                return name, problems
            problems.append(f"{self._files.uri}/{self._path(name)}: {flaw}")
        return None, problems

    def thin_out(self, retention: Retention) -> list[str]:
        """Delete what need not stay, and return the names."""
        names = self.superfluous(retention)
        for name in names:
            self.delete(name)
        return names

    def superfluous(self, retention: Retention) -> list[str]:
        """Return what need not stay; the newest is left alone, complete or on its way."""
        names, complete = self.names(), self.complete()
        kept = {*complete[:KEPT_LAST], *self.best(retention)}
        older = names[names.index(complete[0]) :] if complete else []
        return [name for name in older if name not in kept]

    def delete(self, name: str) -> None:
        """Delete a checkpoint; cut short, it leaves one that counts as unfinished."""
        from knet_core import MANIFEST_FILE

        self._files.delete_folder(self._path(name), MANIFEST_FILE)

    def best(self, retention: Retention) -> list[str]:
        """Return those of the best evaluations, best first."""
        found = []
        for name in self.complete():
            last = self.state(name).evaluations[-1:]
            if last and last[0].step == step_of(name) and retention.metric in last[0].metrics:
                found.append((last[0].metrics[retention.metric], name))
        found.sort(key=lambda item: item[0], reverse=retention.mode == "max")
        return [name for _, name in found[: retention.best]]

    def _flaw(self, name: str) -> str | None:
        """Return why a checkpoint is not complete, as far as names and sizes tell."""
        from knet_core import CONTENT_FILES, MANIFEST_FILE, parse_manifest

        sizes = self._files.sizes(self._path(name))
        if MANIFEST_FILE not in sizes:
            whole = all(sizes.get(file) for file in CONTENT_FILES)
            return None if whole and self._is_first_format(name) else "never finished"
        place = self._path(f"{name}/{MANIFEST_FILE}")
        try:
            manifest = parse_manifest(self._files.read(place), f"{self._files.uri}/{place}")
        except NewerFormatError:
            raise
        except CheckpointError:
            return f"{MANIFEST_FILE} is cut short or damaged"
        for file, record in manifest.items():
            if sizes.get(file) != record.bytes:
                return f"{file} has {sizes.get(file, 0)} of {record.bytes} bytes"
        return None

    def _is_first_format(self, name: str) -> bool:
        """Return whether a checkpoint is older than manifests."""
        try:
            return bool(
                json.loads(self._files.read(self._path(f"{name}/state.json")))["format"] == 1
            )
        except (ValueError, KeyError, TypeError):
            return False

    def _damage(self, name: str) -> str | None:
        """Return which file differs from the manifest, and let it be complete no more."""
        from knet_core import MANIFEST_FILE, verify_checkpoint

        try:
            with self.open(name) as folder:
                verify_checkpoint(folder)
        except NewerFormatError:
            raise
        except CheckpointError as error:
            manifest = self._path(f"{name}/{MANIFEST_FILE}")
            self._files.write(self._path(f"{name}/{_SET_ASIDE}"), self._files.read(manifest))
            self._files.delete(manifest)
            return str(error).removeprefix(f"{folder}/")
        return None

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}" if self._folder else name


def step_of(name: str) -> int:
    """Return the step in the name of a checkpoint."""
    return int(name.rpartition("_")[2])
