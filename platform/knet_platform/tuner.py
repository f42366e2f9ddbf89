"""A sweep on Ray Tune: starts what is not finished, tells tracker and progress what happens.

Everything that must outlive this process is in the store. A run starts a fresh `Tuner` over the
trials without a result; Ray Train finds their checkpoints in their folders. So starting and
continuing are one and the same, whatever ended the run before.
"""

import signal
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import ray.tune

from knet_platform import attempts
from knet_platform.bridge import Bridge, hash_of
from knet_platform.budget import Governor, limit_seconds
from knet_platform.cluster import HEAD, connected, trial_slots
from knet_platform.driver import TrialJob, run_trial
from knet_platform.errors import InterruptedSweepError
from knet_platform.forecast import look_up
from knet_platform.locks import sweep_lock
from knet_platform.planning import Sweep, Trial
from knet_platform.prices import Price
from knet_platform.progress import Progress
from knet_platform.provenance import capture, with_absolute_root
from knet_platform.report import Report, build_report, write_report
from knet_platform.screening import Screen, screened_out, screens
from knet_platform.source import read_source
from knet_platform.storage import Evaluation, Pruned, Store
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
    pruned: tuple[Trial, ...]
    """Trials of arms that the screen stopped."""
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
        failed, left, pruned = bridge.failed, bridge.left, bridge.pruned
        status: Status = "FAILED" if failed else "KILLED" if left else "FINISHED"
        tracker.finish_sweep(status, list(files.values()))
    return SweepOutcome(
        finished=tuple(t for t in sweep.trials if t.hash not in failed.keys() | left | pruned),
        failed=tuple((t, failed[t.hash]) for t in sweep.trials if t.hash in failed),
        paused=tuple(t for t in sweep.trials if t.hash in bridge.paused),
        pruned=tuple(t for t in sweep.trials if t.hash in pruned),
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
) -> Bridge:
    """Return what heard of every trial."""
    states = {trial.hash: store.trial(trial.hash).status() for trial in sweep.distinct_trials}
    pruned = _pruned(sweep, store)
    done = {trial_hash for trial_hash, state in states.items() if state == "finished"}
    unfinished = [t for t in sweep.by_priority if t.hash not in done | pruned.keys()]
    _catch_up(sweep, done, pruned, store, tracker)
    todo = [trial for trial in unfinished if not only_failed or states[trial.hash] == "failed"]
    governor = _governor(sweep, store, price)
    screen = Screen(sweep) if sweep.scheduler else None
    bridge = Bridge(sweep, todo, store, tracker, progress, governor, screen)
    bridge.left = {trial.hash for trial in unfinished} - {trial.hash for trial in todo}
    if todo:
        with _interruptible(sweep, bridge) as listen, connected():
            listen()  # again: Ray has put its own handler in place
            if screen:
                screen.recall(store)
                first = [trial for trial in todo if screens(sweep, trial)]
                _run_trials(sweep, first, store, bridge, price, trainable)
                pruned = _pruned(sweep, store)
            rest = [t for t in todo if not screens(sweep, t) and t.hash not in pruned]
            _run_trials(sweep, rest, store, bridge, price, trainable)
    bridge.pruned = set(pruned)
    for trial in todo:
        known = trial.hash in bridge.failed.keys() | bridge.paused | bridge.pruned
        if not known and store.trial(trial.hash).status() != "finished":
            bridge.failed[trial.hash] = "ended without a result; run the same command again"
    bridge.left |= bridge.paused
    return bridge


def _pruned(sweep: Sweep, store: Store) -> dict[str, Pruned]:
    """Return what the screen leaves unfinished, by hash."""
    found = {t.hash: screened_out(sweep, store, t) for t in sweep.distinct_trials}
    return {
        trial_hash: pruned
        for trial_hash, pruned in found.items()
        if pruned is not None and store.trial(trial_hash).status() != "finished"
    }


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
    bridge: Bridge,
    price: Price | None,
    trainable: Callable[[dict[str, Any]], None],
) -> None:
    if not todo:
        return
    resources = sweep.resources
    slots = trial_slots(resources)
    run_id = bridge.run_id
    source = read_source()
    for trial in todo:
        folder = store.trial(trial.hash)
        bridge.attempts[trial.hash] = attempts.claim(folder, run_id)
        folder.clear_pruned()
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
    # Tune may still be writing there when the run is interrupted.
    with tempfile.TemporaryDirectory(prefix="knet-tune-", ignore_cleanup_errors=True) as scratch:
        ray.tune.Tuner(
            ray.tune.with_resources(trainable, HEAD),
            param_space={"job": ray.tune.grid_search([asdict(job) for job in jobs])},
            tune_config=ray.tune.TuneConfig(
                max_concurrent_trials=concurrent,
                reuse_actors=True,  # a driver has loaded torch; the next need not
                trial_name_creator=hash_of,
                trial_dirname_creator=hash_of,
            ),
            run_config=ray.tune.RunConfig(
                name=sweep.name,
                storage_path=scratch,  # nothing is ever restored from Tune's own files
                failure_config=ray.tune.FailureConfig(max_failures=DRIVER_RESTARTS),
                callbacks=[bridge],
                verbose=0,
            ),
        ).fit()


def _catch_up(
    sweep: Sweep,
    finished: Collection[str],
    pruned: Mapping[str, Pruned],
    store: Store,
    tracker: Tracker,
) -> None:
    """Tell the tracker what it missed: results of other sweeps, the end of a killed process."""
    for trial in sweep.distinct_trials:
        status = tracker.status(trial.hash)
        if trial.hash not in finished:
            if status == "RUNNING":
                reason = str(pruned.get(trial.hash, "ended without a word"))
                tracker.finish_trial(trial.hash, "KILLED", reason)
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
def _interruptible(sweep: Sweep, bridge: Bridge) -> Iterator[Callable[[], None]]:
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
