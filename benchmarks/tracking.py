"""What tracking costs: per point while training, and per million points afterwards.

python benchmarks/tracking.py [--points 1000000]

The first part times what training waits for: one report of 15 metrics into the journal with a
store that answers at once, with one that never answers, and into the trial's folder. The second
writes an experiment of that many points, sends it to MLflow on SQLite through the journal (a
twentieth of it), and times `knet report` on it.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from knet_platform.errors import TrackingError
from knet_platform.planning import load_sweep
from knet_platform.storage import Evaluation, Store, TrialResult, TrialStore
from knet_platform.sweep import Sweep
from knet_platform.tracking import (
    JournaledTracker,
    MemoryTracker,
    PointLike,
    SweepRun,
    TrialRun,
    open_tracker,
)

SWEEP = """\
# Tracking
name: tracking
base: recipe.yaml
metric: {name: val/AP, mode: max}
baseline: a0
seeds: [0, 1]
arms:
"""
ARMS, METRICS, REPORTS = 10, 15, 300
NAMES = [f"train/loss/term{number}" for number in range(METRICS)]


class AbsentTracker(MemoryTracker):
    """Takes the start of a sweep, and then never answers."""

    def start_trial(self, trial: TrialRun, attempt: int, *, at: float | None = None) -> None:
        """Fail."""
        raise TrackingError("no answer")


def point(step: int) -> Evaluation:
    return Evaluation(step=step, time=1e9 + step, metrics=dict.fromkeys(NAMES, step / 7))


def milliseconds(call: Callable[[int], None]) -> str:
    """Describe how long a call takes, over `REPORTS` of them."""
    times = []
    for step in range(1, REPORTS + 1):
        began = time.perf_counter()
        call(step)
        times.append(1000 * (time.perf_counter() - began))
    cuts = statistics.quantiles(times, n=100)
    return f"median {cuts[49]:.2f} ms, 99th percentile {cuts[98]:.2f} ms, longest {max(times):.1f}"


def measure_reports(folder: Path, sweep: Sweep) -> None:
    """Print what one report costs."""
    trial = TrialRun.of(sweep.trials[0])
    for title, store in (("answers", MemoryTracker()), ("is away", AbsentTracker())):
        tracker = JournaledTracker(store, "none", folder / f"{title}.db", warn=lambda _: None)
        tracker.start_sweep(SweepRun.of(sweep))
        tracker.start_trial(trial, 1)
        told = milliseconds(lambda step, t=tracker: t.log_points(trial.hash, [point(step)]))
        print(f"journal, store {title}: {told}", flush=True)
        tracker.close(0.1)
    kept = Store(str(folder / "costs")).trial("ab")
    known: list[Evaluation] = []

    def write(step: int) -> None:
        known.append(point(step))
        kept.write_points(0, known)

    print(f"trial's folder, up to {REPORTS} points: {milliseconds(write)}", flush=True)


def fill(store: TrialStore, trial_hash: str, points: Sequence[PointLike]) -> None:
    """Write a finished trial with its curves."""
    store.write_points(0, points)
    evaluation = Evaluation(step=points[-1].step, time=1e9, metrics={"val/AP": 0.3})
    store.write_result(
        TrialResult(
            trial_hash=trial_hash,
            step=points[-1].step,
            metrics={"val/AP": 0.3},
            evaluations=(evaluation,),
            checkpoint="checkpoint_1",
            num_parameters=1,
            seconds=1.0,
            wall_seconds=1.0,
            device="cpu",
            workers=1,
            finished_at="2026-01-01T00:00:00+00:00",
        )
    )


def measure_million(folder: Path, sweep: Sweep, file: Path, num_points: int) -> None:
    """Print how fast so many points are sent and reported on."""
    home = folder / "home"
    store = Store(str(home / "storage"))
    steps = num_points // METRICS // len(sweep.trials)
    for trial in sweep.trials:
        fill(store.trial(trial.hash), trial.hash, [point(step) for step in range(1, steps + 1)])
    trial = TrialRun.of(sweep.trials[0])
    tracker = open_tracker(sweep.name, f"sqlite:///{folder}/mlflow.db", home, warn=print)
    tracker.start_sweep(SweepRun.of(sweep))
    points = store.trial(trial.hash).points()
    began = time.perf_counter()
    tracker.start_trial(trial, 1)
    for start in range(0, len(points), 10):
        tracker.log_points(trial.hash, points[start : start + 10])
    tracker.close(600)
    seconds = time.perf_counter() - began
    assert tracker.left() is None
    print(f"MLflow on SQLite: {len(points) * METRICS / seconds:,.0f} points/s", flush=True)
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "knet_platform.cli.main", "report", str(file)],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "KNET_HOME": str(home)},
    )
    print(f"knet report over {num_points:,} points: {time.perf_counter() - began:.1f} s")


def main() -> None:
    """Measure in a folder that is deleted afterwards."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--points", type=int, default=1_000_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="knet-tracking-") as name:
        folder = Path(name)
        (folder / "recipe.yaml").write_text("data: {format: shapes}\n")
        file = folder / "tracking.yaml"
        arms = "\n".join(f"  a{i}: {{optim.lr: {1e-5 * (i + 1):.6f}}}" for i in range(ARMS))
        file.write_text(f"{SWEEP}{arms}\n")
        sweep = load_sweep(file)
        measure_reports(folder, sweep)
        measure_million(folder, sweep, file, args.points)


if __name__ == "__main__":
    main()
