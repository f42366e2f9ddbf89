"""The write-ahead journal: what a tracker has to be told and may not know yet.

One SQLite file for a sweep and an address, in `KNET_HOME/tracking`. A record is on the disk when
`append` returns, and leaves it once it is known to have arrived. SQLite recovers from a process
or a machine that dies at any point; every record carries a checksum of its own on top.
"""

import hashlib
import json
import sqlite3
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from knet_platform.errors import TrackingError
from knet_platform.tracking.protocol import SweepRun

MAX_BYTES = 2 * 2**30
"""Most that a journal takes on the disk."""
WAITING_BYTES = 64 * 2**20
"""Most that waits in memory where the disk takes no more."""
_PAGE = 4096
"""Bytes; SQLite's default."""
_TABLES = """
CREATE TABLE IF NOT EXISTS records (
    number INTEGER PRIMARY KEY, kind TEXT NOT NULL, trial TEXT NOT NULL,
    arguments TEXT NOT NULL, content BLOB NOT NULL, checksum INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS sweep (address TEXT NOT NULL, description TEXT NOT NULL);
"""
_INSERT = "INSERT INTO records VALUES (?, ?, ?, ?, ?, ?)"


class JournalFullError(TrackingError):
    """Neither the disk nor the memory set aside takes another record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One call of a tracker's method."""

    number: int
    """Ascending in the order of the calls."""
    kind: str
    """Name of the method."""
    trial: str
    """Hash; empty for what concerns the whole sweep."""
    arguments: dict[str, Any]
    """Plain values."""
    content: bytes = b""
    """Of a picture or a file."""

    @property
    def size(self) -> int:
        """Return roughly how many bytes it takes."""
        return len(self.content) + 600 * len(self.arguments.get("points", "1"))


def journal_path(home: Path, name: str, uri: str) -> Path:
    """Return where the journal of `name` for the tracking store `uri` lies."""
    address = hashlib.sha256(without_password(uri).encode()).hexdigest()[:8]
    return home / "tracking" / f"{name}.{address}.db"


def journals(home: Path) -> list[Path]:
    """Return all journals of a state folder, sorted."""
    return sorted((home / "tracking").glob("*.db"))


def without_password(uri: str) -> str:
    """Return an address as it may be shown and kept."""
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


class Journal:
    """Records in their order, on the disk; in memory while the disk takes no more.

    Safe to use from several threads; one process at a time.

    Args:
        path: The file; made if it is not there, with what is left of a damaged one.
        warn: Told in one line when something of the journal was damaged, or the disk is full.
        max_bytes: Size beyond which the disk counts as full.

    Raises:
        TrackingError: Another process uses the file, or the folder takes no files.
    """

    def __init__(
        self, path: Path, *, warn: Callable[[str], None], max_bytes: int = MAX_BYTES
    ) -> None:
        self.path = path
        self._warn = warn
        self._max_bytes = max_bytes
        self._lock = threading.RLock()
        self._waiting: deque[Record] = deque()
        self._waiting_bytes = 0
        self._arrived: set[int] = set()
        """Numbers of records on the disk that count no more, and are yet to be deleted."""
        self._closed = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = self._open_or_mend()
            last, count = self._database.execute(
                "SELECT coalesce(max(number), 0), count(*) FROM records"
            ).fetchone()
        except (sqlite3.Error, OSError) as error:
            raise TrackingError(_unusable(path, error)) from error
        self._next: int = last + 1
        self._written: int = count

    def __len__(self) -> int:
        """Return the number of records that are not known to have arrived."""
        return self._written + len(self._waiting)

    @property
    def unwritten(self) -> int:
        """Return how many of them would not survive this process."""
        return len(self._waiting)

    def describe(self, address: str, sweep: SweepRun) -> None:
        """Note which sweep the records belong to, and where they go.

        Raises:
            TrackingError: The disk takes no more.
        """
        try:
            with self._lock, self._transaction():
                self._database.execute("DELETE FROM sweep")
                values = (without_password(address), json.dumps(asdict(sweep)))
                self._database.execute("INSERT INTO sweep VALUES (?, ?)", values)
        except sqlite3.Error as error:
            raise TrackingError(_unusable(self.path, error)) from error

    def description(self) -> tuple[str, SweepRun] | None:
        """Return address and sweep; None if the process died before it noted them."""
        with self._lock:
            row = self._database.execute("SELECT address, description FROM sweep").fetchone()
        if row is None:
            return None
        return row[0], SweepRun.from_dict(json.loads(row[1]))

    def append(
        self, kind: str, trial: str = "", /, *, content: bytes = b"", **arguments: Any
    ) -> None:
        """Add a record.

        Raises:
            JournalFullError: There is no room for it.
        """
        with self._lock:
            record = Record(
                number=self._next, kind=kind, trial=trial, arguments=arguments, content=content
            )
            if self._waiting or not self._write(record):
                self._wait(record)
            self._next += 1

    def head(self, records: int, size: int) -> list[Record]:
        """Return the oldest records, at least one if there is any.

        Args:
            records: Most of them.
            size: Bytes after which no further is added.

        Raises:
            TrackingError: The file was damaged while it was open.
        """
        found: list[Record] = []
        total = 0
        with self._lock:
            try:
                for record in chain(self._stored(), self._waiting):
                    found.append(record)
                    total += record.size
                    if len(found) == records or total >= size:
                        break
            except sqlite3.DatabaseError as error:
                if not found:
                    raise TrackingError(_damage(self.path, str(error))) from error
        return found

    def discard(self, records: Iterable[Record]) -> None:
        """Forget records that have arrived."""
        numbers = {record.number for record in records}
        with self._lock:
            if self._closed:  # what arrives so late is sent again, and recognised
                return
            in_memory = {record.number for record in self._waiting} & numbers
            self._waiting = deque(item for item in self._waiting if item.number not in numbers)
            self._waiting_bytes = sum(record.size for record in self._waiting)
            self._written -= len(numbers) - len(in_memory)
            self._arrived |= numbers - in_memory
            self._delete_arrived()
            while self._waiting and self._write(self._waiting[0]):
                self._waiting.popleft()

    def close(self) -> None:
        """Release the file, and delete it once nothing waits any more."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._database.close()
            if not len(self):
                _delete(self.path)

    def _wait(self, record: Record) -> None:
        if self._waiting_bytes + record.size > WAITING_BYTES:
            raise JournalFullError(f"{self.path}: no space left for what cannot be sent yet")
        self._waiting.append(record)
        self._waiting_bytes += record.size

    def _write(self, record: Record) -> bool:
        """Put a record on the disk; tell whether it took it."""
        try:
            with self._transaction():
                self._database.execute(_INSERT, _row(record))
        except sqlite3.DatabaseError as error:
            if not self._waiting:
                self._warn(f"{self.path}: {error}; what cannot be sent yet is kept in memory")
            return False
        self._written += 1
        return True

    def _delete_arrived(self) -> None:
        rows = [(number,) for number in self._arrived]
        try:
            with self._transaction():
                self._database.executemany("DELETE FROM records WHERE number = ?", rows)
        except sqlite3.DatabaseError:
            return  # a full disk does not even take deletions: made up for with the next ones
        self._arrived.clear()

    def _stored(self) -> Iterator[Record]:
        if self._closed:
            return
        with closing(self._database.execute("SELECT * FROM records ORDER BY number")) as rows:
            for row in rows:
                if row[0] in self._arrived:
                    continue
                if _is_sound(row):
                    yield _record(row)
                    continue
                self._arrived.add(row[0])
                self._written -= 1
                self._warn(_damage(self.path, "a record was unreadable"))

    def _transaction(self) -> "sqlite3.Connection":
        """Return the context that commits, or rolls back on an error."""
        self._database.execute("BEGIN IMMEDIATE")
        return self._database

    def _open_or_mend(self) -> sqlite3.Connection:
        try:
            return _open(self.path, self._max_bytes)
        except sqlite3.OperationalError:
            raise  # locked, or no such folder: nothing is damaged
        except sqlite3.DatabaseError:
            aside = self.path.with_suffix(".damaged")
            for suffix in ("", "-wal"):
                source = Path(f"{self.path}{suffix}")
                if source.exists():
                    source.replace(f"{aside}{suffix}")
            database = _open(self.path, self._max_bytes)
            rows, sweep = _salvage(aside)
            with database:
                database.executemany(_INSERT, rows)
                database.executemany("INSERT INTO sweep VALUES (?, ?)", sweep)
            self._warn(_damage(self.path, f"{len(rows)} records were saved from it ({aside})"))
            return database


def _open(path: Path, max_bytes: int) -> sqlite3.Connection:
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=0.2)
    try:
        # One process at a time, and no memory shared between processes: good on NFS as well.
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")  # on the disk when `append` returns
        database.execute(f"PRAGMA max_page_count = {max_bytes // _PAGE}")
        database.executescript(_TABLES)
        (state,) = database.execute("PRAGMA quick_check(1)").fetchone()
    except BaseException:
        database.close()
        raise
    if state != "ok":
        database.close()
        raise sqlite3.DatabaseError(state)
    return database


def _salvage(path: Path) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """Return what can be read of the rows of a damaged journal: records, and the sweep."""
    found: dict[str, list[tuple[Any, ...]]] = {"records": [], "sweep": []}
    database = sqlite3.connect(path)
    database.execute("PRAGMA writable_schema = ON")  # reads a file that was cut short as well
    for table, rows in found.items():
        try:
            for row in database.execute(f"SELECT * FROM {table} ORDER BY rowid"):
                rows.append(row)
        except sqlite3.DatabaseError:  # from here on nothing can be read
            continue
    database.close()
    records = [row for row in found["records"] if _is_sound(row)]
    return records, [row for row in found["sweep"] if None not in row]


def _row(record: Record) -> tuple[Any, ...]:
    arguments = json.dumps(record.arguments, separators=(",", ":"))
    row = (record.number, record.kind, record.trial, arguments, record.content)
    return (*row, _checksum(row))


def _record(row: tuple[Any, ...]) -> Record:
    number, kind, trial, arguments, content, _ = row
    return Record(
        number=number, kind=kind, trial=trial, arguments=json.loads(arguments), content=content
    )


def _is_sound(row: tuple[Any, ...]) -> bool:
    """Tell whether a row is as it was written; of pages that are gone SQLite reads NULL."""
    return None not in row and _checksum(row[:-1]) == row[-1]


def _checksum(row: tuple[Any, ...]) -> int:
    *head, content = row
    return zlib.crc32(content, zlib.crc32(repr(head).encode()))


def _delete(path: Path) -> None:
    for suffix in ("", "-wal"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


def _unusable(path: Path, error: Exception) -> str:
    if "locked" in str(error):
        return f"{path}: another process uses this journal; it sends what waits there by itself"
    return f"{path}: cannot write the journal ({error}); expected a writable folder: set KNET_HOME"


def _damage(path: Path, what: str) -> str:
    return (
        f"{path}: damaged; {what}, the rest is sent again from the store when the same command "
        f"runs next"
    )
