"""`knet store`: what runs take in the store, and what of it need not stay."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from knet_platform.checkpoints import Retention
from knet_platform.errors import UsageError
from knet_platform.home import storage_uri
from knet_platform.planning import load_sweep
from knet_platform.storage import Store, TrialStore
from knet_platform.suggestions import recall
from knet_platform.sweep import Sweep

EXAMPLES = """\
examples:
  knet store du
  knet store du sweeps/stages.yaml --scale laptop
  knet store prune sweeps/stages.yaml --dry-run
  knet store prune sweeps/stages.yaml --json

Of each trial `prune` leaves the newest two checkpoints, those of the best evaluations by the
sweep's metric (resources.keep_best), and the one that its result names. Runs do the same while
they train; what is left to prune is what died runs and changed settings left."""

_UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one trial takes, before anything is deleted."""

    trial: str
    """arm/seed where the sweep is known, the hash otherwise."""
    bytes: int
    checkpoints: int
    superfluous: dict[str, int]
    """Bytes of each checkpoint that need not stay; empty without a sweep to judge by."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    du = actions.add_parser("du", help="show how much each trial takes, the largest first")
    du.add_argument(
        "sweep", nargs="?", type=Path, metavar="SWEEP", help="a sweep file (default: all trials)"
    )
    prune = actions.add_parser("prune", help="delete checkpoints that need not stay")
    prune.add_argument("sweep", type=Path, metavar="SWEEP", help="a sweep file")
    prune.add_argument(
        "--dry-run", action="store_true", help="say what would be deleted, delete nothing"
    )
    for action in (du, prune):
        action.add_argument(
            "overrides", nargs="*", metavar="key=value", help="as given to `knet run`"
        )
        action.add_argument("--scale", metavar="NAME", help="as given to `knet run`")
        action.add_argument("--seeds", type=int, metavar="N", help="as given to `knet run`")
        action.add_argument("--json", action="store_true", help="print the outcome as JSON")


def run(args: argparse.Namespace) -> int:
    """Do what the action says."""
    store = Store(storage_uri())
    usages = list(_usages(store, _sweep(args, store), prune=_prunes(args)))
    usages.sort(key=lambda usage: usage.bytes, reverse=True)
    if args.json:
        print(json.dumps([asdict(usage) for usage in usages], indent=2))
    elif args.action == "du":
        print("\n".join(_lines(usages)) or f"nothing in {store.uri}")
    else:
        print("\n".join(_pruned(usages, dry_run=args.dry_run)))
    return 0


def retention(sweep: Sweep) -> Retention:
    """Return which checkpoints of the sweep's trials stay."""
    metric, best = sweep.metric, sweep.resources.keep_best
    return Retention(metric=metric.name, mode=metric.mode, best=best)


def _prunes(args: argparse.Namespace) -> bool:
    return args.action == "prune" and not args.dry_run


def _sweep(args: argparse.Namespace, store: Store) -> Sweep | None:
    """Return the sweep that is asked about, with what its search has suggested."""
    if args.sweep is None:
        return None
    if not args.sweep.is_file():
        raise UsageError(f"{args.sweep}: no such file; expected a sweep file")
    sweep = load_sweep(args.sweep, scale=args.scale, overrides=args.overrides, seeds=args.seeds)
    return recall(sweep, store)


def _usages(store: Store, sweep: Sweep | None, *, prune: bool) -> Iterator[Usage]:
    if sweep is None:
        for trial_hash in store.hashes():
            yield _usage(trial_hash, store.trial(trial_hash), [])
        return
    for trial in sweep.trials:
        folder = store.trial(trial.hash)
        superfluous = folder.superfluous_checkpoints(retention(sweep))
        usage = _usage(trial.name, folder, superfluous)
        if prune:
            for name in superfluous:
                folder.checkpoints.delete(name)
        if usage.bytes:
            yield usage


def _usage(name: str, folder: TrialStore, superfluous: list[str]) -> Usage:
    sizes = folder.sizes()
    return Usage(
        trial=name,
        bytes=sum(sizes.values()),
        checkpoints=len(folder.checkpoints.names()),
        superfluous={
            checkpoint: sum(
                size for file, size in sizes.items() if file.startswith(f"{checkpoint}/")
            )
            for checkpoint in superfluous
        },
    )


def _lines(usages: list[Usage]) -> Iterator[str]:
    for usage in usages:
        superfluous = sum(usage.superfluous.values())
        rest = f", {_size(superfluous)} of it need not stay" if superfluous else ""
        yield f"{_size(usage.bytes):>9}  {usage.trial}  {usage.checkpoints} checkpoints{rest}"
    if usages:
        yield f"{_size(sum(usage.bytes for usage in usages)):>9}  {len(usages)} trials"


def _pruned(usages: list[Usage], *, dry_run: bool) -> Iterator[str]:
    verb = "would delete" if dry_run else "deleted"
    for usage in usages:
        for name, size in usage.superfluous.items():
            yield f"{verb} {usage.trial} {name} ({_size(size)})"
    total = [size for usage in usages for size in usage.superfluous.values()]
    yield f"{verb} {len(total)} checkpoints, {_size(sum(total))}"


def _size(count: float) -> str:
    exponent = 0
    while count >= 1000 and exponent < len(_UNITS) - 1:
        count, exponent = count / 1000, exponent + 1
    return f"{count:.{min(exponent, 1)}f} {_UNITS[exponent]}"
