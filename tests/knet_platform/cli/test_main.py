"""The command finds its verb cheaply and turns errors into lines and exit codes."""

import os
import subprocess
import sys
from types import ModuleType

import pytest

from knet_core import ConfigError, DataError
from knet_platform.cli.main import VERBS, main

HEAVY = ("torch", "ray", "mlflow", "omegaconf", "rich", "pyarrow", "yaml")


@pytest.fixture
def verb(monkeypatch):
    """Return a function that puts a verb's module in the place of `plan`."""

    def replace(run) -> None:
        module = ModuleType("knet_platform.cli.plan")

        def add_arguments(parser):
            parser.add_argument("sweep")
            parser.add_argument("overrides", nargs="*")
            parser.add_argument("--scale")

        module.EXAMPLES = "examples:\n  knet plan x"
        module.add_arguments = add_arguments
        module.run = run
        monkeypatch.setitem(sys.modules, "knet_platform.cli.plan", module)

    return replace


def failing(error: BaseException):
    def run(args):
        raise error

    return run


def test_help_names_every_verb(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text for verb in VERBS)


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from knet_platform.cli.main import main; main(['--help']); "
        f"loaded = [name for name in {HEAVY} if name in sys.modules]; sys.exit(str(loaded))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"


def test_no_verb_is_a_usage_error():
    assert main([]) == 2


def test_an_unknown_verb_names_the_nearest(capsys):
    assert main(["paln"]) == 2
    assert "no verb 'paln'; did you mean 'plan'?" in capsys.readouterr().err


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("knet 0.")


@pytest.mark.parametrize(
    ("argv", "overrides"),
    [
        (["s.yaml", "--scale", "laptop", "a=1", "b=-2"], ["a=1", "b=-2"]),
        (["s.yaml", "a=1", "--scale", "laptop", "b=2"], ["a=1", "b=2"]),
        (["--scale", "laptop", "s.yaml", "a=1"], ["a=1"]),
    ],
)
def test_overrides_may_stand_on_either_side_of_options(verb, argv, overrides):
    seen = []
    verb(lambda args: seen.append(args) or 0)
    assert main(["plan", *argv]) == 0
    assert (seen[0].sweep, seen[0].scale, seen[0].overrides) == ("s.yaml", "laptop", overrides)


@pytest.mark.parametrize("extra", ["--sale", "word"])
def test_unknown_arguments_are_a_usage_error(verb, capsys, extra):
    verb(lambda args: 0)
    assert main(["plan", "s.yaml", "--scale", "laptop", extra]) == 2
    assert f"unrecognized arguments: {extra}" in capsys.readouterr().err


def test_each_problem_is_one_line_and_the_class_gives_the_code(verb, capsys):
    verb(failing(ConfigError(["a: wrong", "b: wrong too"])))
    assert main(["plan", "s.yaml"]) == 2
    assert capsys.readouterr().err == "error: a: wrong\nerror: b: wrong too\n"
    verb(failing(DataError("no image")))
    assert main(["plan", "s.yaml"]) == 5


def test_an_interrupt_by_the_user_is_130(verb):
    verb(failing(KeyboardInterrupt()))
    assert main(["plan", "s.yaml"]) == 130


def test_a_bug_keeps_its_traceback(verb):
    verb(failing(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main(["plan", "s.yaml"])


def test_a_reader_that_goes_away_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "knet_platform.cli.main", "--help"],
        stdout=writer, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
