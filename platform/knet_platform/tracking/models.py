"""Models in MLflow: one for each finished trial, and versions of a name for chosen ones.

A logged model is an `MLmodel` file that names `knet_platform.pyfunc` as its loader, and the
checkpoint by its address; the weights stay where the sweep keeps them. Registering copies what
predicting needs of it beside that file, so that a registered model outlives the sweep's store and
is loaded with MLflow's credentials alone.
"""

import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModel,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Run,
)
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from knet_platform import pyfunc
from knet_platform.storage import TrialStore
from knet_platform.tracking.protocol import TrialModel

_DIGEST = 36
"""Characters of a data set's digest that MLflow takes."""
_LINEAGE = ("sweep", "arm", "seed", "trial_hash")
"""Tags of a run that its model carries as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered:
    """A version of a registered model."""

    name: str
    version: str
    run_id: str | None
    new: bool
    """Whether this call made it."""

    @property
    def uri(self) -> str:
        """What `mlflow.pyfunc.load_model` takes."""
        return f"models:/{self.name}/{self.version}"


def log_model(client: MlflowClient, run: Run, model: TrialModel) -> LoggedModel:
    """Make a trial's model part of its run; one that is there complete is returned as it is.

    Args:
        client: Of the run's store.
        run: The trial's, with all its metrics.
        model: What to log.
    """
    found = _find(client, run, model)
    if found is not None and found.status == LoggedModelStatus.READY:
        return found
    logged = found or client.create_logged_model(
        run.info.experiment_id,
        name=model.name,
        source_run_id=run.info.run_id,
        tags={name: run.data.tags[name] for name in _LINEAGE}
        | {"checkpoint": model.checkpoint, "data_digest": model.data_digest},
        model_type="segmentation",
    )
    _describe(client, logged, model)
    dataset = Dataset(
        name=model.data,
        digest=model.data_digest[:_DIGEST],
        source_type="local",
        source=model.data_root,
    )
    client.log_inputs(
        run.info.run_id,
        [DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, "training")])],
    )
    client.log_batch(run.info.run_id, metrics=_metrics(run, logged, model, dataset))
    if logged.model_id not in [item.model_id for item in _outputs(run)]:
        output = LoggedModelOutput(logged.model_id, model.step)
        client.log_outputs(run.info.run_id, [output])
    client.set_tag(run.info.run_id, "checkpoint", model.checkpoint)
    return client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)


def register(
    client: MlflowClient, run: Run, model: TrialModel, name: str, folder: TrialStore
) -> Registered:
    """Make a trial's model a version of `name`, with its weights; the same again changes nothing.

    Args:
        client: Of the run's store and its registry.
        run: The trial's.
        model: Its model.
        name: Of the registered model; made if there is none.
        folder: Where the checkpoint lies.

    Raises:
        StorageError: The checkpoint cannot be read.
    """
    logged = log_model(client, run, model)
    source = f"models:/{logged.model_id}"
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.source == source:
            return _registered(version, new=False)
    with tempfile.TemporaryDirectory(prefix="knet-") as scratch:
        for file in pyfunc.FILES:
            content = folder.read_bytes(f"{model.checkpoint.rpartition('/')[2]}/{file}")
            Path(scratch, file).write_bytes(content)
        client.log_model_artifacts(logged.model_id, scratch, pyfunc.FOLDER)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise
    tags = {key: value for key, value in logged.tags.items() if key in (*_LINEAGE, "checkpoint")}
    version = client.create_model_version(
        name, source, run.info.run_id, tags=tags, model_id=logged.model_id
    )
    return _registered(version, new=True)


def _registered(version: ModelVersion, *, new: bool) -> Registered:
    return Registered(
        name=version.name, version=str(version.version), run_id=version.run_id, new=new
    )


def _find(client: MlflowClient, run: Run, model: TrialModel) -> LoggedModel | None:
    """Return the run's model; one that was begun twice is deleted once."""
    found = client.search_logged_models(
        [run.info.experiment_id], f"source_run_id = '{run.info.run_id}'"
    )
    same = [item for item in found if item.tags.get("checkpoint") == model.checkpoint]
    same.sort(key=lambda item: (item.status != LoggedModelStatus.READY, item.creation_timestamp))
    for item in same[1:]:
        client.delete_logged_model(item.model_id)
    return same[0] if same else None


def _describe(client: MlflowClient, logged: LoggedModel, model: TrialModel) -> None:
    described = Model(
        artifact_path=logged.artifact_location,
        model_uuid=logged.model_id,
        model_id=logged.model_id,
        run_id=logged.source_run_id,
    )
    # As `mlflow.pyfunc.add_to_model` does, whose module takes seconds to load.
    described.add_flavor(
        "python_function",
        loader_module=pyfunc.__name__,
        python_version=platform.python_version(),
        data=pyfunc.FOLDER,
        config={"checkpoint": model.checkpoint},
    )
    with tempfile.TemporaryDirectory(prefix="knet-") as scratch:
        described.save(str(Path(scratch, MLMODEL_FILE_NAME)))
        client.log_model_artifacts(logged.model_id, scratch)


def _metrics(
    run: Run, logged: LoggedModel, model: TrialModel, dataset: Dataset
) -> Sequence[Metric]:
    """Return the run's points of the model's step, as they are: the curves get none twice."""
    return [
        Metric(
            point.key,
            point.value,
            point.timestamp,
            point.step,
            model_id=logged.model_id,
            dataset_name=dataset.name,
            dataset_digest=dataset.digest,
            run_id=run.info.run_id,
        )
        for point in run.data.to_proto().metrics
        if point.step == model.step
    ]


def _outputs(run: Run) -> Sequence[LoggedModelOutput]:
    return run.outputs.model_outputs if run.outputs else ()
