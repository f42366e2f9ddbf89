"""Hears of every trial from Tune and tells tracker, progress and budget; stops what cannot help.

Runs in the process of the sweep, which alone writes to the tracker.
"""

import time
import uuid
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ray.tune
from ray.tune.experiment import Trial as TuneTrial

from knet_platform import attempts
from knet_platform.budget import Governor
from knet_platform.cluster import release_abandoned
from knet_platform.errors import StorageError
from knet_platform.gauges import State, SweepGauges
from knet_platform.progress import Moment, Progress, show_metric
from knet_platform.screening import Screen
from knet_platform.storage import Cause, Evaluation, Failure, Pruned, Store
from knet_platform.sweep import Sweep, Trial
from knet_platform.tracking import Tracker, TrialModel, TrialRun

TAKEN_OVER = (
    "taken over by another run, which goes on from its newest checkpoint; once that has ended, "
    "the same command takes its result"
)
GAUGE_SECONDS = 5.0
"""Between looks at how the whole sweep stands."""


class Bridge(ray.tune.Callback):
    """Hears of every trial from Tune, in this process: the only writer to the tracker."""

    def __init__(
        self,
        sweep: Sweep,
        todo: Sequence[Trial],
        store: Store,
        tracker: Tracker,
        progress: Progress,
        governor: Governor,
        gauges: SweepGauges,
        screen: Screen | None,
        *,
        others: Counter[State],
    ) -> None:
        self.run_id = uuid.uuid4().hex
        self.failed: dict[str, str] = {}
        """Reasons by trial hash."""
        self.paused: set[str] = set()
        """Hashes of trials that the budget was not enough for."""
        self.pruned: set[str] = set()
        """Hashes of trials that the screen leaves unfinished, started or not."""
        self.waiting: set[str] = set()
        """Hashes of members of a population that wait for the others of their round."""
        self.left: set[str] = set()
        """Hashes of all other trials that are neither finished nor failed."""
        self.attempts: dict[str, int] = {}
        """Attempts begun so far, by trial hash."""
        self._sweep = sweep
        self._trials = {trial.hash: trial for trial in todo}
        self._store = store
        self._tracker = tracker
        self._progress = progress
        self._governor = governor
        self._gauges = gauges
        self._looked = -GAUGE_SECONDS
        self._screen = screen
        self._others = others
        """States of the sweep's trials that this run leaves as they are."""
        self._allowed: frozenset[str] | None = None
        self._running: set[str] = set()
        self._ended: set[str] = set()
        self._stopped: dict[str, str] = {}
        """Reasons by hash of trials that need not be tried."""
        self._pruned: dict[str, Pruned] = {}
        """Trials that the screen told to stop, by hash."""
        self._refused: dict[str, list[Trial]] = {}
        """Trials by the words in which their configuration was refused."""
        self._values: dict[str, dict[str, float]] = {trial.hash: {} for trial in todo}

    def add(self, trial: Trial) -> None:
        """Expect one more trial, which a search suggested."""
        self._trials[trial.hash] = trial
        self._values[trial.hash] = {}

    @property
    def may_start(self) -> bool:
        """Whether the budget lets further trials start."""
        return self._allowed is None

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune saves its callbacks for a restoration that never happens."""
        return {}

    def on_step_begin(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        """Tell trials to stop that the budget is not enough for; Tune calls this all the time."""
        now = time.monotonic()
        if now - self._looked >= GAUGE_SECONDS:
            self._look(now)
        allowed = self._governor.allowed(now)
        if allowed is not None and allowed != self._allowed:
            if self._allowed is None:
                self._progress.note("budget: nothing new starts; what it cannot pay for stops")
            attempts.allow(self._store, self.run_id, allowed)
            self._allowed = allowed

    def on_experiment_end(self, trials: list[TuneTrial], **info: Any) -> None:
        """Say how it ended."""
        self._look(time.monotonic())

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: Any, **info: Any
    ) -> None:
        """Take what a driver or the first worker reported."""
        ours = self._trials[hash_of(trial)]
        if "attempt" in result:
            self._begin(ours, result["attempt"])
        if "points" in result:
            self._advance(ours, result)
        if "retry" in result:
            self._progress.note(f"{ours.name}  tries again after: {result['retry']}")
            if "cause" in result:  # not a damaged checkpoint, which ends no attempt
                self._gauges.retried(result["cause"])
        if result.get("outcome") == "finished":
            self._end(ours)
        elif result.get("outcome") == "failed":
            self._end(ours, result["reason"])
            self._stop_alike(ours, result["cause"], result["reason"])
        elif result.get("outcome") == "stopped":
            self._end(ours, self._stopped.setdefault(ours.hash, TAKEN_OVER))
        elif result.get("outcome") == "paused":
            self.paused.add(ours.hash)
            self._stop(ours, "budget reached; it can go on")
        elif result.get("outcome") == "waiting":
            self.waiting.add(ours.hash)
            self._leave(ours)
        elif result.get("outcome") == "pruned":
            self._stop(ours, str(self._pruned[ours.hash]))

    def on_trial_complete(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        """Let Tune forget the recipe and the curves, which it keeps of every trial."""
        kept = {"trial_hash": hash_of(trial)}
        trial.config = kept
        trial.evaluated_params = {}
        trial.experiment_tag = ""  # has the recipe in it, too
        trial.last_result.clear()
        trial.last_result.update(kept, config=kept)  # of one without values Tune prints a line
        trial.metric_analysis.clear()
        trial.metric_n_steps.clear()

    def on_trial_recover(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        """Record that a driver died and is started again."""
        release_abandoned()
        ours = self._trials[hash_of(trial)]
        store = self._store.trial(ours.hash)
        step = store.latest_step()
        failure = Failure(
            cause="preempted",
            kind="DriverError",
            message="the trial's driver died",
            action=f"retried from step {step}",
            attempt=self.attempts[ours.hash],
            step=step,
        )
        store.write_failure(failure, final=False)
        self._gauges.retried(failure.cause)
        self._progress.note(f"{ours.name}  {failure.message}; {failure.action}")

    def on_trial_error(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        """Record that a driver itself broke, as often as it was started."""
        release_abandoned()
        ours = self._trials[hash_of(trial)]
        error = str(trial.get_error() or "ended without a word")
        reason = f"driver: {error.strip().splitlines()[-1]}"
        store = self._store.trial(ours.hash)
        failure = Failure(
            cause="crash",
            kind="DriverError",
            message=reason,
            action="stopped the trial",
            attempt=self.attempts[ours.hash],
            step=store.latest_step(),
        )
        store.write_failure(failure)
        self._end(ours, reason)
        self._tracker.log_points(ours.hash, store.points())  # what it had not passed on

    def _stop_alike(self, failed: Trial, cause: Cause, reason: str) -> None:
        """Stop the trials that would fail in the same way, before they are paid for."""
        alike: list[Trial] = []
        if cause == "data":
            alike = [t for t in self._trials.values() if t.recipe.data == failed.recipe.data]
        elif cause == "configuration":
            before = self._refused.setdefault(reason, [])
            # Two arms that set nothing in common and are refused in the same words: it lies in
            # what all arms share.
            everywhere = any(not _in_common(failed, other) for other in before)
            before.append(failed)
            alike = [t for t in self._trials.values() if everywhere or t.arm == failed.arm]
        for trial in alike:
            if trial.hash not in self._ended and trial.hash not in self._stopped:
                self._stopped[trial.hash] = f"stopped, as {failed.name} failed: {reason}"
                attempts.revoke(self._store.trial(trial.hash))

    def interrupt(self) -> None:
        """Close the runs of trials that are not finished; they can go on later."""
        for trial_hash in self._running | self.waiting:
            self._tracker.finish_trial(trial_hash, "KILLED", "interrupted; the sweep can go on")

    def leave(self, unfinished: Collection[str]) -> None:
        """Take note of trials whose population cannot go on in this run of the sweep."""
        reason = "waits for others of its population; it can go on"
        for trial_hash in self.waiting:
            self._tracker.finish_trial(trial_hash, "KILLED", reason)
        can_go_on = set(unfinished) - self.failed.keys()
        (self.left if self.may_start else self.paused).update(can_go_on)

    def note(self, text: str) -> None:
        """Tell people something about the sweep."""
        self._progress.note(text)

    def _begin(self, trial: Trial, attempt: int) -> None:
        self.waiting.discard(trial.hash)
        self.attempts[trial.hash] = attempt
        self._running.add(trial.hash)
        self._gauges.begin(trial, attempt)
        self._governor.begin(trial.hash, time.monotonic())
        self._tracker.start_trial(TrialRun.of(trial), attempt)
        self._log_provenance(trial)
        self._progress.begin(trial, attempt)

    def _advance(self, trial: Trial, result: Mapping[str, Any]) -> None:
        points = [Evaluation(**point) for point in result["points"]]
        self._tracker.log_points(trial.hash, points)
        values = self._values[trial.hash]
        for point in points:
            values.update(point.metrics)
        if self._sweep.metric.name in values:
            self._gauges.evaluated(trial, values[self._sweep.metric.name])
        if "picture" in result:
            try:
                png = self._store.trial(trial.hash).read_bytes(result["picture"])
            except StorageError as error:
                self._progress.note(f"{trial.name}  picture not shown: {error}")
            else:
                self._tracker.log_picture(trial.hash, result["step"], png)
        if "step" in result:
            self._gauges.reported(trial, result, saved=result["saved"])
            now = time.monotonic()
            self._governor.advance(trial.hash, result["step"], result["total"], now)
            moment = Moment(
                step=result["step"],
                total=result["total"],
                loss=values.get("train/loss"),
                metric=values.get(self._sweep.metric.name),
            )
            self._progress.update(trial, moment)
            self._judge(trial, points, result["total"])

    def _judge(self, trial: Trial, points: Sequence[Evaluation], total: int) -> None:
        if self._screen is None or not self._screen.rejects(trial, points, total):
            return
        if trial.hash not in self._pruned:
            step = points[-1].step
            pruned = Pruned(sweep=self._sweep.name, run=self.run_id, step=step, total=total)
            self._pruned[trial.hash] = pruned
            self._store.trial(trial.hash).write_pruned(pruned)

    def _log_provenance(self, trial: Trial) -> None:
        try:
            files = self._store.trial(trial.hash).provenance_files()
        except StorageError as error:
            self._progress.note(f"{trial.name}  provenance not tracked: {error}")
            return
        for name, content in files.items():
            self._tracker.log_file(trial.hash, name, content)

    def _log_model(self, trial: Trial) -> None:
        try:
            model = TrialModel.of(trial, self._store.trial(trial.hash))
        except StorageError as error:
            self._progress.note(f"{trial.name}  model not tracked: {error}")
            return
        if model is not None:
            self._tracker.log_model(trial.hash, model)

    def _stop(self, trial: Trial, reason: str) -> None:
        if trial.hash in self._running:
            self._leave(trial)
            self._tracker.finish_trial(trial.hash, "KILLED", reason)
            self._progress.end(trial, reason)

    def _leave(self, trial: Trial) -> None:
        self._running.discard(trial.hash)
        self._gauges.end(trial)
        self._governor.end(trial.hash, time.monotonic())

    def _look(self, now: float) -> None:
        """Tell Prometheus how the sweep stands."""
        self._looked = now
        states = self._others + Counter(map(self._state, self._trials))
        spent = self._governor.spent(now)
        self._gauges.look(states, seconds=spent, unsent=self._tracker.unsent)

    def _state(self, trial_hash: str) -> State:
        if trial_hash in self._running:
            return "running"
        if trial_hash in self.failed:
            return "failed"
        if trial_hash in self._ended:
            return "finished"
        return "pruned" if trial_hash in self._pruned else "waiting"

    def _end(self, trial: Trial, failure: str | None = None) -> None:
        stopped = trial.hash in self._stopped
        if trial.hash not in self._running and not stopped:
            self._begin(trial, self.attempts[trial.hash])  # its driver broke before it said so
        started = trial.hash in self._running
        self._leave(trial)
        self._ended.add(trial.hash)
        if started:
            self._log_provenance(trial)  # by now with the first worker's machine
        if failure is not None:
            self.failed[trial.hash] = failure
            if started:
                self._tracker.finish_trial(trial.hash, "KILLED" if stopped else "FAILED", failure)
            self._progress.end(trial, failure if stopped else f"failed: {failure}")
            return
        self._log_model(trial)
        self._tracker.finish_trial(trial.hash, "FINISHED")
        name = self._sweep.metric.name
        value = self._values[trial.hash].get(name)
        self._progress.end(
            trial, "finished" if value is None else f"finished  {show_metric(name, value)}"
        )


def _in_common(one: Trial, other: Trial) -> bool:
    """Tell whether two trials' arms set the same key to the same value, or are one arm."""
    return one.arm == other.arm or any(
        key in other.overrides and other.overrides[key] == value
        for key, value in one.overrides.items()
    )


def hash_of(trial: TuneTrial) -> str:
    """Return the hash of the trial that a Tune trial runs."""
    return str(trial.config["trial_hash"])
