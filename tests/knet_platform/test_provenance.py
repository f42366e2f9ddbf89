"""What is recorded of a run, and that no secret of this process is part of it."""

import dataclasses
import json
import tomllib
from pathlib import Path

import pytest

import knet_core
from knet_core import DataConfig, Recipe, data_fingerprint
from knet_platform import provenance
from knet_platform.provenance import (
    EVALUATION_CODE,
    PACKAGES,
    accelerator,
    capture,
    with_absolute_root,
)
from knet_platform.source import Source
from knet_platform.storage import Store

SOURCE = Source(git_sha="a" * 40, patch="# a note\ndiff --git a/x b/x\n")
SHAPES = Recipe(data=DataConfig(format="shapes"))
ROOT = Path(__file__).parents[2]


def test_a_record_names_all_that_a_run_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/bin/knet", "run", "s.yaml", "data.root=/my data"])
    recipe = dataclasses.replace(SHAPES, seed=3)
    found = capture(recipe, workers=2, source=SOURCE)
    assert Recipe.from_dict(found.recipe) == with_absolute_root(recipe)
    assert Path(found.recipe["data"]["root"]).is_absolute()
    assert found.data_fingerprint == data_fingerprint(recipe.data)
    assert (found.workers, found.git_sha, found.patch) == (2, "a" * 40, True)
    assert found.notes == ("a note",)
    assert found.command == "knet run s.yaml 'data.root=/my data'"
    assert set(found.code_files) == {
        file.relative_to(ROOT / "knet_core").as_posix()
        for file in (ROOT / "knet_core").rglob("*.py")
    }
    assert found.lock_digest is not None
    assert found.accelerator is None


def test_a_planted_secret_is_nowhere_in_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted/one+2")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "planted-three")
    words = ["knet", "run", "s.yaml", "--note", "planted/one+2", "db=pg://me:planted-three@db/x"]
    monkeypatch.setattr("sys.argv", words)
    trial = Store(str(tmp_path)).trial("ab")
    trial.write_provenance(capture(SHAPES, workers=1, source=SOURCE), SOURCE.patch)
    assert "planted" not in trial.read_bytes("provenance.json").decode()


def test_a_record_is_read_back_as_written(tmp_path: Path) -> None:
    trial = Store(str(tmp_path)).trial("ab")
    assert trial.provenance() is None
    assert trial.provenance_files() == {}
    written = capture(SHAPES, workers=1, source=SOURCE)
    trial.write_provenance(written, SOURCE.patch)
    assert trial.provenance_files()["patch.diff"].decode() == SOURCE.patch
    assert trial.status() == "new"
    read = trial.provenance()
    assert json.dumps(dataclasses.asdict(read)) == json.dumps(dataclasses.asdict(written))

    gpu = {"name": "NVIDIA H200", "driver": "570.1", "cuda": "12.8"}
    trial.write_machine(threads=2, accelerator=gpu)
    trial.write_machine(threads=4, accelerator=None)  # a later attempt, elsewhere
    assert trial.provenance() == dataclasses.replace(read, threads=2, accelerator=gpu)


def test_without_changes_there_is_no_patch(tmp_path: Path) -> None:
    trial = Store(str(tmp_path)).trial("ab")
    clean = Source(git_sha="a" * 40, patch="")
    trial.write_provenance(capture(SHAPES, workers=1, source=clean), clean.patch)
    assert trial.list() == ["provenance.json"]
    assert list(trial.provenance_files()) == ["provenance.json"]


def test_a_gpu_is_recorded_with_its_driver_where_there_is_one() -> None:
    import torch

    found = accelerator()
    assert (found is not None) == torch.cuda.is_available()
    if found is not None:
        assert "NVIDIA" in found["name"]
        assert found["driver"].split(".")[0].isdigit()
        assert found["cuda"].count(".") == 1


def test_the_evaluation_is_told_from_the_rest_of_the_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    true_files = provenance._code_files()

    def digest(changed: str) -> str:
        files = {**true_files, changed: "0"}
        monkeypatch.setattr(provenance, "_code_files", lambda: files)
        return capture(SHAPES, workers=1, source=SOURCE).evaluation_digest

    before = capture(SHAPES, workers=1, source=SOURCE).evaluation_digest
    assert digest("losses.py") == before
    assert digest("metrics/mask_ap.py") != before


def test_the_evaluation_s_files_exist() -> None:
    core = Path(knet_core.__file__).parent
    assert [name for name in EVALUATION_CODE if not (core / name).is_file()] == []
    metrics = {f"metrics/{file.name}" for file in (core / "metrics").glob("*.py")}
    assert metrics - {"metrics/__init__.py"} <= set(EVALUATION_CODE)


def test_the_packages_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [item.partition(">=")[0].partition("[")[0] for item in project["dependencies"]]
    assert sorted(PACKAGES) == sorted(named)
