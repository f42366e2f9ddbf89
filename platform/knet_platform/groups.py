"""Ray Train's groups of workers: of one size, or elastic between `workers: [least, most]`.

Ray Train's controller runs in the trial's driver (docs/adr/0019-controllers.md). It starts an
elastic group and restarts it with another size. When, and with which, is decided here
(docs/adr/0018-elastic-trials.md): with a number that shares the batch, growing or shrinking only
when the work is saved, and with more than the least only while no other trial lacks its own. Loads
torch.
"""

import asyncio
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import (
    ResourceRequestPriority,
)
from ray.exceptions import RayError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR
from ray.train.v2._internal.execution.callback import ReportCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ScalingDecision,
)
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
    AUTOSCALING_REQUESTS_EXPIRE_TIME_S,
    AUTOSCALING_REQUESTS_GET_TIMEOUT_S,
    AUTOSCALING_REQUESTS_INTERVAL_S,
)
from ray.train.v2._internal.execution.worker_group import (
    WorkerGroupPollStatus,
    WorkerGroupState,
)

_START_SECONDS = "60"
"""After which a group without room is given up: a node may have died since it was chosen."""
_SETTLE_SECONDS = 10.0
"""Before a start: other trials of the sweep ask for their least meanwhile."""
_PAUSE_SECONDS = 2.0
"""Between looks for room."""


Listen = Callable[[Mapping[str, Any], bool], None]
"""Takes what the first worker reported, and whether a checkpoint came with it."""


class Trainer(TorchTrainer):
    """Trains one attempt in a group of workers, with Ray Train's controller in this process."""

    def __init__(
        self,
        counts: Sequence[int],
        worker: Any,
        *,
        on_report: Listen,
        on_restart: Callable[[], None],
        **options: Any,
    ) -> None:
        """Prepare a trial's attempt.

        Args:
            counts: Numbers of workers that it may have, ascending.
            worker: What each of them runs.
            on_report: Hears of every report, but perhaps not of a group's last ones: Ray Train may
                replace it before it passes them on.
            on_restart: Is called before every group but the first, when the one before is gone.
            options: Of `TorchTrainer`; its scaling goes from the least to the most of `counts`.
        """
        super().__init__(worker, **options)
        self._counts = counts
        self._listener = _Listener(on_report, on_restart)
        if len(counts) > 1:
            # Other trials wait for the workers of those before them as long as it takes; an
            # elastic one decides again, as there may be room for fewer.
            os.environ[WORKER_GROUP_START_TIMEOUT_S_ENV_VAR] = _START_SECONDS

    def _create_default_callbacks(self) -> list[Any]:
        # Each of these starts a process: for Ray's data sets, of which there are none, and to
        # free the workers of a driver that dies, which the sweep's process does (`bridge.py`).
        processes = (DatasetsCallback, PlacementGroupCleanerCallback)
        usual = super()._create_default_callbacks()  # type: ignore[misc]
        return [*(item for item in usual if not isinstance(item, processes)), self._listener]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        if len(self._counts) > 1:
            options["scaling_policy"] = ElasticPolicy(self.scaling_config, self._counts)
        controller = TrainController(**options)
        asyncio.run(controller.run())  # type: ignore[no-untyped-call]
        return controller.get_result()


class _Listener(ReportCallback, WorkerGroupCallback):
    def __init__(self, on_report: Listen, on_restart: Callable[[], None]) -> None:
        self._on_report = on_report
        self._on_restart = on_restart
        self._started = False

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        if self._started:
            self._on_restart()
        self._started = True

    def after_report(self, training_report: Any, metrics: Sequence[Mapping[str, Any]]) -> None:
        self._on_report(metrics[0], training_report.checkpoint is not None)


class ElasticPolicy(ElasticScalingPolicy):
    """Decides on the size of one trial's group.

    All controllers tell Ray's coordinator what they want, and it reserves first what is asked for
    with high priority: the least of every trial, in the order in which they asked. What is left
    goes to those that asked for more. It asks the autoscaler for all of it.
    """

    def __init__(self, scaling_config: Any, counts: Sequence[int]) -> None:
        """Choose among `counts` of workers, ascending."""
        super().__init__(scaling_config)
        self._counts = counts
        self._began: float | None = None
        self._asked = -math.inf

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Start the largest group that has room, or wait for room."""
        self._ask()
        if self._began is None:
            self._began = time.monotonic()
        if time.monotonic() - self._began >= _SETTLE_SECONDS and (count := self._choose(held=0)):
            return self._get_resize_decision(count)
        time.sleep(_PAUSE_SECONDS)  # Ray's controller asks again at once, with a whole processor
        return NoopDecision()

    def make_decision_for_running_worker_group(
        self, worker_group_state: WorkerGroupState, worker_group_status: WorkerGroupPollStatus
    ) -> ScalingDecision:
        """Change the size right after a checkpoint has arrived, which costs no work."""
        self._ask()
        statuses = worker_group_status.worker_statuses.values()
        reports = [status.training_report for status in statuses if status.training_report]
        saved = [report.metrics for report in reports if report.checkpoint is not None]
        if any(metrics["step"] < metrics["total"] for metrics in saved):
            held = worker_group_state.num_workers
            count = self._choose(held=held)
            if count not in (0, held):
                return self._get_resize_decision(count)
        return NoopDecision()

    def _choose(self, held: int) -> int:
        """Return the number of workers to go on with; 0 where there is no room for the least."""
        reserved = self._get_reserved_resources()
        if reserved is None:
            return 0
        # A reservation is up to 20 seconds old, and others may not have made room for it yet.
        free = available_resources_per_node()  # type: ignore[no-untyped-call]
        room = min(
            self._count_possible_workers(reserved), self._count_possible_workers(free) + held
        )
        return max((count for count in self._counts if count <= room), default=0)

    def _get_num_workers_for_resource_request(self) -> int:
        return self._counts[0]

    @property
    def _further(self) -> str:
        """The name under which the trial asks for more than its least."""
        return f"{self._requester_id}-further"

    def _ask(self) -> None:
        self._maybe_send_resource_request()  # type: ignore[no-untyped-call]
        if time.monotonic() - self._asked >= AUTOSCALING_REQUESTS_INTERVAL_S:
            worker = self.scaling_config._resources_per_worker_not_none
            self._autoscaling_coordinator.request_resources.remote(
                requester_id=self._further,
                resources=[worker] * (self._counts[-1] - self._counts[0]),
                expire_after_s=AUTOSCALING_REQUESTS_EXPIRE_TIME_S,
                priority=ResourceRequestPriority.MEDIUM,
            )
            self._asked = time.monotonic()

    def _cancel_resource_request(self) -> None:
        super()._cancel_resource_request()  # type: ignore[no-untyped-call]
        if self._coordinator_client is not None:
            with suppress(RayError):  # it expires by itself
                ray.get(
                    self._autoscaling_coordinator.cancel_request.remote(self._further),
                    timeout=AUTOSCALING_REQUESTS_GET_TIMEOUT_S,
                )

    def _get_reserved_resources(self) -> dict[str, dict[str, float]] | None:
        """Return what is reserved for the trial on each node; None: that cannot be told now."""
        ask = self._autoscaling_coordinator.get_reserved_resources.remote
        try:
            least, further = ray.get(
                [ask(self._requester_id), ask(self._further)],
                timeout=AUTOSCALING_REQUESTS_GET_TIMEOUT_S,
            )
        except RayError:
            return None
        return {
            node: {
                name: least.get(node, {}).get(name, 0) + further.get(node, {}).get(name, 0)
                for name in least.get(node, {}).keys() | further.get(node, {}).keys()
            }
            for node in least.keys() | further.keys()
        }
