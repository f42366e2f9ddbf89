"""Results, failures, checkpoints and pictures of trials, on a local path or on s3://.

Layout: `<uri>/trials/<hash>/{provenance.json, patch.diff, groups.json, result.json, failure.json,
pruned.json, failures/<number>.json, curves/<step>.json, checkpoint_<step>/, ...}`; this folder is
also Ray Train's run folder. What is below `checkpoint_<step>/`: see `checkpoints`.
`<uri>/runs/<id>/` says which trials of a run may go on (`attempts`), `<uri>/searches/<id>/` what a
search has suggested (`suggestions`), `<uri>/sweeps/<name>/` where to read on about one (`links`),
`<uri>/populations/<id>/` who copied whom (`population`).
Every file appears whole or not at all (`files`).
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import yaml

from knet_platform.checkpoints import Checkpoints, Retention, step_of
from knet_platform.errors import StorageError
from knet_platform.files import Files, open_files
from knet_platform.provenance import Provenance, with_absolute_root

if TYPE_CHECKING:
    from knet_core import CheckpointState, Recipe

T = TypeVar("T")
Status = Literal["finished", "partial", "failed", "new"]
Cause = Literal[
    "preempted",
    "out_of_memory_training",
    "out_of_memory_evaluation",
    "non_finite",
    "data",
    "configuration",
    "hang",
    "damaged_checkpoint",
    "crash",
]
"""Classes of failures, each with a policy of its own (docs/design/failures.md)."""

FAILURES = "failures"
"""Folder of a trial that takes its failures and what explains them."""
CURVES = "curves"
"""Folder of a trial that takes all points of its curves."""
SCHEDULE = "schedule.yaml"
"""Recipe that a member of a population follows by now, from the beginning."""

_FAILURE = re.compile(r"(\d+)\.json")


class EvaluationLike(Protocol):
    """What a point of the evaluation curve offers, whoever made it."""

    @property
    def step(self) -> int:
        """Optimizer step."""

    @property
    def time(self) -> float:
        """Unix time in seconds."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """Values by metric name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One evaluation as read back from a result."""

    step: int
    time: float
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialResult:
    """What a finished trial leaves; its presence is what "finished" means."""

    trial_hash: str
    step: int
    metrics: dict[str, float]
    evaluations: tuple[EvaluationLike, ...]
    checkpoint: str
    """Name of the last checkpoint's folder in the trial's folder."""
    num_parameters: int
    """Trainable parameters."""
    seconds: float
    """Training time, summed over attempts."""
    wall_seconds: float
    """Time of the last attempt from driver start to end."""
    device: str
    workers: int
    """In the end."""
    finished_at: str
    """ISO 8601."""
    micro_batch: int | None = None
    """Images of a worker in memory at a time, where it allowed fewer than the recipe asked for;
    the batch, and what is learnt from it, stay the same (`knet_core.pieces`)."""
    earlier_workers: tuple[int, ...] = ()
    """Numbers of workers before, in order, where they changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The workers that trained a part of a trial, up to the next group's part."""

    workers: int
    seconds: float
    """Of training and evaluation that the checkpoint held which they went on from."""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One thing that went wrong in a trial, and what was done about it."""

    cause: Cause
    kind: str
    """Name of the exception's class."""
    message: str
    action: str
    """In a few words: "retried from step 120", "stopped the trial"."""
    attempt: int
    """Counted from 1."""
    step: int
    """Of the newest checkpoint at the time, 0 without one."""
    at: str = field(default_factory=_now)
    """ISO 8601."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """Where a screen stopped a trial."""

    sweep: str
    """Whose screen; any other sweep goes on from the last checkpoint."""
    run: str
    """The run of the sweep that decided it; see `attempts`."""
    step: int
    """Of the evaluation that decided it."""
    total: int
    """Steps of a full run."""

    def __str__(self) -> str:
        return f"pruned at step {self.step} of {self.total}"


class Store:
    """The folder or bucket prefix that holds every trial."""

    def __init__(self, uri: str) -> None:
        """Open `uri`: a local path or s3://bucket/prefix (`AWS_ENDPOINT_URL` is honoured).

        Raises:
            StorageError: The address is of another kind.
        """
        self._files = open_files(uri)
        self.uri = self._files.uri

    def trial(self, trial_hash: str) -> "TrialStore":
        """Return the part of the store that belongs to one trial; nothing is created."""
        return TrialStore(self._files, f"trials/{trial_hash}")

    def run(self, run_id: str) -> "TrialStore":
        """Return the part that one run of a sweep and its trials talk through."""
        return TrialStore(self._files, f"runs/{run_id}")

    def search(self, search_id: str) -> "TrialStore":
        """Return the part that keeps what a search has suggested."""
        return TrialStore(self._files, f"searches/{search_id}")

    def sweep(self, name: str) -> "TrialStore":
        """Return the part that keeps what is known of a whole sweep (`links`)."""
        return TrialStore(self._files, f"sweeps/{name}")

    def population(self, population_id: str) -> "TrialStore":
        """Return the part that keeps which member of a population copied which."""
        return TrialStore(self._files, f"populations/{population_id}")

    def hashes(self) -> list[str]:
        """Return the hashes of all trials that were ever started, sorted."""
        return self.run_folder().list("trials")

    def run_folder(self) -> "TrialStore":
        """Return the store's own folder as that of one run, as `knet train` fills it."""
        return TrialStore(self._files, "")


class TrialStore:
    """One trial's folder."""

    def __init__(self, files: Files, folder: str) -> None:
        self.uri = f"{files.uri}/{folder}".rstrip("/")
        self.checkpoints = Checkpoints(files, folder)
        self._files = files
        self._folder = folder

    def result(self) -> TrialResult | None:
        """Return the result of a finished trial."""

        def make(values: dict[str, Any]) -> TrialResult:
            evaluations = tuple(Evaluation(**item) for item in values.pop("evaluations"))
            earlier = tuple(values.pop("earlier_workers", ()))
            return TrialResult(evaluations=evaluations, earlier_workers=earlier, **values)

        return self.read_json("result.json", make)

    def write_result(self, result: TrialResult) -> None:
        """Mark the trial as finished, whatever ended it before."""
        evaluations = [
            {"step": item.step, "time": item.time, "metrics": dict(item.metrics)}
            for item in result.evaluations
        ]
        self._write_json("result.json", _values(result) | {"evaluations": evaluations})
        self.clear_failure()
        self.clear_pruned()

    def failure(self) -> Failure | None:
        """Return the failure that ended the trial; None if it went on or can go on."""
        return self.read_json("failure.json", lambda values: Failure(**values))

    def failures(self) -> tuple[Failure, ...]:
        """Return everything that ever went wrong in the trial, oldest first."""
        names = (f"{FAILURES}/{number:04d}.json" for number in self._failure_numbers())
        return tuple(self._load_json(name, lambda values: Failure(**values)) for name in names)

    def write_failure(self, failure: Failure, *, final: bool = True) -> None:
        """Add a failure to the record.

        Args:
            failure: What went wrong.
            final: It ended the trial.
        """
        number = max(self._failure_numbers(), default=0) + 1
        self._write_json(f"{FAILURES}/{number:04d}.json", asdict(failure))
        if final:
            self._write_json("failure.json", asdict(failure))

    def clear_failure(self) -> None:
        """Let the trial go on after the failure that ended it, if any; the record stays."""
        self.delete("failure.json")

    def pruned(self) -> Pruned | None:
        """Return where a screen stopped the trial; None if it went on, or ended otherwise."""
        if {"result.json", "failure.json"} & set(self.list()):
            return None
        return self.read_json("pruned.json", lambda values: Pruned(**values))

    def write_pruned(self, pruned: Pruned) -> None:
        """Tell the trial to save and stop."""
        self._write_json("pruned.json", asdict(pruned))

    def clear_pruned(self) -> None:
        """Let the trial go on after a screen stopped it."""
        self.delete("pruned.json")

    def provenance(self) -> Provenance | None:
        """Return what the trial was made from; None before its first start."""
        return self.read_json(
            "provenance.json",
            lambda values: Provenance(notes=tuple(values.pop("notes")), **values),
        )

    def write_provenance(self, provenance: Provenance, patch: str) -> None:
        """Record what the trial is made from, with the uncommitted changes if there are any."""
        if provenance.patch:
            self.write_bytes("patch.diff", patch.encode(errors="surrogateescape"))
        self._write_json("provenance.json", _values(provenance))

    def provenance_files(self) -> dict[str, bytes]:
        """Return what is recorded of the trial's making, by file name, for keeping elsewhere."""
        listed = self.list()
        if "provenance.json" not in listed:
            return {}
        content = self.read_bytes("provenance.json")
        has_patch = self._parse("provenance.json", content, lambda values: bool(values["patch"]))
        names = ["patch.diff"] if has_patch else []
        names += [SCHEDULE] if SCHEDULE in listed else []
        return {"provenance.json": content} | {name: self.read_bytes(name) for name in names}

    def write_schedule(self, recipe: "Recipe") -> None:
        """Record the recipe that a member of a population follows by now, from the beginning."""
        self.write_bytes(SCHEDULE, yaml.safe_dump(recipe.to_dict(), sort_keys=False).encode())
        if provenance := self.provenance():
            values = with_absolute_root(recipe).to_dict()
            self._write_json("provenance.json", _values(replace(provenance, recipe=values)))

    def write_machine(self, *, threads: int, accelerator: dict[str, str] | None) -> None:
        """Add to the provenance what the first worker trains on, once it is known."""
        provenance = self.provenance()
        if provenance is not None and provenance.threads is None:
            complete = replace(provenance, threads=threads, accelerator=accelerator)
            self._write_json("provenance.json", _values(complete))

    def groups(self) -> tuple[Group, ...]:
        """Return the groups of workers whose training the newest checkpoint holds, in order."""
        found = self.read_json(
            "groups.json", lambda values: tuple(Group(**item) for item in values["groups"])
        )
        return found or ()

    def add_group(self, group: Group) -> None:
        """Record who trains from now on; groups whose work was lost are forgotten."""
        kept = [earlier for earlier in self.groups() if earlier.seconds < group.seconds]
        if not kept or kept[-1].workers != group.workers:
            self._write_json("groups.json", {"groups": [asdict(g) for g in (*kept, group)]})

    def write_points(self, start: int, points: Sequence[EvaluationLike]) -> None:
        """Record every point since the checkpoint of step `start`, in place of earlier ones.

        Before anybody is told of a point, it is here: whoever dies on the way takes none along.
        """
        values = [
            {"step": point.step, "time": point.time, "metrics": dict(point.metrics)}
            for point in points
        ]
        self.write_bytes(f"{CURVES}/{start:06d}.json", json.dumps(values).encode())

    def points(self) -> tuple[Evaluation, ...]:
        """Return the curves so far, step by step; what was measured twice, as it was first."""
        found: dict[int, Evaluation] = {}
        for name in self.list(CURVES):
            for point in self._load_json(
                f"{CURVES}/{name}", lambda points: [Evaluation(**values) for values in points]
            ):
                if known := found.get(point.step):
                    point = replace(known, metrics=point.metrics | known.metrics)
                found[point.step] = point
        return tuple(found[step] for step in sorted(found))

    def latest_checkpoint(self) -> str | None:
        """Return the name of the newest complete checkpoint."""
        return self.checkpoints.newest()

    def superfluous_checkpoints(self, retention: Retention) -> list[str]:
        """Return the checkpoints that need not stay: a result keeps the one that it names."""
        result = self.result()
        kept = {result.checkpoint} if result else set()
        return [name for name in self.checkpoints.superfluous(retention) if name not in kept]

    def latest_step(self) -> int:
        """Return the step of the newest checkpoint, 0 without one."""
        name = self.latest_checkpoint()
        return step_of(name) if name else 0

    def state(self) -> "CheckpointState | None":
        """Return the training state of the newest checkpoint."""
        name = self.latest_checkpoint()
        return self.checkpoints.state(name) if name else None

    def status(self) -> Status:
        """Return how far the trial has come."""
        names = set(self.list())
        if "result.json" in names:
            return "finished"
        if "failure.json" in names:
            return "failed"
        return "partial" if self.latest_checkpoint() else "new"

    def write_bytes(self, relative: str, data: bytes) -> None:
        """Write one file, whole or not at all.

        Raises:
            DiskFullError: The disk took no more.
            StorageError: The store refused.
        """
        self._files.write(self._name(relative), data)

    def read_bytes(self, relative: str) -> bytes:
        """Return one file's content.

        Raises:
            StorageError: It is missing or cannot be read.
        """
        return self._files.read(self._name(relative))

    def read_json(self, relative: str, make: Callable[[Any], T]) -> T | None:
        """Return what `make` makes of a JSON file's values; None where there is no such file.

        Raises:
            StorageError: It is damaged, or lacks keys or has others than `make` knows.
        """
        return self._load_json(relative, make) if relative in self.list() else None

    def delete(self, relative: str) -> None:
        """Delete one file if it is there.

        Raises:
            StorageError: The store refused.
        """
        self._files.delete(self._name(relative))

    def list(self, relative: str = "") -> list[str]:
        """Return the names in a folder, sorted; a missing folder is empty."""
        return self._files.list(self._name(relative))

    def sizes(self) -> dict[str, int]:
        """Return the bytes of every file below the folder, by its name from there."""
        return self._files.sizes(self._folder)

    def _name(self, relative: str) -> str:
        return f"{self._folder}/{relative}".strip("/")

    def _failure_numbers(self) -> Sequence[int]:
        found = (_FAILURE.fullmatch(name) for name in self.list(FAILURES))
        return sorted(int(match[1]) for match in found if match)

    def _load_json(self, relative: str, make: Callable[[Any], T]) -> T:
        return self._parse(relative, self.read_bytes(relative), make)

    def _parse(self, relative: str, content: bytes, make: Callable[[Any], T]) -> T:
        try:
            return make(json.loads(content))
        except ValueError as error:
            raise StorageError(
                f"{self.uri}/{relative}: not valid JSON; delete the file to run the trial again"
            ) from error
        except (TypeError, KeyError) as error:
            raise StorageError(
                f"{self.uri}/{relative}: written by another version of knet ({error}); use that "
                f"version, or delete the file to run the trial again"
            ) from error

    def _write_json(self, relative: str, values: Mapping[str, Any]) -> None:
        # One line a value: where `json` indents, it takes several times as long.
        lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(values[name])}" for name in values)
        self.write_bytes(relative, f"{{\n{lines}\n}}".encode())


def _values(record: Provenance | TrialResult) -> dict[str, Any]:
    """Return a record's values as they are; `asdict` would copy every one of them."""
    return {name: getattr(record, name) for name in record.__dataclass_fields__}
