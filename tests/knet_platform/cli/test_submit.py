"""What a job takes along, and what it never does; the job itself runs in test_tuner.py."""

import argparse
import shutil
from pathlib import Path

import pytest

import knet_core
from knet_platform.cli.main import main
from knet_platform.cli.submit import _entrypoint, add_arguments, runtime_env
from knet_platform.source import read_source


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_the_job_keeps_its_state_where_this_machine_keeps_it(
    project: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KNET_STORAGE", "s3://bucket/knet")
    monkeypatch.setenv("KNET_CACHE", "/local/knet")
    settings = runtime_env()["env_vars"]
    assert settings["KNET_HOME"] == str(home)
    assert settings["KNET_DATA"] == str(project)
    assert settings["KNET_STORAGE"] == "s3://bucket/knet"
    assert settings["KNET_CACHE"] == "/local/knet"
    assert "MLFLOW_TRACKING_URI" not in settings


def test_the_job_knows_what_its_code_came_from() -> None:
    source = read_source()
    settings = runtime_env()["env_vars"]
    assert settings.get("KNET_GIT_SHA") == source.git_sha
    assert ("KNET_GIT_PATCH" in settings) == (source.git_sha is not None)


def test_credentials_stay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-key")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret-token")
    assert "secret" not in str(runtime_env())


def test_state_and_data_below_the_project_are_not_sent(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KNET_HOME", str(project / "state"))
    monkeypatch.setenv("KNET_DATA", "images")
    excluded = runtime_env()["excludes"]
    assert {"/state", "/state/storage", "/images", ".venv", ".git"} <= set(excluded)


def test_packages_of_a_source_tree_go_along(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "py_modules" not in runtime_env()  # ours are installed from elsewhere
    root = Path(knet_core.__file__).parents[1]
    monkeypatch.chdir(root)
    assert runtime_env()["py_modules"] == [
        str(root / "knet_core"),
        str(root / "platform" / "knet_platform"),
    ]


def test_the_job_runs_the_same_command(project: Path) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = "--scale laptop --seeds 3 --max-usd 7.5 --instance g5.xlarge --spot --json"
    args = parser.parse_args(
        ["sweeps/stages.yaml", "data.root=/my data", "train.iterations=5", *words.split()]
    )
    assert _entrypoint(Path("sweeps/stages.yaml"), args) == (
        "python -m knet_platform.cli.main run sweeps/stages.yaml 'data.root=/my data' "
        f"train.iterations=5 {words}"
    )


def test_a_sweep_outside_the_project_is_refused(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", str(recipe)]) == 2
    assert "submit from the project's folder" in capsys.readouterr().err


def test_no_cluster_is_one_line(
    project: Path,
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copy(recipe, project / "tiny.yaml")
    (project / "sweep.yaml").write_text(
        "name: s\nbase: tiny.yaml\nmetric: {name: val/AP, mode: max}\nbaseline: '1'\n"
        "arms: {'1': {}}\n"
    )
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert main(["submit", "sweep.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: RAY_ADDRESS: cannot reach http://127.0.0.1:9 (")
