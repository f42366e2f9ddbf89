"""A sweep on Ray Tune: starts what is not finished, tells tracker and progress what happens.

Everything that must outlive this process is in the store. A run starts a fresh `Tuner` over the
trials without a result; Ray Train finds their checkpoints in their folders. So starting and
continuing are one and the same, whatever ended the run before.
"""

import fcntl
import os
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import ray.tune
from ray.tune.experiment import Trial as TuneTrial

from knet_platform import attempts
from knet_platform.budget import Governor, limit_seconds
from knet_platform.cluster import HEAD, connected, trial_slots
from knet_platform.driver import TrialJob, run_trial
from knet_platform.errors import InterruptedSweepError, StorageError, UsageError
from knet_platform.forecast import look_up
from knet_platform.planning import Sweep, Trial
from knet_platform.prices import Price
from knet_platform.progress import Moment, Progress, show_metric
from knet_platform.provenance import capture, with_absolute_root
from knet_platform.report import Report, build_report, write_report
from knet_platform.source import read_source
from knet_platform.storage import Cause, Evaluation, Failure, Store
from knet_platform.tracking import Tracker
from knet_platform.tracking.protocol import Status

DRIVER_RESTARTS = 2
"""Times that a driver process which dies is started again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepOutcome:
    """How a sweep stands when its run ends."""

    finished: tuple[Trial, ...]
    failed: tuple[tuple[Trial, str], ...]
    """Trials with their reasons."""
    paused: tuple[Trial, ...]
    """Trials that the budget was not enough for; they can go on."""
    report: Report
    files: Mapping[str, Path]
    """The report's files, as `write_report` names them."""


def run_sweep(
    sweep: Sweep,
    store: Store,
    tracker: Tracker,
    progress: Progress,
    *,
    home: Path,
    scale: str | None = None,
    price: Price | None = None,
    only_failed: bool = False,
    trainable: Callable[[dict[str, Any]], None] = run_trial,
) -> SweepOutcome:
    """Run every trial of `sweep` that has no result yet, then write the report.

    A trial that fails does not stop the others.

    Args:
        sweep: What to run.
        store: Where results and checkpoints are and go.
        tracker: Told everything; its failures after the start stop nothing.
        progress: Told the same, for people.
        home: State folder; takes the lock and `reports/<sweep>/`.
        scale: Name of the scale, for the report's heading.
        price: What an hour of one trial costs; needed for a budget in USD.
        only_failed: Run the trials that failed, and no others.
        trainable: What Tune runs for each trial, given a `TrialJob` as `run_trial` is.

    Raises:
        UsageError: Another process runs the same sweep.
        TrackingError: The tracker cannot be used.
        CapacityError: The cluster can never hold a trial.
        StorageError: The store cannot be used.
        InterruptedSweepError: SIGTERM; the same call continues.
        KeyboardInterrupt: SIGINT; likewise.
    """
    with sweep_lock(sweep.name, home):
        tracker.start_sweep(sweep)
        try:
            bridge = _run_unfinished(
                sweep, store, tracker, progress, price, trainable, only_failed=only_failed
            )
            report = build_report(sweep, store, scale=scale)
            files = write_report(report, home / "reports" / sweep.name)
        except (KeyboardInterrupt, InterruptedSweepError):
            tracker.finish_sweep("KILLED")
            raise
        except Exception:
            tracker.finish_sweep("FAILED")
            raise
        failed, left = bridge.failed, bridge.left
        status: Status = "FAILED" if failed else "KILLED" if left else "FINISHED"
        tracker.finish_sweep(status, list(files.values()))
    return SweepOutcome(
        finished=tuple(t for t in sweep.trials if t.hash not in failed.keys() | left),
        failed=tuple((t, failed[t.hash]) for t in sweep.trials if t.hash in failed),
        paused=tuple(t for t in sweep.trials if t.hash in bridge.paused),
        report=report,
        files=files,
    )


def _run_unfinished(
    sweep: Sweep,
    store: Store,
    tracker: Tracker,
    progress: Progress,
    price: Price | None,
    trainable: Callable[[dict[str, Any]], None],
    *,
    only_failed: bool,
) -> "_Bridge":
    """Return what heard of every trial."""
    states = {trial.hash: store.trial(trial.hash).status() for trial in sweep.distinct_trials}
    unfinished = [trial for trial in sweep.by_priority if states[trial.hash] != "finished"]
    _catch_up(sweep, unfinished, store, tracker)
    todo = [trial for trial in unfinished if not only_failed or states[trial.hash] == "failed"]
    governor = _governor(sweep, store, price)
    bridge = _Bridge(sweep, todo, store, tracker, progress, governor)
    bridge.left = {trial.hash for trial in unfinished} - {trial.hash for trial in todo}
    if todo:
        with _interruptible(sweep, bridge) as listen, connected():
            listen()  # again: Ray has put its own handler in place
            _run_trials(sweep, todo, store, bridge, price, trainable)
    for trial in todo:
        known = trial.hash in bridge.failed.keys() | bridge.paused
        if not known and store.trial(trial.hash).status() != "finished":
            bridge.failed[trial.hash] = "ended without a result; run the same command again"
    bridge.left |= bridge.paused
    return bridge


def _governor(sweep: Sweep, store: Store, price: Price | None) -> Governor | None:
    limit = limit_seconds(sweep, price.usd_per_hour if price else 0.0)
    if limit is None:
        return None
    rows = look_up(sweep, store)
    spent = {row.trial.hash: row.done.seconds for row in rows if row.done is not None}
    return Governor(limit, spent=spent, priority=[trial.hash for trial in sweep.by_priority])


def _run_trials(
    sweep: Sweep,
    todo: Sequence[Trial],
    store: Store,
    bridge: "_Bridge",
    price: Price | None,
    trainable: Callable[[dict[str, Any]], None],
) -> None:
    resources = sweep.resources
    slots = trial_slots(resources)
    run_id = bridge.run_id
    source = read_source()
    for trial in todo:
        folder = store.trial(trial.hash)
        bridge.attempts[trial.hash] = attempts.claim(folder, run_id)
        if folder.provenance() is None:
            provenance = capture(trial.recipe, workers=resources.workers, source=source)
            folder.write_provenance(provenance, source.patch)
    jobs = [
        TrialJob(
            trial_hash=trial.hash,
            recipe=with_absolute_root(trial.recipe).to_dict(),
            store_uri=store.uri,
            run_id=run_id,
            workers=resources.workers,
            cpus_per_worker=resources.cpus_per_worker,
            gpus_per_worker=resources.gpus_per_worker,
            hang_minutes=resources.hang_minutes,
            usd_per_hour=price.usd_per_hour if price and not price.assumed else None,
        )
        for trial in todo
    ]
    # One driver more than can train: it loads while another trains, and waits for its workers.
    concurrent = slots + 1
    if resources.max_concurrent is not None and resources.max_concurrent <= slots:
        concurrent = resources.max_concurrent
    with tempfile.TemporaryDirectory(prefix="knet-tune-") as scratch:
        ray.tune.Tuner(
            ray.tune.with_resources(trainable, HEAD),
            param_space={"job": ray.tune.grid_search([asdict(job) for job in jobs])},
            tune_config=ray.tune.TuneConfig(
                max_concurrent_trials=concurrent,
                reuse_actors=True,  # a driver has loaded torch; the next need not
                trial_name_creator=_name,
                trial_dirname_creator=_name,
            ),
            run_config=ray.tune.RunConfig(
                name=sweep.name,
                storage_path=scratch,  # nothing is ever restored from Tune's own files
                failure_config=ray.tune.FailureConfig(max_failures=DRIVER_RESTARTS),
                callbacks=[bridge],
                verbose=0,
            ),
        ).fit()


def _name(trial: TuneTrial) -> str:
    return str(trial.config["job"]["trial_hash"])


class _Bridge(ray.tune.Callback):
    """Hears of every trial from Tune, in this process: the only writer to the tracker."""

    def __init__(
        self,
        sweep: Sweep,
        todo: Sequence[Trial],
        store: Store,
        tracker: Tracker,
        progress: Progress,
        governor: Governor | None,
    ) -> None:
        self.run_id = uuid.uuid4().hex
        self.failed: dict[str, str] = {}
        """Reasons by trial hash."""
        self.paused: set[str] = set()
        """Hashes of trials that the budget was not enough for."""
        self.left: set[str] = set()
        """Hashes of all trials that are neither finished nor failed."""
        self.attempts: dict[str, int] = {}
        """Attempts begun so far, by trial hash."""
        self._sweep = sweep
        self._trials = {trial.hash: trial for trial in todo}
        self._store = store
        self._tracker = tracker
        self._progress = progress
        self._governor = governor
        self._allowed: frozenset[str] | None = None
        self._running: set[str] = set()
        self._ended: set[str] = set()
        self._stopped: dict[str, str] = {}
        """Reasons by hash of trials that need not be tried."""
        self._refused: dict[str, list[Trial]] = {}
        """Trials by the words in which their configuration was refused."""
        self._values: dict[str, dict[str, float]] = {trial.hash: {} for trial in todo}

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune saves its callbacks for a restoration that never happens."""
        return {}

    def on_step_begin(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        """Tell trials to stop that the budget is not enough for; Tune calls this all the time."""
        allowed = self._governor.allowed(time.monotonic()) if self._governor else None
        if allowed is not None and allowed != self._allowed:
            if self._allowed is None:
                self._progress.note("budget: nothing new starts; what it cannot pay for stops")
            attempts.allow(self._store, self.run_id, allowed)
            self._allowed = allowed

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: Any, **info: Any
    ) -> None:
        """Take what a driver or the first worker reported."""
        ours = self._trials[_name(trial)]
        if "attempt" in result:
            self._begin(ours, result["attempt"])
        if "points" in result:
            self._advance(ours, result)
        if "retry" in result:
            self._progress.note(f"{ours.name}  tries again after: {result['retry']}")
        if result.get("outcome") == "finished":
            self._end(ours)
        elif result.get("outcome") == "failed":
            self._end(ours, result["reason"])
            self._stop_alike(ours, result["cause"], result["reason"])
        elif result.get("outcome") == "stopped":
            self._end(ours, self._stopped.get(ours.hash, "taken over by another run"))
        elif result.get("outcome") == "paused":
            self._pause(ours)

    def on_trial_recover(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        """Record that a driver died and is started again."""
        ours = self._trials[_name(trial)]
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
        self._progress.note(f"{ours.name}  {failure.message}; {failure.action}")

    def on_trial_error(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any
    ) -> None:
        """Record that a driver itself broke, as often as it was started."""
        ours = self._trials[_name(trial)]
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
        for trial_hash in self._running:
            self._tracker.finish_trial(trial_hash, "KILLED", "interrupted; the sweep can go on")

    def _begin(self, trial: Trial, attempt: int) -> None:
        self.attempts[trial.hash] = attempt
        self._running.add(trial.hash)
        if self._governor:
            self._governor.begin(trial.hash, time.monotonic())
        self._tracker.start_trial(trial, attempt)
        self._log_provenance(trial)
        self._progress.begin(trial, attempt)

    def _advance(self, trial: Trial, result: Mapping[str, Any]) -> None:
        points = [Evaluation(**point) for point in result["points"]]
        self._tracker.log_points(trial.hash, points)
        values = self._values[trial.hash]
        for point in points:
            values.update(point.metrics)
        if "picture" in result:
            try:
                png = self._store.trial(trial.hash).read_bytes(result["picture"])
            except StorageError as error:
                self._progress.note(f"{trial.name}  picture not shown: {error}")
            else:
                self._tracker.log_picture(trial.hash, result["step"], png)
        if "step" in result:
            if self._governor:
                now = time.monotonic()
                self._governor.advance(trial.hash, result["step"], result["total"], now)
            moment = Moment(
                step=result["step"],
                total=result["total"],
                loss=values.get("train/loss"),
                metric=values.get(self._sweep.metric.name),
            )
            self._progress.update(trial, moment)

    def _log_provenance(self, trial: Trial) -> None:
        try:
            files = self._store.trial(trial.hash).provenance_files()
        except StorageError as error:
            self._progress.note(f"{trial.name}  provenance not tracked: {error}")
            return
        for name, content in files.items():
            self._tracker.log_file(trial.hash, name, content)

    def _pause(self, trial: Trial) -> None:
        self.paused.add(trial.hash)
        if trial.hash in self._running:
            self._leave(trial)
            self._tracker.finish_trial(trial.hash, "KILLED", "budget reached; it can go on")
            self._progress.end(trial, "stopped: budget reached; it can go on")

    def _leave(self, trial: Trial) -> None:
        self._running.discard(trial.hash)
        if self._governor:
            self._governor.end(trial.hash, time.monotonic())

    def _end(self, trial: Trial, failure: str | None = None) -> None:
        started = trial.hash in self._running
        self._leave(trial)
        self._log_provenance(trial)  # by now with the first worker's machine
        self._ended.add(trial.hash)
        if failure is not None:
            self.failed[trial.hash] = failure
            stopped = trial.hash in self._stopped
            if not stopped or started:
                self._tracker.finish_trial(trial.hash, "KILLED" if stopped else "FAILED", failure)
            self._progress.end(trial, failure if stopped else f"failed: {failure}")
            return
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


def _catch_up(sweep: Sweep, todo: Sequence[Trial], store: Store, tracker: Tracker) -> None:
    """Tell the tracker what it missed: results of other sweeps, the end of a killed process."""
    unfinished = {trial.hash for trial in todo}
    for trial in sweep.distinct_trials:
        status = tracker.status(trial.hash)
        if trial.hash in unfinished:
            if status == "RUNNING":
                tracker.finish_trial(trial.hash, "KILLED", "ended without a word")
            continue
        if status == "FINISHED":
            continue
        folder = store.trial(trial.hash)
        result = folder.result()
        assert result is not None, "a finished trial has a result"
        last = Evaluation(step=result.step, time=time.time(), metrics=result.metrics)
        tracker.start_trial(trial, attempts.count(folder))
        tracker.log_points(trial.hash, [*result.evaluations, last])
        for name, content in folder.provenance_files().items():
            tracker.log_file(trial.hash, name, content)
        tracker.finish_trial(trial.hash, "FINISHED")


@contextmanager
def sweep_lock(name: str, home: Path) -> Iterator[None]:
    """Keep other processes from running the same sweep; the kernel frees it if this one dies.

    Raises:
        UsageError: Another process runs it.
    """
    folder = home / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UsageError(
                f"sweep {name}: process {file.read().strip() or 'unknown'} is running it in "
                f"{home}; wait for it, or end it and run the same command again"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


@contextmanager
def _interruptible(sweep: Sweep, bridge: _Bridge) -> Iterator[Callable[[], None]]:
    """Close the runs of unfinished trials on SIGINT and SIGTERM; yield what sets the handler.

    SIGTERM becomes KeyboardInterrupt, which nothing on the way takes for a failed trial.
    """
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    def listen() -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, stop)

    before = signal.getsignal(signal.SIGTERM)
    listen()
    try:
        yield listen
    except KeyboardInterrupt:
        bridge.interrupt()
        if signal.SIGTERM not in received:
            raise
        raise InterruptedSweepError(
            f"{sweep.path}: stopped by SIGTERM; the same command continues it"
        ) from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
