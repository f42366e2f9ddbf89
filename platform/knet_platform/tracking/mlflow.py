"""MLflow: experiment = sweep name, parent run = the sweep, child run = one trial for ever.

Runs are found again by their tags, never by remembered ids, so that any process can continue
what another began. Only an explicit client is used: no global state of `mlflow`.

Whatever is sent again leaves no trace: points that the store has are known by the ends of its
curves, which are read afresh after every call without an answer; files and pictures have names of
their own; the rest states what holds, not what changed.
"""

import json
import logging
import os
import tempfile
import time
import urllib.parse
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException, RestException
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_IMAGES
from sqlalchemy.exc import SQLAlchemyError

from knet_platform.errors import TrackingError
from knet_platform.previews import preview
from knet_platform.storage import TrialStore
from knet_platform.sweep import Trial
from knet_platform.tracking.journal import without_password
from knet_platform.tracking.models import Registered, log_model, register
from knet_platform.tracking.protocol import (
    PointLike,
    RejectedError,
    Status,
    SweepRun,
    TrialModel,
    TrialRun,
)

LOCAL_PAGES = "http://127.0.0.1:5000"
"""Where `knet ui` serves a local store."""
_BATCH = 1000
"""Most metrics that MLflow takes in one call."""
_MOST_PARAMS = 100
"""Most parameters that it takes in one."""
_LONGEST = 500
"""Characters of a tag or parameter that every MLflow store takes."""
_TIMEOUT = "20"
"""Seconds for one answer of a server."""
_UPGRADE = "mlflow db upgrade"
_NOT_NOW = (401, 403, 408, 429)
"""Refusals that may pass: of who asks, or how often, not of what is sent."""


class MLflowTracker:
    """Implements `Tracker`.

    Args:
        uri: Address of the store.
        artifacts: Where a store without a server keeps files of new experiments.
    """

    unsent = 0  # each call returns when its update has arrived

    def __init__(self, uri: str, *, artifacts: Path) -> None:
        self._uri = uri
        self._artifacts = artifacts
        self._runs: dict[str, str] = {}
        """Run id by trial hash."""
        self._ends: dict[str, dict[str, int]] = {}
        """Last step by metric name, by trial hash."""

    def start_sweep(self, sweep: SweepRun) -> None:
        """Find or create the experiment and the sweep's run."""
        with self._explained():
            self._connect()
            self._sweep = sweep
            self._experiment = self._find_experiment(sweep.name)
            found = self._find(f"attributes.run_name = '{sweep.name}'")
            tags = {"sweep": sweep.name, "baseline": sweep.baseline, "git_sha": sweep.git_sha}
            run = (
                found[0]
                if found
                else self._client.create_run(self._experiment, run_name=sweep.name, tags=tags)
            )
            self._parent = run.info.run_id
            self._client.update_run(self._parent, status="RUNNING")

    def status(self, trial_hash: str) -> Status | None:
        """Return how a trial's run stands."""
        with self._explained():
            run = self._find_trial(trial_hash)
        return None if run is None else cast(Status, run.info.status)

    def start_trial(self, trial: TrialRun, attempt: int, *, at: float | None = None) -> None:
        """Find or create a trial's run and mark it as running."""
        with self._explained():
            run = self._find_trial(trial.hash)
            if run is None:
                run = self._client.create_run(
                    self._experiment,
                    start_time=_milliseconds(at),
                    run_name=trial.name,
                    tags=self._tags(trial),
                )
            self._know(trial.hash, run)
            run_id = run.info.run_id
            # The page sorts params by name: what differs between arms comes first once more.
            differ = {
                f"arm.{key}": trial.params[key]
                for key in self._sweep.varied
                if key in trial.params
            }
            params = [
                Param(name, value[:_LONGEST])
                for name, value in (differ | trial.params).items()
                if name not in run.data.params  # which never change
            ]
            now = {"attempt": str(attempt), "git_sha": self._sweep.git_sha, "status_reason": ""}
            tags = [RunTag(key, value) for key, value in now.items()]
            self._client.log_batch(run_id, params=params[:_MOST_PARAMS], tags=tags)
            for start in range(_MOST_PARAMS, len(params), _MOST_PARAMS):
                self._client.log_batch(run_id, params=params[start : start + _MOST_PARAMS])
            self._client.update_run(run_id, status="RUNNING")

    def log_points(self, trial_hash: str, points: Sequence[PointLike]) -> None:
        """Add what lies beyond the curves' ends."""
        run_id = self._run_of(trial_hash)
        ends = dict(self._ends[trial_hash])
        metrics = []
        for point in points:
            for name, value in point.metrics.items():
                if point.step > ends.get(name, -1):
                    ends[name] = point.step
                    metrics.append(Metric(name, value, _milliseconds(point.time), point.step))
        with self._explained():
            for start in range(0, len(metrics), _BATCH):
                # Until it answers, nobody knows whether the store has them.
                self._ends.pop(trial_hash, None)
                self._client.log_batch(run_id, metrics=metrics[start : start + _BATCH])
        self._ends[trial_hash] = ends

    def log_picture(self, trial_hash: str, step: int, png: bytes) -> None:
        """Add a picture; MLflow's page shows them with a slider over steps."""
        # As `MlflowClient.log_image` names them, but a picture sent again replaces itself: its
        # time and its unique part follow from run and step.
        run_id = self._run_of(trial_hash)
        try:
            small = preview(png)
        except OSError as error:
            raise RejectedError(f"trial {trial_hash}: picture of step {step}: {error}") from error
        stem = f"probe+step+{step}+timestamp+{step}+{uuid.uuid5(uuid.UUID(run_id), str(step))}"
        with self._explained(), tempfile.TemporaryDirectory(prefix="knet-") as folder:
            Path(folder, f"{stem}.png").write_bytes(png)
            Path(folder, f"{stem}+compressed.webp").write_bytes(small)
            self._client.log_artifacts(run_id, folder, "images")
            self._client.set_tag(run_id, MLFLOW_LOGGED_IMAGES, True)

    def log_file(self, trial_hash: str, name: str, content: bytes) -> None:
        """Attach a file to a trial's run."""
        run_id = self._run_of(trial_hash)
        with self._explained(), tempfile.TemporaryDirectory(prefix="knet-") as folder:
            path = Path(folder, name)
            path.write_bytes(content)
            self._client.log_artifact(run_id, str(path))

    def log_model(self, trial_hash: str, model: TrialModel) -> None:
        """Add a finished trial's model to its run: a logged model of MLflow."""
        run_id = self._run_of(trial_hash)
        with self._explained():
            log_model(self._client, self._client.get_run(run_id), model)

    def finish_trial(
        self, trial_hash: str, status: Status, reason: str = "", *, at: float | None = None
    ) -> None:
        """Close a trial's run."""
        run_id = self._run_of(trial_hash)
        with self._explained():
            self._client.set_tag(run_id, "status_reason", reason[:_LONGEST])
            self._client.set_terminated(run_id, status, _milliseconds(at))

    def finish_sweep(
        self, status: Status, artifacts: Sequence[Path] = (), *, at: float | None = None
    ) -> None:
        """Close the sweep's run, with files under `report/`."""
        with self._explained():
            for path in artifacts:
                self._client.log_artifact(self._parent, str(path), "report")
            self._client.set_terminated(self._parent, status, _milliseconds(at))

    def register(self, trial: Trial, folder: TrialStore, name: str) -> Registered:
        """Make a finished trial's model a version of the registered model `name`.

        Needs no `start_sweep`; the same again changes nothing.

        Args:
            trial: With a run in this store.
            folder: Its part of the sweeps' store.
            name: Of the registered model.

        Raises:
            TrackingError: The store does not answer, or has no run of the trial.
            StorageError: The checkpoint cannot be read.
        """
        model = TrialModel.of(trial, folder)
        with self._explained():
            self._connect()
            experiment = self._client.get_experiment_by_name(trial.sweep)
            run = None
            if experiment is not None:
                self._experiment = str(experiment.experiment_id)
                run = self._find_trial(trial.hash)
            if run is None or model is None:
                raise TrackingError(
                    f"{trial.name}: has no {'run' if run is None else 'provenance'} in "
                    f"{without_password(self._uri) if run is None else folder.uri}; expected a "
                    f"tracked trial: `knet sync` sends what waits, `knet run` what is missing"
                )
            return register(self._client, run, model, name, folder)

    def sweep_url(self) -> str | None:
        """Return MLflow's page of the sweep's run, which leads to its trials and the report."""
        return f"{self._pages()}/experiments/{self._experiment}/runs/{self._parent}"

    def compare_url(self) -> str | None:
        """Return MLflow's page that compares the trials, in the sweep's order; others last."""
        # A search adds trials under way.
        places = {trial_hash: place for place, trial_hash in enumerate(self._sweep.trials)}
        hashes = sorted(self._runs, key=lambda item: places.get(item, len(places)))
        runs = json.dumps([self._runs[item] for item in hashes], separators=(",", ":"))
        experiments = json.dumps([self._experiment])
        query = urllib.parse.urlencode({"runs": runs, "experiments": experiments})
        return f"{self._pages()}/compare-runs?{query}"

    def _pages(self) -> str:
        served = self._uri.startswith("http")
        base = without_password(self._uri).rstrip("/") if served else LOCAL_PAGES
        return f"{base}/#"

    def _connect(self) -> None:
        # MLflow's own patience is 4 minutes a call; `JournaledTracker` tries again anyway.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", _TIMEOUT)
        logging.getLogger("alembic").setLevel(logging.WARNING)  # a new file's 60 migrations
        logging.getLogger("mlflow.store.db").setLevel(logging.WARNING)
        if self._uri.startswith("sqlite:///"):
            path = Path(self._uri.removeprefix("sqlite:///"))
            path.parent.mkdir(parents=True, exist_ok=True)
        self._client = MlflowClient(self._uri)

    def _tags(self, trial: TrialRun) -> dict[str, str]:
        return {
            "mlflow.parentRunId": self._parent,
            "sweep": trial.sweep,
            "arm": trial.arm,
            "baseline": self._sweep.baseline,
            "seed": str(trial.seed),
            "trial_hash": trial.hash,
        }

    def _find_experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            location = None
            if "://" not in self._uri or self._uri.startswith("sqlite"):
                location = (self._artifacts / name).absolute().as_uri()
            return str(self._client.create_experiment(name, location))
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _find(self, condition: str) -> list[Run]:
        found: list[Run] = self._client.search_runs(
            [self._experiment],
            condition,
            run_view_type=ViewType.ACTIVE_ONLY,
            order_by=["attributes.start_time ASC"],
        )
        return found

    def _find_trial(self, trial_hash: str) -> Run | None:
        found = self._find(f"tags.trial_hash = '{trial_hash}'")
        # A server may carry out a request to create a run long after everybody stopped waiting for
        # its answer, and asked again. The one in use is the one with params.
        found.sort(key=lambda run: not run.data.params)
        for run in found[1:]:
            if not run.data.params:
                self._client.delete_run(run.info.run_id)
        if not found:
            return None
        self._runs[trial_hash] = found[0].info.run_id
        return found[0]

    def _know(self, trial_hash: str, run: Run) -> None:
        self._runs[trial_hash] = run.info.run_id
        # The latest value of a curve, which comes with the run, is the one of the last step.
        latest = run.data.to_proto().metrics
        self._ends[trial_hash] = {item.key: item.step for item in latest}

    def _run_of(self, trial_hash: str) -> str:
        """Return a trial's run and make sure that its curves' ends are known."""
        if trial_hash not in self._ends:
            with self._explained():
                run = self._find_trial(trial_hash)
            if run is None:
                raise RejectedError(f"trial {trial_hash}: has no run in this store")
            self._know(trial_hash, run)
        return self._runs[trial_hash]

    @contextmanager
    def _explained(self) -> Iterator[None]:
        where = without_password(self._uri)
        try:
            yield
        except MlflowException as error:
            kind = RejectedError if self._refuses(error) else TrackingError
            raise kind(_line(where, error)) from error
        except (SQLAlchemyError, OSError, ImportError) as error:
            raise TrackingError(_line(where, error)) from error

    def _refuses(self, error: MlflowException) -> bool:
        """Tell whether the store itself said no, for good; a proxy's "not found" may pass."""
        if self._uri.startswith("http") and not isinstance(error, RestException):
            return False
        code = error.get_http_status_code()  # type: ignore[no-untyped-call]
        return 400 <= code < 500 and code not in _NOT_NOW


def _milliseconds(at: float | None) -> int:
    return round(1000 * (time.time() if at is None else at))


def _line(where: str, error: BaseException) -> str:
    inner = error
    while inner.__cause__ or inner.__context__:
        inner = inner.__cause__ or inner.__context__ or inner
    # What went wrong with a connection is said best, and without passwords, by the innermost.
    said = inner if isinstance(inner, OSError) else error
    reason = (str(said).splitlines() or [type(said).__name__])[0]
    if _UPGRADE in reason:
        return (
            f"MLFLOW_TRACKING_URI: {where}: of another version of MLflow "
            f"({reason.partition('. ')[0]}); copy it, then run `{_UPGRADE} {where}`"
        )
    return (
        f"MLFLOW_TRACKING_URI: {where}: {reason}; expected MLflow's store: start its server, "
        f"or unset MLFLOW_TRACKING_URI to use a file"
    )
