"""10,000 trials on 1,000 spot GPUs, simulated: utilisation, lost work, and what gives way first.

python benchmarks/scale.py [--trials 10000] [--gpus 1000] [--json]

The trials are those of the real planner, in its order, as long as its model says; time is an event
loop's (simpy). Measured constants carry their origin below, assumed ones say so. Machines are
preempted at random times (exponential). A trial of several workers ends with any of its machines,
waits for another, and goes on from its last checkpoint, or from the notice's where there was one.
"""

import argparse
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import simpy

from knet_platform.pace import Pace
from knet_platform.planning import Sweep, load_sweep

START_SECONDS = 17.0
"""Of a trial until its first step: Ray Train's processes (RESULTS.md, 2026-11-21)."""
START_CPU_SECONDS = 30.0
"""Processor time of that (ibid.)."""
SAVE_SECONDS = 1.0
"""Training waits for a checkpoint's file; assumed for 450 MB on NVMe. Its upload is beside it."""
REPLACE_SECONDS = 300.0
"""Until another machine has taken a preempted one's place; assumed: start, image, cache."""
NOTICE_SHARE = 0.95
"""Of preemptions come with notice enough for a checkpoint; assumed."""
POINTS_PER_SECOND = 15 / 10
"""Of a running trial: 15 metrics every 10 s (`fit`)."""
STORE_POINTS_PER_SECOND = 5800.0
"""That MLflow on SQLite takes from the journal (RESULTS.md, 2026-11-21)."""
RATES = {
    "5 % a month": 0.05 / 30,
    "20 % a month": 0.20 / 30,
    "10 % a day": 0.10,
    "100 % a day": 1.0,
}
"""Preemptions of a machine a day. The first two are the ends of AWS's Spot Instance Advisor, the
third the middle of the 5 to 15 % that Google's documentation named for preemptible machines (both
from memory), the last a bad day of scarce GPUs."""
INTERVALS = (60.0, 300.0, 900.0, 3600.0, 14400.0)
"""Seconds between checkpoints; `train.checkpoint_minutes` is 15 by default."""
DAY = 86400.0

SWEEP = """\
# Scale
name: scale
base: recipe.yaml
metric: {{name: val/AP, mode: max}}
baseline: {baseline}
seeds: [{seeds}]
grid:
  optim.lr: [{rates}]
resources: {{workers: {workers}, gpus_per_worker: 1}}
"""
RECIPE = """\
data: {format: shapes, shapes: {num_train: 20000, num_val: 500, size: 512}}
train: {iterations: 20000, batch_size: 16}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one simulated sweep went."""

    days: float
    utilisation: float
    """Share of the GPUs' time that trained what stayed, while there was work for all of them."""
    lost_hours: float
    """Of GPUs, trained and trained again."""
    lost_share: float
    """Of what was trained."""
    saving_share: float
    preemptions: int


def plan(trials: int, workers: int) -> tuple[Sweep, float]:
    """Return the sweep as the planner makes it, and the seconds that took."""
    seeds = max(1, min(10, trials // 100))
    arms = trials // seeds
    rates = [round(1e-5 * (1 + index), 7) for index in range(arms)]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "recipe.yaml").write_text(RECIPE)
        path = Path(folder) / "sweep.yaml"
        path.write_text(
            SWEEP.format(
                baseline=f"optim.lr={rates[0]}",
                seeds=", ".join(map(str, range(seeds))),
                rates=", ".join(map(str, rates)),
                workers=workers,
            )
        )
        start = time.perf_counter()
        sweep = load_sweep(path)
        return sweep, time.perf_counter() - start


def simulate(
    works: list[float], slots: int, workers: int, per_day: float, interval: float, notice: float
) -> Outcome:
    """Run trials that need `works` seconds of training each, `slots` at a time.

    Args:
        works: In the order in which they start.
        slots: Trials at once.
        workers: Machines of a trial, of one GPU each.
        per_day: Preemptions of one machine a day.
        interval: Seconds of training between checkpoints.
        notice: Share of preemptions with a checkpoint at the last moment.
    """
    draw = random.Random(0)
    clock = simpy.Environment()
    free = simpy.Resource(clock, slots)
    hazard = per_day * workers / DAY
    busy_until = 0.0  # the last trial starts: until then all slots are taken
    trained = lost = saving = 0.0
    spans: list[tuple[float, float, float]] = []
    preemptions = 0

    def trial(work: float) -> Iterator[simpy.Event]:
        nonlocal busy_until, trained, lost, saving, preemptions
        with free.request() as mine:
            yield mine
            busy_until = clock.now
            done, began = 0.0, clock.now
            while True:
                yield clock.timeout(START_SECONDS)
                left = work - done
                saves = max(0, math.ceil(left / interval) - 1)
                life = draw.expovariate(hazard) if hazard else math.inf
                if life >= left + saves * SAVE_SECONDS:
                    yield clock.timeout(left + saves * SAVE_SECONDS)
                    saving += saves * SAVE_SECONDS
                    trained += left
                    spans.append((began, clock.now, work))
                    return
                yield clock.timeout(life)
                whole, rest = divmod(life, interval + SAVE_SECONDS)
                reached = whole * interval + min(rest, interval)
                saving += whole * SAVE_SECONDS
                kept = reached if draw.random() < notice else whole * interval
                trained += reached
                lost += reached - kept
                done += kept
                preemptions += 1
                yield clock.timeout(REPLACE_SECONDS)

    for work in works:
        clock.process(trial(work))
    clock.run()
    within = sum(
        work * max(0.0, min(end, busy_until) - began) / (end - began) for began, end, work in spans
    )
    share = within / (slots * busy_until) if busy_until else sum(works) / (slots * clock.now)
    return Outcome(
        days=clock.now / DAY,
        utilisation=share,
        lost_hours=lost * workers / 3600,
        lost_share=lost / trained,
        saving_share=saving / trained,
        preemptions=preemptions,
    )


def young(rate_per_day: float, workers: int) -> float:
    """Return Young's interval, sqrt(2 x cost x mean time between failures), in seconds."""
    return math.sqrt(2 * SAVE_SECONDS * DAY / (rate_per_day * workers))


def daly(rate_per_day: float, workers: int) -> float:
    """Return Daly's higher order estimate of the same (2006, equation 37)."""
    mean = DAY / (rate_per_day * workers)
    if 2 * mean <= SAVE_SECONDS:
        return mean
    ratio = SAVE_SECONDS / (2 * mean)
    return (
        math.sqrt(2 * SAVE_SECONDS * mean) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - SAVE_SECONDS
    )


def driver_mib() -> float:
    """Return the memory that a trial's driver shares with no other process.

    It has loaded what fits a `TorchTrainer`; code that is mapped from files is shared.
    """
    code = (
        "import knet_platform.driver, ray.train.torch\n"
        "lines = open('/proc/self/smaps_rollup').read().splitlines()\n"
        "print(*(int(line.split()[1]) for line in lines if line.startswith('Private_Dirty')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--gpus", type=int, default=1000)
    parser.add_argument("--gpu", default="A10G", help="whose arithmetic the planner uses")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    rows = []
    for workers in (1, 8, 16):
        sweep, seconds = plan(args.trials, workers)
        trials = sweep.by_priority
        pace = Pace(trials, sweep.resources, {}, gpu=args.gpu)
        works = [pace.estimate(trial).seconds for trial in trials]
        slots = args.gpus // workers
        print(
            f"\n{workers} GPUs a trial: {len(trials):,} trials planned in {seconds:.1f} s, each "
            f"{works[0] / 3600:.2f} h, {slots} at once"
        )
        for name, rate in RATES.items():
            best = (young(rate, workers), daly(rate, workers))
            print(f"  {name}: Young {best[0]:.0f} s, Daly {best[1]:.0f} s between checkpoints")
            for interval in (*INTERVALS, best[1]):
                for notice in (NOTICE_SHARE, 0.0):
                    found = simulate(works, slots, workers, rate, interval, notice)
                    row = {"workers": workers, "rate": name, "interval": interval}
                    rows.append(row | {"notice": notice} | asdict(found))
                    print(
                        f"    every {interval:>6.0f} s, notice {notice:>4.0%}: "
                        f"utilisation {found.utilisation:6.2%}, lost {found.lost_share:7.3%} "
                        f"({found.lost_hours:,.0f} GPU-hours), saving {found.saving_share:6.3%}, "
                        f"{found.preemptions:,} preemptions, {found.days:.2f} days"
                    )
        bottlenecks(slots, works[0])
    if args.json:
        print(json.dumps(rows))


def bottlenecks(slots: int, work: float) -> None:
    """Print what the one head and the one store must carry."""
    driver = driver_mib()
    gib = slots * driver / 1024
    print(f"  head: {slots} drivers of {driver:.0f} MiB each: {gib:,.0f} GiB")
    print(
        f"  head: {slots / work:.2f} trials start a second in the long run; the first {slots} "
        f"take {slots * START_CPU_SECONDS / 3600:.1f} processor hours, a part of them there"
    )
    points = slots * POINTS_PER_SECOND
    print(
        f"  tracking: {points:,.0f} points/s, {points / STORE_POINTS_PER_SECOND:.0%} of what the "
        f"store took when measured"
    )


if __name__ == "__main__":
    main()
