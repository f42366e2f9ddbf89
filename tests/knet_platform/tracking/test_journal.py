"""The journal keeps what it took: through kills, damage and full disks."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from knet_platform.errors import TrackingError
from knet_platform.tracking import Journal, SweepRun
from knet_platform.tracking import journal as module
from knet_platform.tracking.journal import JournalFullError

RUN = SweepRun(name="stages", baseline="2", git_sha="unknown", trials=("a", "b"))


@pytest.fixture
def warnings() -> list[str]:
    return []


def fill(journal: Journal, *numbers: int, size: int = 0) -> None:
    for number in numbers:
        journal.append("log_file", "a", content=bytes(size), name=f"{number}")


def names(journal: Journal) -> list[int]:
    return [int(record.arguments["name"]) for record in journal.head(10**6, 2**40)]


def test_records_come_back_in_order_in_another_process(
    tmp_path: Path, warnings: list[str]
) -> None:
    path = tmp_path / "new" / "s.db"
    first = Journal(path, warn=warnings.append)
    first.describe("http://user:secret@host:5000", RUN)
    fill(first, *range(5))
    first.discard(first.head(2, 2**20))
    first.close()
    assert b"secret" not in path.read_bytes()
    second = Journal(path, warn=warnings.append)
    assert second.description() == ("http://host:5000", RUN)
    fill(second, 5)
    assert names(second) == [2, 3, 4, 5]
    assert len(second) == 4
    assert warnings == []


def test_a_record_is_on_the_disk_when_append_returns(tmp_path: Path, warnings: list[str]) -> None:
    """What `kill -9` leaves behind is what lies in the files while the journal is open."""
    journal = Journal(tmp_path / "s.db", warn=warnings.append)
    journal.describe("none", RUN)
    fill(journal, *range(20), size=10_000)
    for suffix in ("", "-wal"):
        shutil.copy(tmp_path / f"s.db{suffix}", tmp_path / f"left.db{suffix}")
    assert names(Journal(tmp_path / "left.db", warn=warnings.append)) == list(range(20))
    assert warnings == []


def test_a_torn_tail_costs_what_was_torn_and_nothing_else(
    tmp_path: Path, warnings: list[str]
) -> None:
    journal = Journal(tmp_path / "s.db", warn=warnings.append)
    journal.describe("none", RUN)
    fill(journal, *range(20), size=10_000)
    for suffix in ("", "-wal"):
        shutil.copy(tmp_path / f"s.db{suffix}", tmp_path / f"left.db{suffix}")
    log = tmp_path / "left.db-wal"
    with log.open("r+b") as file:
        file.truncate(log.stat().st_size - 5000)
    left = Journal(tmp_path / "left.db", warn=warnings.append)
    assert names(left) == list(range(19))
    fill(left, 19)
    assert names(left) == list(range(20))


@pytest.mark.parametrize("harm", ["tail", "middle", "head"])
@pytest.mark.parametrize("size", [0, 3000], ids=["rows", "pages"])
def test_a_damaged_file_is_set_aside_and_what_can_be_read_is_kept(
    tmp_path: Path, warnings: list[str], harm: str, size: int
) -> None:
    path = tmp_path / "s.db"
    journal = Journal(path, warn=warnings.append)
    journal.describe("none", RUN)
    fill(journal, *range(200), size=size)
    journal._database.close()  # as `close`, but for the records that nobody sent
    length = path.stat().st_size
    with path.open("r+b") as file:
        if harm == "tail":
            file.truncate(length * 5 // 6)
        else:
            file.seek(length // 2 if harm == "middle" else 0)
            file.write(b"\xa5" * (length // 6))
    mended = Journal(path, warn=warnings.append)
    kept = names(mended)
    assert kept == sorted(set(kept))
    assert len(mended) == len(kept)
    if harm == "tail":
        assert kept[:100] == list(range(100))
    (warning,) = warnings
    assert warning.startswith(f"{path}: damaged; ")
    assert "the same command" in warning
    assert len(warning.splitlines()) == 1
    assert path.with_suffix(".damaged").exists()
    fill(mended, 200)
    assert names(mended) == [*kept, 200]


def test_a_record_with_a_wrong_byte_is_left_out_and_said(
    tmp_path: Path, warnings: list[str]
) -> None:
    path = tmp_path / "s.db"
    journal = Journal(path, warn=warnings.append)
    for content in (b"first", b"second", b"third"):
        journal.append("log_file", "a", content=content, name="x")
    journal.close()
    content = path.read_bytes()
    assert content.count(b"second") == 1
    path.write_bytes(content.replace(b"second", b"sec0nd"))
    damaged = Journal(path, warn=warnings.append)
    assert [record.content for record in damaged.head(10, 10**6)] == [b"first", b"third"]
    assert len(damaged) == 2
    assert len(warnings) == 1


def test_a_full_disk_keeps_records_in_memory_and_writes_them_later(
    tmp_path: Path, warnings: list[str]
) -> None:
    journal = Journal(tmp_path / "s.db", warn=warnings.append, max_bytes=40 * 4096)
    fill(journal, *range(60), size=4000)
    assert 20 < journal.unwritten < 60
    assert names(journal) == list(range(60))
    (warning,) = warnings
    assert "full" in warning
    journal.discard(journal.head(30, 2**40))
    assert names(journal) == list(range(30, 60))
    assert journal.unwritten == 0
    journal.close()
    assert names(Journal(tmp_path / "s.db", warn=warnings.append)) == list(range(30, 60))


def test_no_more_than_a_set_amount_waits_in_memory(
    tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WAITING_BYTES", 50_000)
    journal = Journal(tmp_path / "s.db", warn=warnings.append, max_bytes=16 * 4096)
    with pytest.raises(JournalFullError, match="no space left"):
        fill(journal, *range(100), size=4000)
    assert journal.unwritten * 4000 <= 50_000
    assert names(journal) == list(range(len(journal)))


FULL = """
import resource, sys
from pathlib import Path
from knet_platform.tracking import Journal
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
journal = Journal(Path(sys.argv[1]), warn=lambda text: print(text, file=sys.stderr))
for number in range(100):
    journal.append("log_file", "a", content=bytes(4000), name=str(number))
assert 0 < journal.unwritten < 100, journal.unwritten
arrived = []
while batch := journal.head(7, 2**30):
    arrived += [int(record.arguments["name"]) for record in batch]
    journal.discard(batch)
assert arrived == list(range(100)), arrived
"""


def test_a_file_system_that_takes_no_more_loses_nothing(tmp_path: Path) -> None:
    """The limit is the kernel's: writes beyond it fail as on a full disk, deletions too."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "s.db")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_journal_that_is_in_use_is_one_line(tmp_path: Path, warnings: list[str]) -> None:
    path = tmp_path / "s.db"
    first = Journal(path, warn=warnings.append)
    fill(first, 1)
    with pytest.raises(TrackingError, match="another process uses this journal"):
        Journal(path, warn=warnings.append)
    assert names(first) == [1]


def test_a_folder_that_takes_no_files_is_one_line(tmp_path: Path, warnings: list[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackingError, match="set KNET_HOME"):
        Journal(tmp_path / "file" / "s.db", warn=warnings.append)


def test_an_empty_journal_leaves_no_file(tmp_path: Path, warnings: list[str]) -> None:
    journal = Journal(tmp_path / "s.db", warn=warnings.append)
    fill(journal, 1)
    journal.discard(journal.head(10, 2**20))
    journal.close()
    assert list(tmp_path.iterdir()) == []
