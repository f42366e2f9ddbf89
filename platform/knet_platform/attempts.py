"""Who may write into a trial's folder.

A run of a sweep claims every trial it is about to start. Workers that a killed run left behind
compare the claim with their own before they write, and stop: two runs never mix in one folder.
A run whose budget is spent tells its trials which of them may go on, and a screen tells those that
did not pass (`TrialStore.write_pruned`).
"""

import json
from collections.abc import Collection

from knet_platform.errors import PlatformError
from knet_platform.storage import Store, TrialStore

_FILE = "attempt.json"
_ALLOWED = "allowed.json"


class SupersededError(PlatformError):
    """Another run of the sweep has taken the trial over."""


def claim(store: TrialStore, run_id: str) -> int:
    """Make the trial belong to `run_id`, and return the number of attempts made so far.

    Raises:
        StorageError: The store cannot be written.
        DiskFullError: It is full.
    """
    attempts = _read(store)[1]
    _write(store, run_id, attempts)
    return attempts


def revoke(store: TrialStore) -> None:
    """Take the trial from its run: it does not begin, and workers under way stop when they report.

    Raises:
        StorageError: The store cannot be written.
        DiskFullError: It is full.
    """
    _write(store, "", _read(store)[1])


def begin(store: TrialStore, run_id: str) -> int:
    """Count one more attempt and return its number, from 1.

    Raises:
        SupersededError: The trial belongs to another run by now.
    """
    attempt = verify(store, run_id) + 1
    _write(store, run_id, attempt)
    return attempt


def count(store: TrialStore) -> int:
    """Return the number of attempts made so far."""
    return _read(store)[1]


def verify(store: TrialStore, run_id: str) -> int:
    """Refuse to go on if the trial belongs to another run; return the attempts made so far.

    Raises:
        SupersededError: It does.
    """
    owner, attempts = _read(store)
    if owner != run_id:
        raise SupersededError(f"{store.uri}: a newer run of the sweep took it over; this one ends")
    return attempts


def allow(store: Store, run_id: str, trials: Collection[str]) -> None:
    """Tell all other trials of this run to save, stop, or not to start."""
    store.run(run_id).write_bytes(_ALLOWED, json.dumps(sorted(trials)).encode())


def may_go_on(store: Store, run_id: str, trial_hash: str) -> bool:
    """Return whether the budget and the screen of its sweep let a trial go on."""
    if is_pruned(store.trial(trial_hash), run_id):
        return False
    run = store.run(run_id)
    return _ALLOWED not in run.list() or trial_hash in json.loads(run.read_bytes(_ALLOWED))


def is_pruned(store: TrialStore, run_id: str) -> bool:
    """Return whether the screen of this run stopped the trial."""
    pruned = store.pruned()
    return pruned is not None and pruned.run == run_id


def _read(store: TrialStore) -> tuple[str, int]:
    found = store.read_json(_FILE, lambda values: (str(values["run"]), int(values["attempt"])))
    return found or ("", 0)


def _write(store: TrialStore, run_id: str, attempt: int) -> None:
    store.write_bytes(_FILE, json.dumps({"run": run_id, "attempt": attempt}).encode())
