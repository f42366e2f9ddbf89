"""Ray Train's groups of workers: of one size, or elastic between `workers: [least, most]`.

An elastic trial asks the autoscaler for the most, starts as soon as its least have room, and takes
more when there is more. Ray Train decides when and restarts the group; what is added here is what
it lacks (docs/adr/0018-elastic-trials.md): which sizes can share a batch, that a group grows only
when its work is saved, and that it waits without taking a processor. Loads torch.
"""

import os
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ScalingDecision,
)
from ray.train.v2._internal.execution.worker_group import (
    WorkerGroupPollStatus,
    WorkerGroupState,
)

_START_SECONDS = "60"
"""After which a group without room is given up: a node may have died since it was chosen."""
_PAUSE_SECONDS = 2.0
"""Between looks for room."""


def make_trainer(
    counts: Sequence[int], worker: Any, *, scaling_config: Any, **options: Any
) -> TorchTrainer:
    """Return the trainer of a trial.

    Args:
        counts: Numbers of workers that it may have, ascending.
        worker: What each of them runs.
        scaling_config: From the least to the most of `counts`.
        options: Of `TorchTrainer`.
    """
    if len(counts) == 1:
        return TorchTrainer(worker, scaling_config=scaling_config, **options)
    # Other trials wait for the workers of those before them as long as it takes; an elastic one
    # decides again, as there may be room for fewer.
    os.environ[WORKER_GROUP_START_TIMEOUT_S_ENV_VAR] = _START_SECONDS
    return _ElasticTrainer(counts, worker, scaling_config=scaling_config, **options)


class _ElasticTrainer(TorchTrainer):
    def __init__(self, counts: Sequence[int], worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        self._counts = counts

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        policy = ElasticPolicy(self.scaling_config, self._counts)
        changed = options | {"scaling_policy": policy}
        # Ray's annotations describe its version 1.
        return super()._initialize_and_run_controller(**changed)  # type: ignore[misc]


class ElasticPolicy(ElasticScalingPolicy):
    """Ray Train's own, with sizes that share the batch, and moved to when nothing is lost."""

    def __init__(self, scaling_config: Any, counts: Sequence[int]) -> None:
        """Choose among `counts` of workers, ascending."""
        super().__init__(scaling_config)
        self._counts = counts

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Start the largest group that has room, or wait for room."""
        # What Ray reserves for this trial is up to 20 seconds old, and may lie on a dead node.
        ray.get(
            self._autoscaling_coordinator.get_reserved_resources.remote(
                self._requester_id, recompute=True
            )
        )
        decision = super().make_decision_for_non_running_worker_group()
        if isinstance(decision, NoopDecision):
            time.sleep(_PAUSE_SECONDS)  # Ray's controller would ask again at once
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        """Change the size right after a checkpoint has arrived, if there is room for more."""
        reports = [
            status.training_report for status in worker_group_status.worker_statuses.values()
        ]
        if any(report is not None and report.checkpoint is not None for report in reports):
            return super().make_decision_for_running_worker_group(
                worker_group_state, worker_group_status
            )
        self._maybe_send_resource_request()  # type: ignore[no-untyped-call]
        return NoopDecision()

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        room = super()._count_possible_workers(reserved_resources)
        return max((count for count in self._counts if count <= room), default=0)
