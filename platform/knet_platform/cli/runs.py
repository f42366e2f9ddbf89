"""Finds a recorded run by any name people have for it."""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from knet_core import Recipe
from knet_platform.config import suggestion
from knet_platform.errors import UsageError
from knet_platform.home import knet_home, storage_uri, tracking_uri
from knet_platform.pace import num_iterations
from knet_platform.planning import load_sweep
from knet_platform.provenance import Provenance
from knet_platform.storage import Store, TrialStore
from knet_platform.suggestions import recall

NAMES = """\
A run is named by its trial hash or the beginning of one, by arm/seed together with --sweep, by its
MLflow run id, or by the folder that `knet train` wrote."""

_SHORTEST_HASH = 4
_MLFLOW_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRun:
    """A run with what is known of how it was made and how it ended."""

    name: str
    folder: TrialStore
    provenance: Provenance

    def metrics(self) -> dict[str, float]:
        """Return the final values of a finished run, the latest ones of another."""
        if result := self.folder.result():
            return result.metrics
        state = self.folder.state()
        return dict(state.metrics) if state else {}

    def is_finished(self) -> bool:
        """Whether the metrics are those of the end."""
        if self.folder.result():
            return True
        state = self.folder.state()
        if state is None:
            return False
        return state.step == num_iterations(Recipe.from_dict(self.provenance.recipe))

    def patch(self) -> str:
        """Return the uncommitted changes of the code; empty if there were none."""
        if not self.provenance.patch:
            return ""
        return self.folder.read_bytes("patch.diff").decode(errors="surrogateescape")


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that give arm/seed a meaning."""
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="as given to `knet run`, with --sweep"
    )
    parser.add_argument("--sweep", type=Path, help="the sweep file in which a run is arm/seed")
    parser.add_argument("--scale", metavar="NAME", help="as given to `knet run`")
    parser.add_argument("--seeds", type=int, metavar="N", help="as given to `knet run`")


def run_finder(args: argparse.Namespace) -> Callable[[str], RecordedRun]:
    """Return the search for runs by name, in the store in use and in the sweep of `args`."""
    named: dict[str, str] = {}
    if args.sweep is not None:
        sweep = load_sweep(
            args.sweep, scale=args.scale, overrides=args.overrides, seeds=args.seeds
        )
        recalled = recall(sweep, Store(storage_uri()))
        named = {trial.name: trial.hash for trial in recalled.trials}
    elif args.overrides or args.scale is not None or args.seeds is not None:
        raise UsageError(
            "--sweep: not set, so key=value, --scale and --seeds say nothing; expected the sweep "
            "file that they were given with, or leave them out"
        )
    return lambda name: find_run(name, named)


def find_run(name: str, named: dict[str, str]) -> RecordedRun:
    """Return the run that `name` stands for.

    Args:
        name: See `NAMES`.
        named: Hashes by arm/seed.

    Raises:
        UsageError: There is none, or several, or it was never started or recorded.
    """
    folder = _find_folder(name, named)
    provenance = folder.provenance()
    if provenance is None:
        reason = "was made before provenance was recorded" if folder.list() else "has not started"
        raise UsageError(f"{name}: {reason}, nothing is known of how it was made ({folder.uri})")
    return RecordedRun(name=name, folder=folder, provenance=provenance)


def _find_folder(name: str, named: dict[str, str]) -> TrialStore:
    if name in named:
        return Store(storage_uri()).trial(named[name])
    if Path(name).is_dir():
        return Store(name).run_folder()
    folders = _folders()
    wanted = _hash_in_mlflow(name) if _MLFLOW_ID.fullmatch(name) else name
    found = [item for item in folders if item.startswith(wanted)]
    if len(wanted) < _SHORTEST_HASH or not found:
        near = suggestion(name, [*named, *folders])
        hint = "" if "/" not in name or named else "; arm/seed needs --sweep FILE"
        raise UsageError(
            f"{name}: no run of that name among {len(folders)} in {storage_uri()} and "
            f"{_train_runs()}{near or hint}"
        )
    if len(found) > 1:
        raise UsageError(f"{name}: begins {len(found)} hashes: {', '.join(found[:4])}; add digits")
    return folders[found[0]]


def _folders() -> dict[str, TrialStore]:
    """Return the folders of all runs by their hash; a sweep's trial comes before its like."""
    store = Store(storage_uri())
    runs = Store(str(_train_runs())).run_folder().list()
    folders = {name: Store(str(_train_runs() / name)).run_folder() for name in runs}
    return folders | {name: store.trial(name) for name in store.hashes()}


def _train_runs() -> Path:
    return knet_home() / "runs"


def _hash_in_mlflow(run_id: str) -> str:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    uri = tracking_uri()
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise UsageError(f"{run_id}: no MLflow store at {uri}; set MLFLOW_TRACKING_URI")
    try:
        tags = MlflowClient(uri).get_run(run_id).data.tags
    except MlflowException as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{run_id}: {reason}; expected the id of a trial's MLflow run") from error
    if "trial_hash" not in tags:
        raise UsageError(f"{run_id}: is the MLflow run of a sweep; expected one of its trials")
    return str(tags["trial_hash"])
