"""An open-ended search while it runs: asks optuna what to try next, and hands that to Tune.

Nothing of it must outlive the process. Each suggestion is made by a fresh sampler from the seed,
its number and what the store knows of those before it; so a search that was ended continues with
the suggestion that it would have made.
"""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
import ray.tune
from ray.tune.search.optuna import OptunaSearch

from knet_platform.queueing import Queue
from knet_platform.screening import screened_out
from knet_platform.search import Dimension, SearchSpec, arm_name
from knet_platform.storage import Store
from knet_platform.suggestions import record, with_suggestions
from knet_platform.sweep import Sweep, Trial

_VALUE = "value"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What is known of a suggestion."""

    settings: Mapping[str, Any]
    value: float | None
    """Of the sweep's metric; None while it runs."""
    curve: tuple[float, ...] = ()
    """Of one that a screen stopped: its values so far, the last one being `value`."""


def propose(spec: SearchSpec, mode: str, points: Sequence[Point], number: int) -> dict[str, Any]:
    """Return the settings to try next.

    Args:
        spec: The search.
        mode: `min` or `max`, what is better.
        points: What earlier suggestions led to, oldest first; failures left out.
        number: Of this suggestion, from 0.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    domains = {key: _domain(dimension) for key, dimension in spec.space.items()}
    running = [dict(point.settings) for point in points if point.value is None]
    # Those that run count as poor, so that no two workers try the same.
    sampler = optuna.samplers.TPESampler(
        seed=zlib.crc32(f"{spec.seed} {number}".encode()), constant_liar=True
    )
    search = OptunaSearch(
        OptunaSearch.convert_search_space(domains),
        metric=_VALUE,
        mode=mode,
        sampler=sampler,
        points_to_evaluate=running,
    )
    for point in points:
        if point.value is not None:
            search.add_evaluated_point(
                dict(point.settings),
                point.value,
                pruned=bool(point.curve),
                intermediate_values=list(point.curve),
            )
    for position in range(len(running)):  # takes them from the queue: they run
        search.suggest(f"running {position}")
    proposed = search.suggest("next")
    assert proposed is not None, "optuna always has an answer"
    return {key: spec.space[key].settle(proposed[key]) for key in spec.space}


def _domain(dimension: Dimension) -> Any:
    if dimension.kind == "choice":
        return ray.tune.choice(list(dimension.values))
    low, high = dimension.values
    if dimension.kind == "integer":
        return ray.tune.randint(low, high + 1)
    return (ray.tune.loguniform if dimension.kind == "log_uniform" else ray.tune.uniform)(
        low, high
    )


class Suggester(Queue):
    """Hands Tune the trials of a search: known ones without a result first, then new ones."""

    def __init__(
        self,
        sweep: Sweep,
        todo: Sequence[Trial],
        store: Store,
        *,
        start: Callable[[Trial], dict[str, Any]],
        reuse: Callable[[Trial], None],
        may_suggest: Callable[[], bool],
    ) -> None:
        """Begin with `todo`.

        Args:
            sweep: What is searched, with what was suggested before.
            todo: Its known trials that are still to run, of the first seed.
            store: Where results are, and suggestions go.
            start: Makes a trial ready to run and returns its configuration for Tune.
            reuse: Told of suggestions that had a result before.
            may_suggest: Whether there is money for further suggestions.
        """
        super().__init__(todo, start)
        self.sweep = sweep
        """Grows with every suggestion."""
        self._store = store
        self._reuse = reuse
        self._may_suggest = may_suggest
        self._known: dict[str, Point | None] = {}
        """By trial hash; None for failures."""

    def further(self) -> Trial | None:
        """Return a new suggestion's trial; None when the search is over."""
        while (search := self.sweep.search) and search.to_come and self._may_suggest():
            points = [point for item in search.suggested if (point := self._point(item))]
            number = len(search.suggested)
            settings = propose(search.spec, self.sweep.metric.mode, points, number)
            before = {trial.hash for trial in self.sweep.trials}
            self.sweep = with_suggestions(self.sweep, [settings])
            record(self.sweep, self._store)
            trial = self._trial(settings)
            if trial is None or trial.hash in before:
                continue
            if self._store.trial(trial.hash).status() != "finished":
                return trial
            self._reuse(trial)
        return None

    def _trial(self, settings: Mapping[str, Any]) -> Trial | None:
        """Return what judges a suggestion; None where it cannot be trained."""
        name, seed = arm_name(settings), self.sweep.seeds[0]
        return next((t for t in self.sweep.trials if (t.arm, t.seed) == (name, seed)), None)

    def _point(self, settings: Mapping[str, Any]) -> Point | None:
        trial = self._trial(settings)
        if trial is None:
            return None
        if any(trial.hash == other.hash for other in self.running.values()):
            return Point(settings=settings, value=None)
        if trial.hash not in self._known:
            self._known[trial.hash] = read_point(self.sweep, self._store, trial, settings)
        return self._known[trial.hash]


def read_point(
    sweep: Sweep, store: Store, trial: Trial, settings: Mapping[str, Any]
) -> Point | None:
    """Return what came of a suggestion; None where that says nothing of its value."""
    name, folder = sweep.metric.name, store.trial(trial.hash)
    result = folder.result()
    curve: tuple[float, ...] = ()
    if result is not None:
        value = result.metrics.get(name, math.nan)
    elif screened_out(sweep, store, trial) and (state := folder.state()):
        values = (point.metrics.get(name, math.nan) for point in state.evaluations)
        curve = tuple(value for value in values if math.isfinite(value))
        value = curve[-1] if curve else math.nan
    else:
        return None
    return Point(settings=settings, value=value, curve=curve) if math.isfinite(value) else None
