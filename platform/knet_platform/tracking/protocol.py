"""What the platform asks of an experiment tracker; the only names the rest of it knows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from knet_platform.config import flatten
from knet_platform.differences import differences
from knet_platform.errors import TrackingError
from knet_platform.source import git_sha
from knet_platform.storage import TrialStore
from knet_platform.sweep import Sweep, Trial

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]

_NOT_IN_NAMES = "/:.%\"'"


class RejectedError(TrackingError):
    """The store answered and refused; sending the same again cannot help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRun:
    """What a tracker records of a sweep; plain values, so that a journal can hold them."""

    name: str
    baseline: str
    git_sha: str
    trials: tuple[str, ...]
    """Hashes in the sweep's order."""
    varied: tuple[str, ...] = ()
    """Keys of the recipe that differ between arms, or that the search varies."""

    @classmethod
    def of(cls, sweep: Sweep) -> "SweepRun":
        """Describe a sweep that runs with the code in use."""
        searched = sweep.search.spec.space if sweep.search else ()
        return cls(
            name=sweep.name,
            baseline=sweep.baseline,
            git_sha=git_sha(),
            trials=tuple(trial.hash for trial in sweep.trials),
            varied=tuple(dict.fromkeys([*differences(sweep).keys, *searched])),
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SweepRun":
        """Return what `dataclasses.asdict` and JSON made of one."""
        lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        return cls(**{**values, **lists})


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRun:
    """What a tracker records of a trial; plain values likewise."""

    hash: str
    name: str
    """`arm/seed`."""
    sweep: str
    arm: str
    seed: int
    params: dict[str, str]
    """The recipe, by dotted key."""

    @classmethod
    def of(cls, trial: Trial) -> "TrialRun":
        """Describe a trial."""
        return cls(
            hash=trial.hash,
            name=trial.name,
            sweep=trial.sweep,
            arm=trial.arm,
            seed=trial.seed,
            params={name: str(value) for name, value in flatten(trial.recipe.to_dict())},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialModel:
    """What a tracker records of the model that a finished trial leaves; plain values likewise."""

    name: str
    """`arm-seed`, without what MLflow allows in no name."""
    checkpoint: str
    """Its address: the one that the trial's final metrics were measured on."""
    step: int
    data: str
    """Name of the data set."""
    data_root: str
    data_digest: str
    """Of all that can change a score (`data_fingerprint`)."""

    @classmethod
    def of(cls, trial: Trial, folder: TrialStore) -> "TrialModel | None":
        """Describe a finished trial's model; None where versions before this recorded too little.

        Raises:
            StorageError: The store cannot be read.
        """
        result, provenance = folder.result(), folder.provenance()
        if result is None or provenance is None:
            return None
        return cls.at(
            trial, f"{folder.uri}/{result.checkpoint}", result.step, provenance.data_fingerprint
        )

    @classmethod
    def at(cls, trial: Trial, checkpoint: str, step: int, data_digest: str) -> "TrialModel":
        """Describe the model of a checkpoint."""
        data = trial.recipe.data
        return cls(
            name="".join("_" if c in _NOT_IN_NAMES else c for c in f"{trial.arm}-{trial.seed}"),
            checkpoint=checkpoint,
            step=step,
            data=Path(data.root).name if data.format != "shapes" else "shapes",
            data_root=data.root,
            data_digest=data_digest,
        )


class PointLike(Protocol):
    """One point of a trial's curves."""

    @property
    def step(self) -> int:
        """Optimizer step."""

    @property
    def time(self) -> float:
        """Unix time in seconds."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """Values by metric name."""


class Tracker(Protocol):
    """One parent run for a sweep, one child run per trial for its whole life.

    Every method may be called again with the same arguments, by this process or by one that
    continues the sweep later; nothing is recorded twice. All may raise `TrackingError`. `at` is
    when something happened, in Unix seconds; unset: now.
    """

    @property
    def unsent(self) -> int:
        """Return how many updates are still on their way."""

    def start_sweep(self, sweep: SweepRun) -> None:
        """Find or create the sweep's run; called first, proves that the store works."""

    def status(self, trial_hash: str) -> Status | None:
        """Return how a trial's run stands; None if there is none."""

    def start_trial(self, trial: TrialRun, attempt: int, *, at: float | None = None) -> None:
        """Find or create a trial's run and mark it as running."""

    def log_points(self, trial_hash: str, points: Sequence[PointLike]) -> None:
        """Add to a trial's curves; of each curve, only steps beyond its last one are taken.

        A trial that resumes from a checkpoint repeats steps, with the same values.
        """

    def log_picture(self, trial_hash: str, step: int, png: bytes) -> None:
        """Add a picture to a trial's run, in place of an earlier one of that step."""

    def log_file(self, trial_hash: str, name: str, content: bytes) -> None:
        """Attach a file to a trial's run, in place of an earlier one of that name."""

    def log_model(self, trial_hash: str, model: TrialModel) -> None:
        """Add a finished trial's model to its run, with the metrics of that step."""

    def finish_trial(
        self, trial_hash: str, status: Status, reason: str = "", *, at: float | None = None
    ) -> None:
        """Close a trial's run."""

    def finish_sweep(
        self, status: Status, artifacts: Sequence[Path] = (), *, at: float | None = None
    ) -> None:
        """Close the sweep's run, with files attached."""

    def sweep_url(self) -> str | None:
        """Return the address of the sweep's own page, if there is such a page."""

    def compare_url(self) -> str | None:
        """Return the address of a page that compares the trials, if there is such a page."""
