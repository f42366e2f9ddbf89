"""`knet repro` for real: a repository, a run with uncommitted changes, and the run once more."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from knet_core import DataConfig, Recipe
from knet_platform.cli import repro
from knet_platform.cli.main import main
from knet_platform.cli.runs import RecordedRun
from knet_platform.provenance import Provenance, capture
from knet_platform.source import Source
from knet_platform.storage import Store, TrialResult

ROOT = Path(__file__).parents[3]


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of this code, committed as it is."""
    folder = tmp_path_factory.mktemp("project")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("knet_core", "platform"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    (folder / ".gitignore").write_text("__pycache__/\n")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "start")
    return folder


@pytest.mark.slow
def test_a_run_with_uncommitted_changes_is_reproduced_to_the_last_digit(
    project: Path, recipe: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = project / "knet_core" / "losses.py"
    changed.write_text(changed.read_text() + "\nCHANGED = True\n")
    (project / "knet_core" / "extra.py").write_text("NEW = True\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(project), str(project / "platform"))))

    def knet(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "knet_platform.cli.main", *arguments]
        return subprocess.run(command, cwd=project, capture_output=True, text=True)

    trained = knet("train", str(recipe), "seed=3", "--json")
    assert trained.returncode == 0, trained.stderr
    first = json.loads(trained.stdout)
    # The user goes on working; what was recorded counts.
    git(project, "checkout", "--quiet", "--", "knet_core/losses.py")
    (project / "knet_core" / "extra.py").unlink()
    before = git(project, "status", "--porcelain", "--ignored")
    git(project, "commit", "--quiet", "--allow-empty", "-m", "later")

    again = knet("repro", first["trial_hash"], "--json")
    assert again.returncode == 0, again.stderr
    outcome = json.loads(again.stdout)
    assert (outcome["distance"], outcome["within"]) == (0.0, True)
    differences = outcome["differences"]
    for part in ("recipe", "code", "data", "environment"):
        assert differences[part] == {}, part
    assert differences["metrics"]["val/AP"] == [first["metrics"]["val/AP"]] * 2 + [0.0]
    assert git(project, "status", "--porcelain", "--ignored") == before
    assert git(project, "worktree", "list").count("\n") == 0
    assert len(list((home / "runs").iterdir())) == 1


@pytest.fixture
def record(
    project: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    finished: Callable[..., TrialResult],
):
    """Write the record of a finished run of the project's code, changed as asked."""
    monkeypatch.setattr(repro, "_REPOSITORY", project)
    recipe = Recipe(data=DataConfig(format="shapes"))

    def write(*, patch: str = "", complete: bool = True, **changes: object) -> Provenance:
        source = Source(git_sha=git(project, "rev-parse", "HEAD"), patch=patch)
        provenance = capture(recipe, workers=1, source=source)
        provenance = dataclasses.replace(provenance, **changes)
        folder = Store(str(home / "storage")).trial("aaaa1111")
        folder.write_provenance(provenance, patch)
        if complete:
            folder.write_result(finished("aaaa1111", metrics={"val/AP": 0.25}))
        return provenance

    return write


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["repro", "aaaa1111"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: aaaa1111: ")
    return line


def test_a_commit_that_is_not_here_is_refused(record, capsys: pytest.CaptureFixture[str]) -> None:
    record(git_sha="0" * 40)
    assert f"commit {'0' * 40} is not in the repository" in refusal(capsys)


def test_a_run_without_a_commit_is_refused_with_the_reason(
    record, capsys: pytest.CaptureFixture[str]
) -> None:
    record(git_sha=None, notes=("no git repository holds this code",))
    assert "cannot be run again: no git repository holds this code" in refusal(capsys)


def test_an_unfinished_run_is_refused(record, capsys: pytest.CaptureFixture[str]) -> None:
    record(complete=False)
    assert "is not finished" in refusal(capsys)


def test_a_patch_that_does_not_apply_is_refused(
    record, capsys: pytest.CaptureFixture[str]
) -> None:
    record(patch="diff --git a/no.py b/no.py\n--- a/no.py\n+++ b/no.py\n@@ -1 +1 @@\n-a\n+b\n")
    line = refusal(capsys)
    assert "cannot restore the code: error: no.py: No such file" in line


def test_other_data_is_refused(record, capsys: pytest.CaptureFixture[str]) -> None:
    record(data_fingerprint="f" * 64)
    assert "is not what it was trained on" in refusal(capsys)


@pytest.mark.parametrize(
    ("metrics", "tolerance", "code", "said"),
    [
        ({"val/AP": 0.25, "bench/fps": 9.0}, "0", 0, "every score is equal to the last digit"),
        ({"val/AP": 0.2505}, "0.001", 0, "reproduced: the largest difference of a score is 0.000"),
        ({"val/AP": 0.2505}, "0", 3, "not reproduced: the largest difference of a score is 0.000"),
        ({"val/PQ": 0.25}, "1", 3, "have not the same scores"),
    ],
)
def test_the_distance_decides(
    metrics: dict[str, float],
    tolerance: str,
    code: int,
    said: str,
    record,
    finished: Callable[..., TrialResult],
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    provenance = record()
    folder = Store(str(home / "again")).run_folder()
    folder.write_provenance(provenance, "")
    folder.write_result(finished("aaaa1111", metrics=metrics))
    again = RecordedRun(name="again", folder=folder, provenance=provenance)
    monkeypatch.setattr(repro, "_run_again", lambda *_: again)
    assert main(["repro", "aaaa1111", "--tolerance", tolerance]) == code
    assert said in capsys.readouterr().out.splitlines()[-1]


def test_a_dry_run_prints_the_commands_and_runs_nothing(
    record, project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    patch = "diff --git a/x.py b/x.py\nnew file mode 100644\n"
    sha = record(patch=patch, threads=2).git_sha
    assert main(["repro", "aaaa1111", "--dry-run"]) == 0
    made, *comments, clone, checkout, apply, train = capsys.readouterr().out.splitlines()
    work = made.removeprefix("mkdir ")
    assert not Path(work).exists()
    assert [line.split(":")[0] for line in comments] == [
        f"# {work}/recipe.yaml",
        f"# {work}/patch.diff",
    ]
    assert clone == f"git clone --quiet --shared --no-checkout {project} {work}/code"
    assert checkout == f"git -C {work}/code checkout --quiet --detach {sha}"
    assert apply == f"git -C {work}/code apply --whitespace=nowarn {work}/patch.diff"
    assert "OMP_NUM_THREADS=2" in train
    assert train.endswith(f"train {work}/recipe.yaml --output {work}/run)")


def test_more_workers_run_as_a_sweep_of_one_trial(
    record, capsys: pytest.CaptureFixture[str]
) -> None:
    record(workers=2)
    assert main(["repro", "aaaa1111", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "/sweep.yaml)" in printed.splitlines()[-1]
