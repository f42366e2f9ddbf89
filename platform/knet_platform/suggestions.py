"""What a search has suggested: kept in the store, and turned into arms like those of the file.

So every command sees the same arms, a suggestion has the identity that the same settings have
anywhere, and a search that was ended goes on where it was. Needs neither Ray nor optuna.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from knet_core import ConfigError, Recipe
from knet_platform.errors import StorageError
from knet_platform.planning import make_trials, worker_problems
from knet_platform.search import arm_name
from knet_platform.storage import Store
from knet_platform.sweep import Sweep

_FILE = "suggestions.json"


def recall(sweep: Sweep, store: Store) -> Sweep:
    """Return the sweep with the suggestions of earlier runs as arms, if it searches.

    Raises:
        StorageError: The record cannot be read.
    """
    if sweep.search is None:
        return sweep
    folder = store.search(sweep.search.id)
    if _FILE not in folder.list():
        return sweep
    try:
        suggested = json.loads(folder.read_bytes(_FILE))
    except ValueError as error:
        raise StorageError(
            f"{folder.uri}/{_FILE}: not valid JSON; delete it to search anew (trials that "
            f"finished are still found by their hashes)"
        ) from error
    return with_suggestions(sweep, suggested[: sweep.search.spec.trials])


def record(sweep: Sweep, store: Store) -> None:
    """Keep what the sweep's search has suggested so far.

    Raises:
        StorageError: The store cannot be written.
        DiskFullError: It is full.
    """
    assert sweep.search is not None, "only a search suggests"
    content = json.dumps([dict(settings) for settings in sweep.search.suggested], indent=1)
    store.search(sweep.search.id).write_bytes(_FILE, content.encode())


def with_suggestions(sweep: Sweep, suggested: Sequence[Mapping[str, Any]]) -> Sweep:
    """Return the sweep with further arms.

    A suggestion that equals an arm adds none; one that cannot be trained adds a note.
    """
    search = sweep.search
    assert search is not None, "only a search suggests"
    recipes: dict[str, Recipe] = {}
    notes: list[str] = []
    built: dict[str, Any] = {}
    for settings in suggested:
        name = arm_name(settings)
        if name in sweep.arms or name in recipes:
            continue
        try:
            recipe = search.resolve(settings, built=built)
            problems = worker_problems(name, recipe, sweep.resources)
        except ConfigError as error:
            problems = [f"{name}: {problem}" for problem in error.problems]
        if problems:
            notes.append(f"suggested but not possible: {'; '.join(problems)}")
        else:
            recipes[name] = recipe
    named = {arm_name(settings): settings for settings in suggested}
    trials = [*sweep.trials, *make_trials(sweep.name, recipes, named, sweep.seeds)]
    return dataclasses.replace(
        sweep,
        arms=(*sweep.arms, *recipes),
        trials=tuple(sorted(trials, key=lambda trial: sweep.seeds.index(trial.seed))),
        notes=(*sweep.notes, *notes),
        search=dataclasses.replace(search, suggested=(*search.suggested, *suggested)),
    )
