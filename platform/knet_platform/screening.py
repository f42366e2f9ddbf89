"""`scheduler: asha`: the first seed of every arm is a screen, the other seeds follow it in full.

An arm is judged at shares of its own run, since schedules stretch with a run's length. Its other
seeds are not judged: a mean over those seeds that happened to pass would flatter it.
"""

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from knet_platform.pace import num_iterations
from knet_platform.storage import EvaluationLike, Pruned, Store
from knet_platform.sweep import Sweep, Trial


def screens(sweep: Sweep, trial: Trial) -> bool:
    """Return whether a trial decides if its arm goes on."""
    return sweep.scheduler is not None and trial.seed == sweep.seeds[0]


def screened_out(sweep: Sweep, store: Store, trial: Trial) -> Pruned | None:
    """Return where the screen stopped the trial's arm, if it did: the sweep leaves it as it is.

    Raises:
        StorageError: The store cannot be read.
    """
    if sweep.scheduler is None or trial.arm == sweep.baseline:
        return None
    first = next(t for t in sweep.trials if t.arm == trial.arm and screens(sweep, t))
    pruned = store.trial(first.hash).pruned()
    return pruned if pruned is not None and pruned.sweep == sweep.name else None


class Screen:
    """Ray's ASHA, asked about single evaluations.

    Tune itself would kill a trial that fails; asked this way it can save first, and go on later.
    """

    def __init__(self, sweep: Sweep) -> None:
        """Start without any evaluation; `sweep` has a scheduler."""
        from ray.tune.schedulers import ASHAScheduler  # reports and plans need no Ray

        assert sweep.scheduler is not None, "only a sweep with a scheduler is screened"
        self._sweep = sweep
        self._seen: dict[str, SimpleNamespace] = {}
        # Annotated for whole numbers and for Tune's own objects; it compares the ones and reads
        # the id of the others.
        asha: Any = ASHAScheduler
        self._asha = asha(
            time_attr="share",
            metric="value",
            mode=sweep.metric.mode,
            max_t=1,
            grace_period=sweep.scheduler.grace,
            reduction_factor=sweep.scheduler.reduction_factor,
            stop_last_trials=False,
        )

    def recall(self, store: Store) -> None:
        """Let new evaluations be compared with those of earlier runs.

        Raises:
            StorageError: The store cannot be read.
        """
        for trial in self._sweep.distinct_trials:
            total = num_iterations(trial.recipe)
            folder = store.trial(trial.hash)
            if (
                screens(self._sweep, trial)
                and total
                and (known := folder.result() or folder.state())
            ):
                self.rejects(trial, known.evaluations, total)

    def rejects(self, trial: Trial, evaluations: Sequence[EvaluationLike], total: int) -> bool:
        """Take what a trial of `total` steps measured; return whether it should stop.

        The baseline never should, as every other arm is compared with it, and no trial at its
        last step.
        """
        if not screens(self._sweep, trial):
            return False
        rejected = False
        for point in evaluations:
            value = point.metrics.get(self._sweep.metric.name, math.nan)
            if math.isfinite(value) and point.step < total:
                rejected |= self._is_below(trial.hash, point.step / total, value)
        return rejected and trial.arm != self._sweep.baseline

    def _is_below(self, trial_hash: str, share: float, value: float) -> bool:
        if trial_hash not in self._seen:
            self._seen[trial_hash] = SimpleNamespace(trial_id=trial_hash)
            self._asha.on_trial_add(None, self._seen[trial_hash])
        result = {"share": share, "value": value}
        action = self._asha.on_trial_result(None, self._seen[trial_hash], result)
        return bool(action == self._asha.STOP)
