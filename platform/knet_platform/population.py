"""`scheduler: pbt`: arms that differ in learning rate train in step, and the worst copy the best.

Population based training (Jaderberg et al., arXiv:1711.09846). After every round each of the worst
members takes over the checkpoint of one of the best, and that one's schedule with another factor
from there on. Nothing depends on who was faster: a round is over when all have come to its
evaluation. What a member has followed is a recipe (`optim.rescale_at`), and trained from the
beginning that gives the member's result. Needs no Ray.
"""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from knet_core import Recipe
from knet_platform.errors import StorageError
from knet_platform.identity import digest
from knet_platform.members import members
from knet_platform.storage import SCHEDULE, Store
from knet_platform.sweep import Sweep, Trial
from knet_platform.sweep_file import Pbt

_FILE = "rounds.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """What one member took over."""

    member: str
    """Its trial's hash."""
    source: str
    """That of the member that it copied."""
    step: int
    """Of the copied checkpoint."""
    factor: float
    """Of its learning rate from there on, compared with the copied member's."""


class Population:
    """The members of a sweep, as the store knows them."""

    def __init__(self, sweep: Sweep, store: Store) -> None:
        """Read the rounds that are over.

        Raises:
            StorageError: Their record cannot be read.
        """
        assert sweep.population is not None, "only a sweep with a population has members"
        self._pbt: Pbt = sweep.population
        self._metric = sweep.metric
        self._store = store
        self.members = {trial.hash: trial for trial in members(sweep)}
        self._id = digest(sorted(self.members))
        self._folder = store.population(self._id)
        self._rounds = self._read()

    @property
    def evaluations(self) -> int:
        """Return after how many evaluations of each member the round under way is over."""
        return self._pbt.evaluations * (len(self._rounds) + 1)

    def recipes(self) -> dict[str, Recipe]:
        """Return what every member follows by now, by hash."""
        found = {trial_hash: trial.recipe for trial_hash, trial in self.members.items()}
        for copies in self._rounds:
            found |= {copy.member: _rescaled(found[copy.source], copy) for copy in copies}
        return found

    def notes(self) -> list[str]:
        """Return one line about every member that has copied another."""
        notes = []
        for trial_hash, trial in self.members.items():
            copies = [c for copies in self._rounds for c in copies if c.member == trial_hash]
            if copies:
                taken = ", ".join(
                    f"{self.members[copy.source].arm} at step {copy.step} (its rate x "
                    f"{copy.factor:.4g})"
                    for copy in copies
                )
                notes.append(
                    f"{trial.arm} went on from {taken}; its schedule from the beginning is "
                    f"{self._store.trial(trial_hash).uri}/{SCHEDULE}"
                )
        return notes

    def waiting(self) -> list[Trial]:
        """Return the members that have not come to the end of the round under way."""
        return [trial for trial in self.members.values() if not self._has_come(trial.hash)]

    def spread(self) -> None:
        """Carry out the copies of the last round; what was carried out before stays as it is.

        Raises:
            StorageError: The store refused.
            CheckpointError: What should be copied is damaged.
        """
        for copy in self._rounds[-1] if self._rounds else ():
            member, source = self._store.trial(copy.member), self._store.trial(copy.source)
            if member.latest_step() > copy.step or member.status() == "failed":
                continue
            member.checkpoints.take_over(f"checkpoint_{copy.step}", source.checkpoints)

    def judge(self) -> Sequence[Copy] | None:
        """End the round under way and return the copies; None if that cannot be.

        That is where members are not there yet, all are finished, or all have failed. A member
        that failed, or measured nothing, is neither copied nor replaced; one that is no worse than
        the best keeps its own.

        Raises:
            StorageError: The store cannot be read or written.
            DiskFullError: It is full.
        """
        standing: list[tuple[float, str, int]] = []
        folders = {trial_hash: self._store.trial(trial_hash) for trial_hash in self.members}
        going = {h: folder for h, folder in folders.items() if folder.status() != "failed"}
        for trial_hash, folder in going.items():
            state = folder.state()
            if state is None or folder.result() or not self._has_come(trial_hash):
                return None
            value = state.evaluations[-1].metrics.get(self._metric.name, math.nan)
            if math.isfinite(value):
                standing.append((value, trial_hash, state.step))
        if not going:
            return None
        standing.sort(reverse=self._metric.mode == "max")
        count = min(len(standing) // 2, max(1, round(len(standing) * self._pbt.quantile)))
        chance = random.Random(f"{self._id} {self._pbt.seed} {len(self._rounds)}")
        copies: list[Copy] = []
        for value, member, step in standing[len(standing) - count :]:
            better = [source for best, source, _ in standing[:count] if best != value]
            if better:
                source = chance.choice(better)
                factor = chance.choice((self._pbt.factor, 1 / self._pbt.factor))
                copies.append(Copy(member=member, source=source, step=step, factor=factor))
        self._rounds.append(copies)
        content = [[asdict(copy) for copy in copies] for copies in self._rounds]
        self._folder.write_bytes(_FILE, json.dumps(content, indent=1).encode())
        return copies

    def _has_come(self, trial_hash: str) -> bool:
        folder = self._store.trial(trial_hash)
        if folder.status() == "finished":
            return True
        state = folder.state()
        return state is not None and len(state.evaluations) >= self.evaluations

    def _read(self) -> list[Sequence[Copy]]:
        if _FILE not in self._folder.list():
            return []
        try:
            values = json.loads(self._folder.read_bytes(_FILE))
            return [[Copy(**copy) for copy in copies] for copies in values]
        except (ValueError, TypeError) as error:
            raise StorageError(
                f"{self._folder.uri}/{_FILE}: not the record of a population; delete it and "
                f"{self._store.uri}/trials/<hash> of its members to train them again"
            ) from error


def schedule_notes(sweep: Sweep, store: Store) -> list[str]:
    """Return what a table's reader should know of the members' schedules.

    Raises:
        StorageError: The store cannot be read.
    """
    return Population(sweep, store).notes() if sweep.population else []


def _rescaled(recipe: Recipe, copy: Copy) -> Recipe:
    optim = recipe.optim
    return replace(
        recipe,
        optim=replace(
            optim,
            rescale_at=(*optim.rescale_at, copy.step),
            rescale_by=(*optim.rescale_by, copy.factor),
        ),
    )
