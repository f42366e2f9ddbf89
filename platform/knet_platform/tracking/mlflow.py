"""MLflow: experiment = sweep name, parent run = the sweep, child run = one trial for ever.

Runs are found again by their tags, never by remembered ids, so that any process can continue
what another began. Only an explicit client is used: no global state of `mlflow`.
"""

import io
import json
import logging
import os
import tempfile
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from knet_platform.config import flatten
from knet_platform.errors import TrackingError
from knet_platform.planning import Sweep, Trial
from knet_platform.source import git_sha
from knet_platform.tracking.protocol import PointLike, RejectedError, Status

LOCAL_PAGES = "http://127.0.0.1:5000"
"""Where `knet ui` serves a local store."""
_BATCH = 1000
"""Most metrics that MLflow takes in one call."""
_LONGEST = 500
"""Characters of a tag or parameter that every MLflow store takes."""


class MLflowTracker:
    """Implements `Tracker`.

    Args:
        uri: Address of the store.
        artifacts: Where a store without a server keeps files of new experiments.
    """

    def __init__(self, uri: str, *, artifacts: Path) -> None:
        self._uri = uri
        self._artifacts = artifacts
        self._runs: dict[str, str] = {}
        """Run id by trial hash."""
        self._ends: dict[str, dict[str, int]] = {}
        """Last step by metric name, by trial hash."""

    def start_sweep(self, sweep: Sweep) -> None:
        """Find or create the experiment and the sweep's run."""
        # MLflow's own patience is 4 minutes a call; `BackgroundTracker` tries again anyway.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "4")  # seconds
        logging.getLogger("alembic").setLevel(logging.WARNING)  # a new file's 60 migrations
        logging.getLogger("mlflow.store.db").setLevel(logging.WARNING)
        with self._explained():
            if self._uri.startswith("sqlite:///"):
                path = Path(self._uri.removeprefix("sqlite:///"))
                path.parent.mkdir(parents=True, exist_ok=True)
            self._client = MlflowClient(self._uri)
            self._sweep = sweep
            self._git_sha = git_sha()
            self._experiment = self._find_experiment(sweep.name)
            run = self._find(f"attributes.run_name = '{sweep.name}'")
            if run is None:
                tags = {"sweep": sweep.name, "baseline": sweep.baseline, "git_sha": self._git_sha}
                run = self._client.create_run(self._experiment, run_name=sweep.name, tags=tags)
            self._parent = run.info.run_id
            self._client.update_run(self._parent, status="RUNNING")

    def status(self, trial_hash: str) -> Status | None:
        """Return how a trial's run stands."""
        with self._explained():
            run = self._find(f"tags.trial_hash = '{trial_hash}'")
        return None if run is None else cast(Status, run.info.status)

    def start_trial(self, trial: Trial, attempt: int) -> None:
        """Find or create a trial's run and mark it as running."""
        with self._explained():
            run = self._find(f"tags.trial_hash = '{trial.hash}'")
            if run is None:
                run = self._client.create_run(
                    self._experiment, run_name=trial.name, tags=self._tags(trial)
                )
            run_id = self._runs[trial.hash] = run.info.run_id
            if trial.hash not in self._ends:
                self._ends[trial.hash] = self._curve_ends(run)
            if not run.data.params:  # else logged before; MLflow's params never change
                self._client.log_batch(run_id, params=_params(trial))
            now = {"attempt": str(attempt), "git_sha": self._git_sha, "status_reason": ""}
            tags = [RunTag(key, value) for key, value in now.items()]
            self._client.log_batch(run_id, tags=tags)
            self._client.update_run(run_id, status="RUNNING")

    def log_points(self, trial_hash: str, points: Sequence[PointLike]) -> None:
        """Add what lies beyond the curves' ends."""
        ends = dict(self._ends[trial_hash])
        metrics = []
        for point in points:
            for name, value in point.metrics.items():
                if point.step > ends.get(name, -1):
                    ends[name] = point.step
                    metrics.append(Metric(name, value, round(point.time * 1000), point.step))
        with self._explained():
            for start in range(0, len(metrics), _BATCH):
                batch = metrics[start : start + _BATCH]
                self._client.log_batch(self._runs[trial_hash], metrics=batch)
        self._ends[trial_hash] = ends

    def log_picture(self, trial_hash: str, step: int, png: bytes) -> None:
        """Add a picture; MLflow's page shows them with a slider over steps."""
        from PIL import Image

        with self._explained():
            image = Image.open(io.BytesIO(png))
            self._client.log_image(self._runs[trial_hash], image, key="probe", step=step)

    def log_file(self, trial_hash: str, name: str, content: bytes) -> None:
        """Attach a file to a trial's run."""
        with self._explained(), tempfile.TemporaryDirectory(prefix="knet-") as folder:
            path = Path(folder, name)
            path.write_bytes(content)
            self._client.log_artifact(self._runs[trial_hash], str(path))

    def finish_trial(self, trial_hash: str, status: Status, reason: str = "") -> None:
        """Close a trial's run."""
        run_id = self._runs[trial_hash]
        with self._explained():
            self._client.set_tag(run_id, "status_reason", reason[:_LONGEST])
            self._client.set_terminated(run_id, status)

    def finish_sweep(self, status: Status, artifacts: Sequence[Path] = ()) -> None:
        """Close the sweep's run, with files under `report/`."""
        with self._explained():
            for path in artifacts:
                self._client.log_artifact(self._parent, str(path), "report")
            self._client.set_terminated(self._parent, status)

    def compare_url(self) -> str | None:
        """Return MLflow's page that compares the trials of this sweep, in its order."""
        hashes = [trial.hash for trial in self._sweep.trials if trial.hash in self._runs]
        runs = json.dumps([self._runs[item] for item in hashes], separators=(",", ":"))
        experiments = json.dumps([self._experiment])
        base = self._uri.rstrip("/") if self._uri.startswith("http") else LOCAL_PAGES
        query = urllib.parse.urlencode({"runs": runs, "experiments": experiments})
        return f"{base}/#/compare-runs?{query}"

    def _tags(self, trial: Trial) -> dict[str, str]:
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
            return str(self._client.create_experiment(name, artifact_location=location))
        if found.lifecycle_stage == "deleted":
            self._client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _find(self, condition: str) -> Run | None:
        found = self._client.search_runs(
            [self._experiment],
            condition,
            run_view_type=ViewType.ACTIVE_ONLY,
            max_results=1,
            order_by=["attributes.start_time ASC"],
        )
        run: Run | None = found[0] if found else None
        if run is not None and (trial_hash := run.data.tags.get("trial_hash")):
            self._runs[trial_hash] = run.info.run_id
        return run

    def _curve_ends(self, run: Run) -> dict[str, int]:
        return {
            name: max(item.step for item in self._client.get_metric_history(run.info.run_id, name))
            for name in run.data.metrics
        }

    @contextmanager
    def _explained(self) -> Iterator[None]:
        where = _without_password(self._uri)
        try:
            yield
        except MlflowException as error:
            code = error.get_http_status_code()  # type: ignore[no-untyped-call]
            refused = 400 <= code < 500
            kind = RejectedError if refused else TrackingError
            raise kind(_line(where, error)) from error
        except (SQLAlchemyError, OSError, ImportError) as error:
            raise TrackingError(_line(where, error)) from error


def _line(where: str, error: BaseException) -> str:
    inner = error
    while inner.__cause__ or inner.__context__:
        inner = inner.__cause__ or inner.__context__ or inner
    # What went wrong with a connection is said best, and without passwords, by the innermost.
    said = inner if isinstance(inner, OSError) else error
    reason = (str(said).splitlines() or [type(said).__name__])[0]
    return (
        f"MLFLOW_TRACKING_URI: {where}: {reason}; expected MLflow's store: start its server, "
        f"or unset MLFLOW_TRACKING_URI to use a file"
    )


def _params(trial: Trial) -> list[Param]:
    return [Param(key, str(value)[:_LONGEST]) for key, value in flatten(trial.recipe.to_dict())]


def _without_password(uri: str) -> str:
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"
