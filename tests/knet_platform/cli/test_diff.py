"""`knet diff` on runs in a real store."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from knet_core import DataConfig, Recipe
from knet_platform.cli.main import main
from knet_platform.planning import load_sweep
from knet_platform.provenance import capture
from knet_platform.source import Source
from knet_platform.storage import Store, TrialResult, TrialStore

SOURCE = Source(git_sha="a" * 40, patch="")
RECIPE = Recipe(data=DataConfig(format="shapes", root="/data"))
SCORES = {"val/AP": 0.25, "bench/fps": 10.0}


Record = Callable[..., None]


@pytest.fixture
def record(finished: Callable[..., TrialResult]) -> Record:
    """Return a function that writes what a finished run leaves."""

    def record(
        folder: TrialStore,
        *,
        recipe: Recipe = RECIPE,
        source: Source = SOURCE,
        metrics: Mapping[str, float] = SCORES,
        **changes: Any,
    ) -> None:
        provenance = capture(recipe, workers=1, source=source)
        folder.write_provenance(dataclasses.replace(provenance, **changes), source.patch)
        folder.write_result(finished("ab", metrics=dict(metrics)))

    return record


@pytest.fixture
def store(home: Path) -> Store:
    return Store(str(home / "storage"))


def test_runs_that_differ_in_speed_only_are_said_to_be_equal(
    record: Record, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    record(store.trial("aaaa1111"), metrics={"val/AP": 0.25, "bench/fps": 10.0})
    record(store.trial("bbbb2222"), metrics={"val/AP": 0.25, "bench/fps": 11.0})
    assert main(["diff", "aaaa", "bbbb2222"]) == 0
    assert capsys.readouterr().out == (
        "nothing differs between aaaa and bbbb2222: recipe, code, data, environment and 1 scores "
        "are equal\n"
    )


def test_every_part_that_differs_is_named(
    record: Record, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    record(store.trial("aaaa1111"), packages={"torch": "2.8.0"}, code_files={"losses.py": "1"})
    other = dataclasses.replace(RECIPE, seed=1, model=dataclasses.replace(RECIPE.model, stages=1))
    record(
        store.trial("bbbb2222"),
        recipe=other,
        source=Source(git_sha="b" * 40, patch="diff --git a/x b/x\nindex 1..2\n-a\n+b\n"),
        packages={"torch": "2.9.0"},
        code_files={"losses.py": "2"},
        data_fingerprint="f" * 64,
        accelerator={"name": "NVIDIA H200", "driver": "570.1", "cuda": "12.8"},
        metrics={"val/AP": 0.35, "bench/fps": 10.0, "val/PQ": 0.5},
    )
    assert main(["diff", "aaaa1111", "bbbb2222", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recipe"] == {"model.stages": [3, 1], "seed": [0, 1]}
    assert found["code"].pop("patch")[0] is None
    assert found["code"] == {"git_sha": ["a" * 40, "b" * 40], "files.losses.py": ["1", "2"]}
    assert found["data"]["fingerprint"][1] == "f" * 64
    assert found["environment"]["packages.torch"] == ["2.8.0", "2.9.0"]
    assert found["environment"]["accelerator.name"] == [None, "NVIDIA H200"]
    assert found["metrics"]["val/AP"] == [0.25, 0.35, pytest.approx(0.1)]
    assert found["metrics"]["val/PQ"] == [None, 0.5, None]

    assert main(["diff", "aaaa1111", "bbbb2222"]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()]
    assert ["model.stages", "3", "1"] in rows
    assert ["git_sha", "aaaaaaaaaaaa", "bbbbbbbbbbbb"] in rows
    assert ["val/AP", "25.0", "35.0", "+10.0"] in rows
    assert ["val/PQ", "-", "50.0", "-"] in rows


def test_the_same_change_on_top_of_two_clones_is_one_patch(
    record: Record, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, header in (("aaaa1111", "# note\n"), ("bbbb2222", "")):
        index = f"index {name}..2\n"
        patch = f"{header}diff --git a/x b/x\n{index}-a\n+b\n"
        record(store.trial(name), source=Source(git_sha="a" * 40, patch=patch))
    assert main(["diff", "aaaa1111", "bbbb2222"]) == 0
    assert "nothing differs" in capsys.readouterr().out


def test_a_difference_too_small_for_the_table_is_shown_all_the_same(
    record: Record, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    record(store.trial("aaaa1111"), metrics={"val/AP": 0.25})
    record(store.trial("bbbb2222"), metrics={"val/AP": 0.2500001})
    assert main(["diff", "aaaa1111", "bbbb2222"]) == 0
    assert "+1.0e-05" in capsys.readouterr().out


def test_a_run_is_found_by_every_name_it_has(
    record: Record, store: Store, home: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    sweep_file = recipe.parent / "sweep.yaml"
    sweep_file.write_text(
        "name: s\nbase: tiny.yaml\nmetric: {name: val/AP, mode: max}\nbaseline: a\narms: {a: {}}\n"
    )
    (trial,) = load_sweep(sweep_file).trials
    record(store.trial(trial.hash))
    record(Store(str(home / "runs" / "cccc3333")).run_folder())
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    experiment = client.create_experiment("s")
    parent = client.create_run(experiment)
    child = client.create_run(experiment, tags={"trial_hash": trial.hash})
    sweep = ["--sweep", str(sweep_file)]
    folder = str(home / "runs" / "cccc3333")
    for name in (trial.hash, trial.hash[:6], "a/0", child.info.run_id):
        for other in ("cccc3333", folder):
            assert main(["diff", name, other, *sweep]) == 0
            assert "nothing differs" in capsys.readouterr().out
    assert main(["diff", parent.info.run_id, "cccc3333"]) == 2
    assert "expected one of its trials" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("aaaa1112", "did you mean 'aaaa1111'?"),
        ("aaaa", "begins 2 hashes: aaaa1111, aaaa2222; add digits"),
        ("3/0", "arm/seed needs --sweep FILE"),
        ("0" * 32, "no MLflow store"),
        ("dddd4444", "has not started"),
    ],
)
def test_a_name_that_stands_for_no_run_is_one_line(
    name: str,
    said: str,
    record: Record,
    store: Store,
    home: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    record(store.trial("aaaa1111"))
    record(store.trial("aaaa2222"))
    (home / "storage" / "trials" / "dddd4444").mkdir()
    assert main(["diff", name, "aaaa1111"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {name}: ")
    assert said in line


def test_a_run_from_before_provenance_says_so(
    record: Record, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    record(store.trial("aaaa1111"))
    store.trial("bbbb2222").write_bytes("result.json", b"{}")
    assert main(["diff", "aaaa1111", "bbbb2222"]) == 2
    assert "before provenance was recorded" in capsys.readouterr().err
