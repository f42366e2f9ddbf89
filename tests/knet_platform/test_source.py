"""The state of a real repository, recorded without touching it and applied to a fresh clone."""

import subprocess
from pathlib import Path

import pytest

from knet_platform import source
from knet_platform.source import git_sha, read_source


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("KNET_GIT_SHA", "KNET_GIT_PATCH"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "--quiet")
    (folder / "code.py").write_text("one = 1\ntwo = 2\n")
    (folder / "gone.py").write_text("gone = True\n")
    (folder / "latin.txt").write_bytes(b"caf\xe9\r\n")
    (folder / ".gitignore").write_text("ignored.py\n")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "start")
    return folder


def change(repository: Path) -> None:
    """Change, delete and add, some of it staged."""
    (repository / "code.py").write_text("one = 1\ntwo = 22\n")
    (repository / "latin.txt").write_bytes(b"th\xe9\r\n")
    git(repository, "add", "code.py")
    (repository / "gone.py").unlink()
    (repository / "sub").mkdir()
    (repository / "sub" / "a new.yaml").write_text("a: 1\n")


def files(folder: Path) -> dict[str, bytes]:
    names = git(folder, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    paths = [folder / name for name in names.split("\0") if name]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.exists()}


def test_the_patch_makes_a_fresh_clone_equal(repository: Path, tmp_path: Path) -> None:
    change(repository)
    before = git(repository, "status", "--porcelain")
    found = read_source(repository / "code.py")
    assert git(repository, "status", "--porcelain") == before
    assert found.git_sha == git(repository, "rev-parse", "HEAD").strip()
    assert found.has_changes
    assert found.notes == ()

    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(repository), str(clone))
    patch = tmp_path / "patch.diff"
    patch.write_bytes(found.patch.encode(errors="surrogateescape"))
    git(clone, "apply", str(patch))
    assert files(clone) == files(repository)


def test_nothing_changed_is_an_empty_patch(repository: Path) -> None:
    (repository / "ignored.py").write_text("x = 1\n")
    found = read_source(repository / "code.py")
    assert (found.patch, found.has_changes, found.notes) == ("", False, ())


def test_what_is_not_recorded_is_said(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "picture.py").write_bytes(bytes(range(256)))
    (repository / "weights.bin").write_bytes(b"left out: no code")
    (repository / "large.json").write_text("1" * (source.MAX_UNTRACKED + 1))
    (repository / "code.py").write_text("one = 11\n")
    found = read_source(repository / "code.py")
    assert found.notes == (
        "large.json is not recorded: a new file of more than 100 KiB",
        "picture.py is not recorded: it is not text",
    )
    assert "+one = 11" in found.patch
    assert "weights" not in found.patch
    patch = tmp_path / "patch.diff"
    patch.write_text(found.patch)
    git(repository, "apply", "--reverse", "--check", str(patch))  # the notes do not disturb

    monkeypatch.setattr(source, "MAX_PATCH", 20)
    found = read_source(repository / "code.py")
    assert not found.has_changes
    assert "at most" in found.notes[-1]


def test_no_repository_is_said_and_not_guessed(repository: Path, tmp_path: Path) -> None:
    installed = repository / "ignored.py"  # such as a virtual environment in a project's folder
    installed.write_text("")
    for file in (installed, tmp_path / "elsewhere.py"):
        found = read_source(file)
        assert (found.git_sha, found.has_changes) == (None, False)
        assert "`knet submit` records them" in found.notes[0]


def test_a_job_is_told_what_its_copy_came_from(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(repository)
    here = read_source(repository / "code.py")
    for name, value in here.as_environment().items():
        monkeypatch.setenv(name, value)
    assert read_source(tmp_path / "unpacked.py") == here
    assert git_sha() == here.git_sha


def test_a_patch_too_large_for_a_job_is_said(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(repository)
    monkeypatch.setattr(source, "MAX_SENT", 10)
    for name, value in read_source(repository / "code.py").as_environment().items():
        monkeypatch.setenv(name, value)
    found = read_source()
    assert not found.has_changes
    assert found.notes == ("the uncommitted changes were too large to travel with a job",)


def test_a_commit_that_someone_stated_says_nothing_of_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KNET_GIT_SHA", "abc1234")
    monkeypatch.delenv("KNET_GIT_PATCH", raising=False)
    found = read_source()
    assert (found.git_sha, found.has_changes) == ("abc1234", False)
    assert "changes are unknown" in found.notes[0]


def test_a_planted_secret_is_not_in_the_patch(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_TOKEN", "planted-7fa3")
    (repository / "code.py").write_text('one = connect("planted-7fa3")\ntwo = 2\n')
    (repository / "settings.yaml").write_text("password: hunter2hunter2\n")
    found = read_source(repository / "code.py")
    assert "planted-7fa3" not in found.patch
    assert "hunter2" not in found.patch
    assert found.notes == (
        "code.py: a secret was replaced by ***",
        "settings.yaml: a secret was replaced by ***",
    )
    git(repository, "checkout", "code.py")
    (repository / "settings.yaml").unlink()
    patch = tmp_path / "patch.diff"
    patch.write_text(found.patch)
    git(repository, "apply", str(patch))
    assert (repository / "code.py").read_text() == 'one = connect("***")\ntwo = 2\n'
