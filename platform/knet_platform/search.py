"""An open-ended search of a sweep: the values it may set, and the runs at the ends of its space.

What it suggests and what became of that is another matter (`suggestions`, `searching`).
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from knet_core import ConfigError, Recipe
from knet_platform.config import Layer, collecting, mapping_layers, resolve
from knet_platform.identity import same_run

Kind = Literal["uniform", "log_uniform", "integer", "choice"]

_EXPECTED = "{uniform: [low, high]}, {log_uniform: ...}, {integer: ...} or {choice: [a, b]}"
_DIGITS = 4
"""Significant ones of a fraction that is set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimension:
    """The values that one key may take."""

    kind: Kind
    values: tuple[Any, ...]
    """Lowest and highest value, both possible; of a choice, all of them."""

    @property
    def longest(self) -> Any:
        """Return a value that takes no fewer characters than any other."""
        if self.kind in ("uniform", "log_uniform"):
            return -1.234e-100
        return max(self.values, key=lambda value: len(str(value)))

    def settle(self, value: Any) -> Any:
        """Return a suggested value as it is set.

        A fraction keeps four significant digits: the name of its arm says all of it, and what
        another machine's logarithm makes of the last digit is not another trial.
        """
        if self.kind not in ("uniform", "log_uniform"):
            return value
        low, high = self.values
        return min(max(float(f"{value:.{_DIGITS}g}"), low), high)


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpec:
    """An open-ended search by optuna's tree-structured Parzen estimator."""

    trials: int
    """Suggestions to make, each an arm of the sweep; two that are equal are one arm."""
    seed: int = 0
    """Of the suggestions."""
    space: Mapping[str, Dimension]
    """By key of the recipe."""


SPEC_KEYS = ("name", *(item.name for item in dataclasses.fields(SearchSpec)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """A search with what its suggestions are set on, and those made so far."""

    spec: SearchSpec
    path: Path
    """The sweep file."""
    below: tuple[Layer, ...]
    """What a suggestion is set on: the sweep's recipe at its scale."""
    above: tuple[Layer, ...]
    """What wins over it: the command line."""
    id: str = ""
    """16 hex digits, of all that suggestions follow from but their number."""
    ends: Mapping[str, Recipe] = dataclasses.field(default_factory=dict)
    """Runs at the ends of the space, one key at a time, by the name that such an arm would have.
    They are no arms; a suggestion still to come costs about as much as they do."""
    suggested: tuple[Mapping[str, Any], ...] = ()
    """Settings, oldest first."""

    @property
    def to_come(self) -> int:
        """Return how many suggestions it will still make."""
        return max(0, self.spec.trials - len(self.suggested))

    def closed(self) -> "Search":
        """Return the search with nothing to come."""
        spec = dataclasses.replace(self.spec, trials=len(self.suggested))
        return dataclasses.replace(self, spec=spec)

    def key_problems(self) -> list[str]:
        """Return what is wrong with the keys that it varies."""
        problems: list[str] = []
        with collecting(problems):
            self._layers({key: item.values[0] for key, item in self.spec.space.items()})
        problems += [
            f"{layer.source}: {key}: is what search.space varies; leave it out"
            for layer in self.above
            for key in layer.values
            if key in self.spec.space
        ]
        if "seed" in self.spec.space:
            problems.append(f"{self._source}: seed: every arm runs with the seeds of the sweep")
        return problems

    def resolve(
        self, settings: Mapping[str, Any], *, built: dict[str, Any] | None = None
    ) -> Recipe:
        """Return the recipe of a suggestion.

        Args:
            settings: What it sets.
            built: As `config.resolve` takes it.

        Raises:
            ConfigError: Values that cannot be trained with, all of them.
        """
        layers = (*self.below, *self._layers(settings), *self.above)
        recipe = resolve(layers, built=built)
        with collecting(problems := list[str](), prefix=f"{self._source}: "):
            same_run(recipe)
        if problems:
            raise ConfigError(problems)
        return recipe

    @property
    def _source(self) -> str:
        return f"{self.path}: search.space"

    def _layers(self, settings: Mapping[str, Any]) -> tuple[Layer, ...]:
        return mapping_layers(self._source, settings, folder=self.path.parent)


def dimension_problem(stated: Any) -> str | None:
    """Return what is wrong with a dimension as it stands in a file; None if nothing is."""
    if not isinstance(stated, dict) or len(stated) != 1 or not stated.keys() <= {*get_args(Kind)}:
        return f"expected {_EXPECTED}, got {stated!r}"
    ((kind, values),) = stated.items()
    if not isinstance(values, list):
        return f"expected a list of values, got {values!r}"
    if kind == "choice":
        plain = all(isinstance(value, str | int | float) for value in values)
        distinct = len({(type(value), value) for value in values}) == len(values) if plain else 0
        return None if distinct and len(values) > 1 else (
            f"expected different texts, numbers, true or false, at least two, got {values!r}"
        )  # fmt: skip
    allowed = int if kind == "integer" else int | float
    good = all(isinstance(v, allowed) and type(v) is not bool and math.isfinite(v) for v in values)
    if not good or len(values) != 2 or values[0] >= values[1]:
        what = "integers" if kind == "integer" else "numbers"
        return f"expected [low, high], two {what}, got {values!r}"
    if kind == "log_uniform" and values[0] <= 0:
        return f"expected a low end > 0, got {values[0]!r}"
    return None


def read_dimension(stated: Mapping[str, Any]) -> Dimension:
    """Return a dimension without problems."""
    ((kind, values),) = stated.items()
    return Dimension(kind=cast(Kind, kind), values=tuple(values))


def ends(space: Mapping[str, Dimension]) -> list[dict[str, Any]]:
    """Return settings that take every key to each of its ends, or choices, one key at a time."""
    return [{key: value} for key, dimension in space.items() for value in dimension.values]


def arm_name(settings: Mapping[str, Any]) -> str:
    """Return the name of an arm that a grid or a search makes."""
    return ",".join(f"{key}={shown(value)}" for key, value in settings.items())


def shown(value: Any) -> str:
    """Return a value as it stands in an arm's name."""
    return str(value).lower() if isinstance(value, bool) else str(value)
