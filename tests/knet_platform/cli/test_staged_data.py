"""A data set in a bucket through the command line: trained, evaluated, checked, seen by doctor."""

import json
from pathlib import Path

import boto3
import pytest

from knet_core import make_shapes
from knet_platform.cli.main import main

DATA = """\
format: coco
root: {root}
train: {{images: [train], annotations: [annotations/instances_train.json]}}
val: {{images: [val], annotations: [annotations/instances_val.json]}}
"""


def test_a_set_in_a_bucket_is_trained_on_as_one_in_a_folder(
    recipe: Path,
    home: Path,
    tmp_path: Path,
    s3_uri: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def said(*command: str) -> dict[str, object]:
        assert main([*command, "--json"]) == 0
        values: dict[str, object] = json.loads(capsys.readouterr().out)
        return values

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "none")
    make_shapes(tmp_path / "shapes", num_train=4, num_val=2, size=64)
    address = f"{s3_uri}/{tmp_path.name}"
    name, _, prefix = address.removeprefix("s3://").partition("/")
    bucket = boto3.resource("s3").Bucket(name)
    for path in (tmp_path / "shapes").rglob("*"):
        if path.is_file():
            key = path.relative_to(tmp_path / "shapes").as_posix()
            bucket.upload_file(str(path), f"{prefix}/{key}")
    data = tmp_path / "data.yaml"
    data.write_text(DATA.format(root=address))

    far = said("train", str(recipe), f"data={data}")
    checkpoint = str(far["checkpoint"])
    assert f"root: {address}" in Path(checkpoint, "recipe.yaml").read_text()
    provenance = json.loads(Path(checkpoint).with_name("provenance.json").read_text())
    assert provenance["recipe"]["data"]["root"] == address
    assert said("eval", checkpoint, str(data))["val/AP"] == far["metrics"]["val/AP"]  # type: ignore[index]
    checked = said("data", "check", str(data))
    assert checked["stats"]["splits"]["train"]["images"] == 4  # type: ignore[index]
    here = said(
        *("train", str(recipe), f"data={data}", f"data.root={tmp_path / 'shapes'}"),
        *("--output", str(tmp_path / "here")),
    )
    assert (here["trial_hash"], here["metrics"]["val/AP"]) == (  # type: ignore[index]
        far["trial_hash"],
        far["metrics"]["val/AP"],  # type: ignore[index]
    )

    main(["doctor", "--json"])
    (cache,) = (c for c in json.loads(capsys.readouterr().out) if c["name"] == "cache")
    assert cache["status"] in ("ok", "warn")
    assert "1 of 1 data sets whole" in cache["found"]
    monkeypatch.setenv("KNET_CACHE_GB", "much")
    assert main(["doctor", "--json"]) == 2
    (cache,) = (c for c in json.loads(capsys.readouterr().out) if c["name"] == "cache")
    assert (cache["status"], "KNET_CACHE_GB: got 'much'" in cache["found"]) == ("fail", True)


def test_a_bucket_that_is_not_there_is_one_line(
    recipe: Path, tmp_path: Path, s3_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.yaml"
    data.write_text(DATA.format(root="s3://nobody-made-it/coco"))
    assert main(["train", str(recipe), f"data={data}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: s3://nobody-made-it/coco: cannot list (")
    assert line.endswith("create the bucket, or correct its name")
