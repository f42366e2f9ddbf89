"""A sweep as every other module sees it: checked, expanded, frozen."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knet_core import Recipe
from knet_platform.search import Search
from knet_platform.sweep_file import Asha, Budget, Metric, Paper, Pbt, Resources


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One arm with one seed."""

    sweep: str
    arm: str
    seed: int
    overrides: dict[str, Any]
    """What the arm sets, as dotted keys, and as `base` the recipe that it names."""
    recipe: Recipe
    hash: str
    """16 hex digits."""

    @property
    def name(self) -> str:
        """Return `arm/seed`, the name of the MLflow run."""
        return f"{self.arm}/{self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """A sweep file, checked and expanded."""

    name: str
    path: Path
    title: str
    """First comment line of the file."""
    metric: Metric
    baseline: str
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    paper: Paper | None
    resources: Resources
    budget: Budget
    scheduler: Asha | None = None
    """Screens the arms with the first seed; None: all run in full."""
    population: Pbt | None = None
    """All arms but the baseline train as one; None: each by itself."""
    search: Search | None = None
    """Adds arms, judged by the first seed."""
    trials: tuple[Trial, ...]
    """Seed by seed, so that an interrupted sweep has compared every arm at least once early."""
    notes: tuple[str, ...] = ()
    """What a reader of the plan or of the table should know."""

    @property
    def distinct_trials(self) -> tuple[Trial, ...]:
        """Return the trials to train: of equal ones the baseline's, else the first."""
        chosen: dict[str, Trial] = {}
        for trial in self.trials:
            if trial.hash not in chosen or trial.arm == self.baseline:
                chosen[trial.hash] = trial
        return tuple(chosen.values())

    @property
    def by_priority(self) -> tuple[Trial, ...]:
        """Return the trials to train, most important first: seed by seed, the baseline first.

        Every other arm is compared with the baseline of its seed.
        """
        arms = {arm: (arm != self.baseline, index) for index, arm in enumerate(self.arms)}
        seeds = {seed: index for index, seed in enumerate(self.seeds)}
        return tuple(sorted(self.distinct_trials, key=lambda t: (seeds[t.seed], arms[t.arm])))

    @property
    def num_trials(self) -> int:
        """Return how many trials are trained in all, counting those that are not known yet."""
        to_come = self.search.to_come if self.search else 0
        return len(self.distinct_trials) + to_come * len(self.seeds)
