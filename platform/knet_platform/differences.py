"""What really distinguishes the arms: the keys of their resolved recipes that differ."""

import json
from dataclasses import dataclass

from knet_platform.config import flatten
from knet_platform.sweep import Sweep


@dataclass(frozen=True, slots=True, kw_only=True)
class Differences:
    """Effective values, by arm, of every key that differs between arms."""

    keys: tuple[str, ...]
    """Dotted, in the recipe's order."""
    values: dict[str, tuple[str, ...]]
    """By arm, one for each key, as JSON; empty where an arm has no such key."""


def differences(sweep: Sweep) -> Differences:
    """Compare the resolved recipes of all arms; the seed is no difference."""
    recipes = {
        trial.arm: {key: json.dumps(value) for key, value in flatten(trial.recipe.to_dict())}
        for trial in sweep.trials
    }
    every = dict.fromkeys(key for values in recipes.values() for key in values)
    keys = tuple(
        key
        for key in every
        if key != "seed" and len({recipe.get(key, "") for recipe in recipes.values()}) > 1
    )
    return Differences(
        keys=keys,
        values={arm: tuple(recipes[arm].get(key, "") for key in keys) for arm in sweep.arms},
    )
