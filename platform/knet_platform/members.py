"""Which trials of a sweep are the members of its population, and what they may be."""

import dataclasses
from collections.abc import Mapping, Sequence

from knet_core import Recipe
from knet_platform.identity import digest, same_run
from knet_platform.search import Search
from knet_platform.sweep import Sweep, Trial
from knet_platform.sweep_file import Pbt


def members(sweep: Sweep) -> tuple[Trial, ...]:
    """Return the trials of the sweep's population: the baseline trains by itself."""
    return tuple(trial for trial in sweep.distinct_trials if trial.arm != sweep.baseline)


def with_members(sweep: Sweep, population: Pbt) -> Sweep:
    """Return the sweep with members under hashes of their own: what they become depends on all.

    Still it follows from what is hashed, as a recipe's result does.
    """
    everyone = sorted({trial.hash for trial in sweep.trials if trial.arm != sweep.baseline})
    settings = [dataclasses.asdict(population), dataclasses.asdict(sweep.metric)]
    trials = tuple(
        trial
        if trial.arm == sweep.baseline
        else dataclasses.replace(trial, hash=digest(trial.hash, everyone, settings))
        for trial in sweep.trials
    )
    return dataclasses.replace(sweep, trials=trials)


def population_problems(
    recipes: Mapping[str, Recipe], baseline: str, seeds: Sequence[int], search: Search | None
) -> list[str]:
    """Return what keeps the arms from taking over each other's checkpoints."""
    alike = {
        arm: dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, lr=1.0))
        for arm, recipe in recipes.items()
        if arm != baseline
    }
    first = next(iter(alike), "")
    problems = [
        f"arm {arm} differs from {first} in more than optim.lr; members copy each other's "
        f"checkpoints, so that is all they may start with of their own"
        for arm, recipe in alike.items()
        if same_run(recipe) != same_run(alike[first])
    ]
    if len(alike) < 2:
        problems.append(f"expected at least two arms beside the baseline, got {len(alike)}")
    if any(recipe.optim.rescale_at for recipe in alike.values()):
        problems.append("optim.rescale_at is what it looks for; leave it out")
    if len(seeds) > 1:
        problems.append(
            "expected one seed (--seeds 1): each population finds schedules of its own; run those "
            "found (schedule.yaml of each trial, as base: of an arm) with several"
        )
    if search is not None:
        problems.append("expected no search: beside it; list the members under arms: or grid:")
    return problems


def population_note(population: Pbt) -> str:
    """Return what a reader of plan and table should know."""
    return (
        f"pbt trains all arms but the baseline in step; every {population.evaluations} "
        f"evaluation(s) the worst {population.quantile:.0%} go on from a best one's checkpoint "
        f"with its learning rate x or / {population.factor:g}: an arm names how a member began, "
        f"and the best of many owes some of it to chance: confirm its schedule with other seeds"
    )
