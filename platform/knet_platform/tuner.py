"""A sweep on Ray Tune: starts what is not finished, tells tracker and progress what happens.

Everything that must outlive this process is in the store. A run starts a fresh `Tuner` over the
trials without a result; Ray Train finds their checkpoints in their folders. So starting and
continuing are one and the same, whatever ended the run before.
"""

import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import ray.tune

from knet_platform import attempts
from knet_platform.bridge import Bridge, hash_of
from knet_platform.budget import Governor, limit_seconds
from knet_platform.cluster import HEAD, connected, release_abandoned, trial_slots
from knet_platform.driver import TrialJob, run_trial
from knet_platform.errors import InterruptedSweepError
from knet_platform.gauges import State, SweepGauges, ToRay
from knet_platform.home import cache_folder, cache_gb
from knet_platform.links import write_links
from knet_platform.locks import sweep_lock
from knet_platform.planning import worker_counts
from knet_platform.population import Population
from knet_platform.prices import Price
from knet_platform.progress import Progress
from knet_platform.provenance import capture, with_absolute_root
from knet_platform.queueing import Queue
from knet_platform.report import Report, build_report, write_report
from knet_platform.screening import Screen, screened_out, screens
from knet_platform.source import read_source
from knet_platform.storage import Evaluation, Pruned, Store, TrialResult
from knet_platform.sweep import Sweep, Trial
from knet_platform.tracking import SweepRun, Tracker, TrialModel, TrialRun
from knet_platform.tracking.protocol import Status

if TYPE_CHECKING:
    from knet_core import CheckpointState

DRIVER_RESTARTS = 2
"""Times that a driver process which dies is started again."""
CLAIMS = 16
"""Claims of trials that are written at once."""


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
    unsuggested: int
    """Suggestions of a search that the budget was not enough for."""
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
        tracker.start_sweep(SweepRun.of(sweep))
        try:
            write_links(store, sweep.name, {"the sweep's run": tracker.sweep_url()})
            sweep, bridge = _run_unfinished(
                sweep, store, tracker, progress, price, trainable, only_failed=only_failed
            )
            write_links(store, sweep.name, {"its trials compared": tracker.compare_url()})
            report = build_report(sweep, store, scale=scale)
            files = write_report(report, home / "reports" / sweep.name)
        except (KeyboardInterrupt, InterruptedSweepError):
            tracker.finish_sweep("KILLED")
            raise
        except Exception:
            tracker.finish_sweep("FAILED")
            raise
        failed, left, pruned = bridge.failed, bridge.left, bridge.pruned
        unsuggested = sweep.search.to_come if sweep.search else 0
        status: Status = "FAILED" if failed else "KILLED" if left or unsuggested else "FINISHED"
        tracker.finish_sweep(status, list(files.values()))
    return SweepOutcome(
        finished=tuple(t for t in sweep.trials if t.hash not in failed.keys() | left | pruned),
        failed=tuple((t, failed[t.hash]) for t in sweep.trials if t.hash in failed),
        paused=tuple(t for t in sweep.trials if t.hash in bridge.paused),
        pruned=tuple(t for t in sweep.trials if t.hash in pruned),
        unsuggested=unsuggested,
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
) -> tuple[Sweep, Bridge]:
    """Return the sweep, with what its search has added, and what heard of every trial."""
    states = _states(sweep, store)
    pruned = _pruned(sweep, store)
    done = {trial_hash for trial_hash, state in states.items() if state == "finished"}
    unfinished = [t for t in sweep.by_priority if t.hash not in done | pruned.keys()]
    _catch_up(sweep, done, pruned, store, tracker)
    todo = [trial for trial in unfinished if not only_failed or states[trial.hash] == "failed"]
    earlier = _earlier(store, states)
    governor = Governor(
        limit_seconds(sweep, price.usd_per_hour if price else 0.0),
        spent={trial_hash: known.seconds for trial_hash, known in earlier.items()},
        priority=[trial.hash for trial in sweep.by_priority],
    )
    to_ray = ToRay()
    gauges = SweepGauges(sweep, price, to_ray)
    screen = Screen(sweep) if sweep.scheduler else None
    others = _others(states, pruned, todo)
    bridge = Bridge(sweep, todo, store, tracker, progress, governor, gauges, screen, others=others)
    bridge.left = {trial.hash for trial in unfinished} - {trial.hash for trial in todo}
    if todo or (sweep.search and sweep.search.to_come):
        with (
            _interruptible(sweep, bridge) as listen,
            connected(gpus=sweep.resources.gpus_per_worker > 0),
            closing(to_ray),
        ):
            listen()  # again: Ray has put its own handler in place
            _show_earlier(sweep, earlier, gauges)
            tune = _Tune(sweep, store, bridge, price, trainable)
            if screen:
                screen.recall(store)
            if sweep.search:
                sweep = tune.search(todo, lambda trial: _bring(trial, store, tracker))
                added = {h: state for h, state in _states(sweep, store).items() if h not in states}
                todo += [
                    t for t in sweep.by_priority if added.get(t.hash, "finished") != "finished"
                ]
            elif sweep.population:
                tune.evolve(Population(sweep, store), todo)
            elif screen:
                tune.run([trial for trial in todo if screens(sweep, trial)])
            pruned = _pruned(sweep, store)
            judged = bool(screen or sweep.search)
            rest = [t for t in todo if not (judged and t.seed == sweep.seeds[0])]
            if sweep.population:
                rest = []
            tune.run([t for t in rest if t.hash not in pruned])
    bridge.pruned = set(pruned)
    for trial in todo:
        known = trial.hash in bridge.failed.keys() | bridge.paused | bridge.pruned | bridge.left
        if not known and store.trial(trial.hash).status() != "finished":
            bridge.failed[trial.hash] = "ended without a result; run the same command again"
    bridge.left |= bridge.paused
    return sweep, bridge


def _states(sweep: Sweep, store: Store) -> dict[str, str]:
    return {trial.hash: store.trial(trial.hash).status() for trial in sweep.distinct_trials}


def _pruned(sweep: Sweep, store: Store) -> dict[str, Pruned]:
    """Return what the screen leaves unfinished, by hash."""
    found = {t.hash: screened_out(sweep, store, t) for t in sweep.distinct_trials}
    return {
        trial_hash: pruned
        for trial_hash, pruned in found.items()
        if pruned is not None and store.trial(trial_hash).status() != "finished"
    }


def _earlier(
    store: Store, states: Mapping[str, str]
) -> dict[str, "TrialResult | CheckpointState"]:
    """Return what earlier runs have measured, by hash."""
    begun = {h: store.trial(h) for h, state in states.items() if state != "new"}
    found = {trial_hash: folder.result() or folder.state() for trial_hash, folder in begun.items()}
    return {trial_hash: known for trial_hash, known in found.items() if known is not None}


def _others(
    states: Mapping[str, str], pruned: Collection[str], todo: Sequence[Trial]
) -> Counter[State]:
    """Count the trials that are not run, by state."""
    kept: dict[str, State] = {"finished": "finished", "failed": "failed"}
    others = states.keys() - {trial.hash for trial in todo}
    return Counter("pruned" if h in pruned else kept.get(states[h], "waiting") for h in others)


def _show_earlier(
    sweep: Sweep, earlier: Mapping[str, "TrialResult | CheckpointState"], gauges: SweepGauges
) -> None:
    """Tell Prometheus what earlier runs have measured."""
    for trial in sweep.distinct_trials:
        metrics = earlier[trial.hash].metrics if trial.hash in earlier else {}
        if sweep.metric.name in metrics:
            gauges.evaluated(trial, metrics[sweep.metric.name])


class _Tune:
    """Runs trials of one sweep."""

    def __init__(
        self,
        sweep: Sweep,
        store: Store,
        bridge: Bridge,
        price: Price | None,
        trainable: Callable[[dict[str, Any]], None],
    ) -> None:
        self._sweep = sweep
        self._store = store
        self._bridge = bridge
        self._price = price
        self._trainable = trainable
        # No more than can train: Ray gives workers in another order than drivers asked in, and a
        # suggestion made before there is room for it would know less.
        slots = trial_slots(sweep.resources)
        self._concurrent = min(slots, sweep.resources.max_concurrent or slots)
        self._source = read_source()
        self._population: Population | None = None

    def run(self, todo: Sequence[Trial]) -> None:
        """Run these, in their order."""
        if not todo:
            return
        # Once: a member of a population that another run has claimed since is left to it.
        self._claim([trial for trial in todo if trial.hash not in self._bridge.attempts])
        self._fit(Queue(todo, self._config))

    def evolve(self, population: Population, todo: Collection[Trial]) -> None:
        """Run `todo`, its members round by round until they are finished or one cannot go on."""
        names = {trial_hash: trial.name for trial_hash, trial in population.members.items()}
        self._population = population
        ready = [trial for trial in todo if trial.hash not in names]
        while True:
            population.spread()
            waiting = [trial for trial in population.waiting() if trial in todo]
            self.run([*ready, *(t for t in waiting if t.hash not in self._bridge.failed)])
            ready, copies = [], population.judge()
            if copies is None:
                break
            for copy in copies:
                self._bridge.note(
                    f"{names[copy.member]}  copies {names[copy.source]} at step {copy.step}, "
                    f"learning rate x {copy.factor:.4g}"
                )
        self._bridge.leave([t.hash for t in todo if self._store.trial(t.hash).result() is None])

    def search(self, todo: Sequence[Trial], reuse: Callable[[Trial], None]) -> Sweep:
        """Run the first seed of `todo` and what the search suggests; return the sweep with it."""
        from knet_platform.searching import Suggester  # loads optuna, which few sweeps need

        def start(trial: Trial) -> dict[str, Any]:
            if trial.hash not in self._bridge.attempts:  # a suggestion
                self._bridge.add(trial)
                self._claim([trial])
            return self._config(trial)

        first = [trial for trial in todo if trial.seed == self._sweep.seeds[0]]
        self._claim(first)
        suggester = Suggester(
            self._sweep,
            first,
            self._store,
            start=start,
            reuse=reuse,
            may_suggest=lambda: self._bridge.may_start,
        )
        self._fit(suggester)
        return suggester.sweep

    def _claim(self, trials: Sequence[Trial]) -> None:
        """Make trials belong to this run: what another has left of them stops."""

        def claim(trial: Trial) -> int:
            return attempts.claim(self._store.trial(trial.hash), self._bridge.run_id)

        with ThreadPoolExecutor(CLAIMS) as pool:  # each waits for the disk, or for a bucket
            counts = list(pool.map(claim, trials))
        hashes = (trial.hash for trial in trials)
        self._bridge.attempts.update(zip(hashes, counts, strict=True))

    def _config(self, trial: Trial) -> dict[str, Any]:
        """Make a trial ready to run and return its `TrialJob` as Tune has it."""
        resources, price, run_id = self._sweep.resources, self._price, self._bridge.run_id
        folder = self._store.trial(trial.hash)
        recipe, most_evaluations = trial.recipe, None
        if self._population and trial.hash in self._population.members:
            recipe = self._population.recipes()[trial.hash]
            most_evaluations = self._population.evaluations
        folder.clear_pruned()
        provenance = folder.provenance()
        if provenance is None:
            provenance = capture(recipe, workers=resources.most_workers, source=self._source)
            folder.write_provenance(provenance, self._source.patch)
        if most_evaluations is not None:
            folder.write_schedule(recipe)
        job = TrialJob(
            trial_hash=trial.hash,
            recipe=with_absolute_root(recipe).to_dict(),
            data_fingerprint=provenance.data_fingerprint,
            cache={"folder": str(cache_folder()), "gb": cache_gb()},
            store_uri=self._store.uri,
            run_id=run_id,
            workers=worker_counts(recipe, resources),
            cpus_per_worker=resources.cpus_per_worker,
            gpus_per_worker=resources.gpus_per_worker,
            hang_minutes=resources.hang_minutes,
            retention={
                "metric": self._sweep.metric.name,
                "mode": self._sweep.metric.mode,
                "best": resources.keep_best,
            },
            most_evaluations=most_evaluations,
            usd_per_worker_hour=price.usd_per_hour / resources.least_workers
            if price and not price.assumed
            else None,
        )
        return job.to_config()

    def _fit(self, trials: Queue) -> None:
        release_abandoned()  # an interrupted run of this process may have
        # Tune may still be writing there when the run is interrupted.
        with tempfile.TemporaryDirectory(
            prefix="knet-tune-", ignore_cleanup_errors=True
        ) as scratch:
            ray.tune.Tuner(
                ray.tune.with_resources(self._trainable, HEAD),
                tune_config=ray.tune.TuneConfig(
                    max_concurrent_trials=self._concurrent,
                    reuse_actors=True,  # a driver has loaded torch; the next need not
                    trial_name_creator=hash_of,
                    trial_dirname_creator=hash_of,
                    search_alg=trials,
                    num_samples=-1,  # as many as there are
                ),
                run_config=ray.tune.RunConfig(
                    name=self._sweep.name,
                    storage_path=scratch,  # nothing is ever restored from Tune's own files
                    failure_config=ray.tune.FailureConfig(max_failures=DRIVER_RESTARTS),
                    callbacks=[self._bridge],
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
        if status != "FINISHED":
            _bring(trial, store, tracker)


def _bring(trial: Trial, store: Store, tracker: Tracker) -> None:
    """Tell the tracker of a finished trial."""
    folder = store.trial(trial.hash)
    result = folder.result()
    assert result is not None, "a finished trial has a result"
    last = Evaluation(step=result.step, time=time.time(), metrics=result.metrics)
    tracker.start_trial(TrialRun.of(trial), attempts.count(folder))
    tracker.log_points(trial.hash, [*folder.points(), *result.evaluations, last])
    for name, content in folder.provenance_files().items():
        tracker.log_file(trial.hash, name, content)
    if model := TrialModel.of(trial, folder):
        tracker.log_model(trial.hash, model)
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
