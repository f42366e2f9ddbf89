"""What can have no effect, or is of another kind, is one line and exit code 2."""

from pathlib import Path

import pytest

from knet_platform.cli.main import main
from knet_platform.home import knet_home


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("train {sweep}", "{sweep}: is a sweep, for knet run; expected a recipe"),
        ("bench {sweep}", "{sweep}: is a sweep, for knet run; expected a recipe"),
        ("plan {recipe}", "{recipe}: is a recipe, for knet train; expected a sweep"),
        ("data check {recipe}", "{recipe}: is a recipe, for knet train; expected a data set's"),
        (
            "train {recipe} data={sweep}",
            "{sweep}: is a sweep, for knet run; expected a data set's",
        ),
        ("train {recipe} --scale lapto", "--scale: no scale 'lapto' in "),
        ("train {recipe} --scale=", "--scale: no scale '' in "),
        ("train {recipe} --scale {odd}", "{odd}: recpie: unknown key; did you mean 'recipe'?"),
        (
            "train {recipe} train.epochs=3",
            "train.epochs: nothing reads it with train.iterations",
        ),
        ("train {recipe} --output {recipe}", "expected a folder of yours: set --output to one"),
        ("plan {sweep} --instances 0", "--instances: got 0, expected at least 1"),
        ("report {sweep} --port 5", "--port: is where --serve listens; add --serve"),
        ("diff a b model.stages=2", "--sweep: not set, so key=value, --scale and --seeds say"),
        ("repro a --tolerance -1", "--tolerance: got -1, expected a number >= 0"),
        ("data check {set} optim.lr=1", "optim.lr=1: says nothing of a data set; expected data.*"),
        ("train {recipe} eval.flip=true", "eval.flip: only semantic models are averaged over"),
        (
            "train {recipe} model.backbone.output_stride=8",
            "model.backbone.output_stride: must be 32 for model.task=instance",
        ),
    ],
)
def test_it_is_said_before_anything_begins(
    words: str,
    expected: str,
    recipe: Path,
    width_sweep: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "odd.yaml").write_text("recpie: {}\n")
    (tmp_path / "set.yaml").write_text("root: set\n")
    names = {"recipe": recipe, "sweep": width_sweep}
    names |= {"odd": tmp_path / "odd.yaml", "set": tmp_path / "set.yaml"}
    assert main(words.format(**names).split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected.format(**names) in line
    assert not (knet_home() / "runs").exists()
