"""`knet repro`: run a recorded run again from its commit, its patch and its recipe."""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from knet_core import Recipe
from knet_platform.cli.diff import Comparison, compare, show
from knet_platform.cli.runs import NAMES, RecordedRun, add_sweep_arguments, run_finder
from knet_platform.errors import TrialsFailedError, UsageError
from knet_platform.home import cache_folder
from knet_platform.metrics import MAIN_METRIC
from knet_platform.storage import Store

EXAMPLES = f"""\
examples:
  knet repro 3/0 --sweep sweeps/stages.yaml --scale laptop
  knet repro 3f9c --dry-run
  knet repro 3f9c --tolerance 0.002 --json

Clones the recorded commit from this repository into a temporary folder, applies the recorded
uncommitted changes, and trains the recorded recipe there with its seed, workers and threads.
Your files, store and MLflow runs stay as they are. On CPUs of the same kind the scores are equal
to the last digit; GPUs add numbers in changing order, so state a --tolerance there.

exit codes: 0 every score within the tolerance; 3 not.

{NAMES}"""

_REPOSITORY = Path(__file__).parents[3]
_ARM = "repro"
_FINGERPRINT = """\
import json, sys
from knet_core import Recipe, data_fingerprint
data = Recipe.from_dict(json.load(sys.stdin)).data
if "://" in data.root:  # not in code that is older
    from knet_platform.staging import fingerprint as data_fingerprint
print(data_fingerprint(data))"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """One command of the reproduction."""

    words: tuple[str, ...]
    folder: Path | None = None
    """Where it runs, with that folder's code and nothing of this one."""
    environment: dict[str, str]

    def __str__(self) -> str:
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        command = " ".join([*settings, shlex.join(self.words)])
        return f"(cd {shlex.quote(str(self.folder))} && {command})" if self.folder else command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run", metavar="RUN", help="a finished run")
    add_sweep_arguments(parser)
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        metavar="X",
        help="largest accepted difference of a score, of 1 (default: 0, equal)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")


def run(args: argparse.Namespace) -> int:
    """Run again and compare."""
    if not args.tolerance >= 0:
        raise UsageError(f"--tolerance: got {args.tolerance:g}, expected a number >= 0")
    recorded = run_finder(args)(args.run)
    _require_reproducible(recorded)
    if args.dry_run:
        print("\n".join(_dry_run(recorded)))
        return 0
    with tempfile.TemporaryDirectory(prefix="knet-repro-") as folder:
        again = _run_again(recorded, Path(folder))
        comparison = compare(recorded, again)
    distance = _distance(comparison)
    within = distance is not None and distance <= args.tolerance
    if args.json:
        values = {
            "run": recorded.name,
            "distance": distance,
            "tolerance": args.tolerance,
            "within": within,
            "differences": asdict(comparison),
        }
        print(json.dumps(values, indent=2))
    else:
        show(comparison, "recorded", "again")
        print(_verdict(distance, args.tolerance, within=within))
    return 0 if within else TrialsFailedError.exit_code


def _require_reproducible(recorded: RecordedRun) -> None:
    """Refuse what cannot be run again, before anything is cloned."""
    provenance, name = recorded.provenance, recorded.name
    if provenance.git_sha is None:
        raise UsageError(f"{name}: cannot be run again: {'; '.join(provenance.notes)}")
    try:
        _git("cat-file", "-e", f"{provenance.git_sha}^{{commit}}")
    except (OSError, subprocess.CalledProcessError) as error:
        raise UsageError(
            f"{name}: commit {provenance.git_sha} is not in the repository {_REPOSITORY}; "
            f"expected the one it was run from: git fetch it there"
        ) from error
    if not recorded.is_finished():
        raise UsageError(f"{name}: is not finished, so there is no result to compare with")
    for note in provenance.notes:
        print(f"warning: {name}: {note}", file=sys.stderr)


def _run_again(recorded: RecordedRun, work: Path) -> RecordedRun:
    """Train once more below `work` and return that run."""
    for name, content in _inputs(recorded):
        (work / name).write_bytes(content)
    *preparation, training = _steps(recorded, work)
    for step in preparation:
        done = subprocess.run(step.words, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UsageError(
                f"{recorded.name}: cannot restore the code: {_first_line(done.stderr)} "
                f"({shlex.join(step.words)})"
            )
    environment = _clean_environment() | training.environment
    _require_same_data(recorded, training.folder, environment)
    # Its progress is shown; its result is compared below, and its files are gone in the end.
    code = subprocess.run(
        training.words,
        cwd=training.folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        check=False,
    ).returncode
    if code:
        raise TrialsFailedError(
            f"{recorded.name}: training it again ended with exit code {code}, as said above"
        )
    folder = Store(str(work / "run")).run_folder()
    if recorded.provenance.workers > 1:
        store = Store(str(work / "state" / "storage"))
        (trial_hash,) = store.hashes()
        folder = store.trial(trial_hash)
    provenance = folder.provenance()
    assert provenance is not None, "training records it first"
    return RecordedRun(name="again", folder=folder, provenance=provenance)


def _inputs(recorded: RecordedRun) -> Iterator[tuple[str, bytes]]:
    """Yield the files that the steps read."""
    provenance = recorded.provenance
    yield "recipe.yaml", yaml.safe_dump(_recipe(recorded), sort_keys=False).encode()
    if provenance.patch:
        yield "patch.diff", recorded.patch().encode(errors="surrogateescape")
    if provenance.workers > 1:
        yield "sweep.yaml", yaml.safe_dump(_sweep(recorded), sort_keys=False).encode()


def _recipe(recorded: RecordedRun) -> dict[str, Any]:
    """Return the recipe as it ran in the end: memory may have allowed fewer images at a time."""
    recipe = dict(recorded.provenance.recipe)
    result = recorded.folder.result()
    if result is not None and result.micro_batch is not None:
        recipe["train"] = recipe["train"] | {"micro_batch": result.micro_batch}
    return recipe


def _sweep(recorded: RecordedRun) -> dict[str, Any]:
    """Return a sweep of the one trial, with as many workers as it had."""
    provenance = recorded.provenance
    recipe = Recipe.from_dict(provenance.recipe)
    return {
        "name": _ARM,
        "base": "recipe.yaml",
        "metric": {"name": MAIN_METRIC[recipe.model.task], "mode": "max"},
        "seeds": [recipe.seed],
        "baseline": _ARM,
        "arms": {_ARM: {}},
        "resources": {
            "workers": provenance.workers,
            "gpus_per_worker": 0 if provenance.accelerator is None else 1,
        },
    }


def _steps(recorded: RecordedRun, work: Path) -> list[_Step]:
    provenance = recorded.provenance
    code = work / "code"
    assert provenance.git_sha is not None, "checked before"
    # A clone that borrows this repository's objects: quick, and nothing here is written.
    clone = ("git", "clone", "--quiet", "--shared", "--no-checkout", str(_REPOSITORY), str(code))
    checkout = ("git", "-C", str(code), "checkout", "--quiet", "--detach", provenance.git_sha)
    apply = ("git", "-C", str(code), "apply", "--whitespace=nowarn", str(work / "patch.diff"))
    commands = [clone, checkout, *([apply] if provenance.patch else [])]
    arguments = ["train", str(work / "recipe.yaml"), "--output", str(work / "run")]
    if provenance.workers > 1:
        arguments = ["run", str(work / "sweep.yaml")]
    environment = {
        "PYTHONPATH": os.pathsep.join((str(code), str(code / "platform"))),
        "KNET_HOME": str(work / "state"),
        "KNET_CACHE": str(cache_folder()),
    }
    if provenance.threads is not None:
        environment["OMP_NUM_THREADS"] = str(provenance.threads)
    knet = (sys.executable, "-m", "knet_platform.cli.main")
    training = _Step(words=(*knet, *arguments), folder=code, environment=environment)
    return [*(_Step(words=words, environment={}) for words in commands), training]


def _dry_run(recorded: RecordedRun) -> Iterator[str]:
    work = Path(tempfile.gettempdir()) / f"knet-repro-{recorded.name.replace('/', '-')}"
    yield f"mkdir {shlex.quote(str(work))}"
    for name, content in _inputs(recorded):
        yield f"# {work / name}: {len(content)} bytes, as recorded in {recorded.folder.uri}"
    yield from map(str, _steps(recorded, work))


def _require_same_data(
    recorded: RecordedRun, folder: Path | None, environment: dict[str, str]
) -> None:
    provenance = recorded.provenance
    done = subprocess.run(
        [sys.executable, "-c", _FINGERPRINT],
        input=json.dumps(provenance.recipe),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    root = provenance.recipe["data"]["root"]
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UsageError(f"{recorded.name}: cannot read its data in {root}: {reason}")
    found = done.stdout.strip()
    if found != provenance.data_fingerprint:
        raise UsageError(
            f"{recorded.name}: the data in {root} is not what it was trained on: fingerprint "
            f"{found[:12]}, expected {provenance.data_fingerprint[:12]}; restore the data"
        )


def _clean_environment() -> dict[str, str]:
    """Return this process's environment without what would lead the run elsewhere."""
    ours = ("KNET_", "MLFLOW_", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


def _distance(comparison: Comparison) -> float | None:
    """Return the largest difference of a score; None where one has no counterpart."""
    differences = [difference for _, _, difference in comparison.scores.values()]
    if not differences or None in differences:
        return None
    return max(abs(difference) for difference in differences if difference is not None)


def _verdict(distance: float | None, tolerance: float, *, within: bool) -> str:
    if distance is None:
        return "not reproduced: the two runs have not the same scores"
    if distance == 0:
        return "reproduced: every score is equal to the last digit"
    said = "reproduced" if within else "not reproduced"
    return f"{said}: the largest difference of a score is {distance:.2g}, accepted {tolerance:g}"


def _git(*arguments: str) -> None:
    subprocess.run(["git", "-C", str(_REPOSITORY), *arguments], check=True, capture_output=True)


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[0]
