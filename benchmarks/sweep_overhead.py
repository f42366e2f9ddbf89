"""What `knet run` adds: its trials against the same Ray Train groups under bare Ray Tune.

python benchmarks/sweep_overhead.py [--rounds 4] [--trials 5]
python benchmarks/sweep_overhead.py --noop [--trials 1000]

Both sides train the same recipe through `knet_core.fit` with two workers on one local cluster;
`knet run` adds the store, retries, checkpoints' bookkeeping, MLflow, progress and the report.
Rounds alternate between the two; the median of the rounds' ratios is the answer.

With --noop the group is replaced by a body that only leaves a checkpoint, on all sides, so that
nothing but the overhead is left: planning, time per trial, and the memory of the sweep's process.
Every side has a process and a Ray of its own, one after the other. Bare Tune runs as Ray ships it,
so with the files that it writes of every trial; with Ray's callback for MLflow beside them; and
with the settings of `knet run`, so without them.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knet_platform.cluster import HEAD, prepare_environment
from knet_platform.home import UNTRACKED
from knet_platform.progress import Moment, PlainProgress
from knet_platform.sweep import Sweep, Trial

if TYPE_CHECKING:
    from knet_platform.driver import TrialJob
    from knet_platform.storage import TrialStore

SWEEP = """\
# {title}
name: overhead
base: recipe.yaml
metric: {{name: val/AP, mode: max}}
baseline: plain
seeds: [{seeds}]
arms:
  plain: {{}}
resources: {{workers: 2}}
"""
SIDES = {
    "knet": "knet run, untracked",
    "bare": "bare Tune as Ray ships it",
    "quiet": "bare Tune with the settings of knet run",
    "knet-mlflow": "knet run with MLflow",
    "bare-mlflow": "bare Tune as Ray ships it, with its callback for MLflow",
}
"""Of --noop; a ratio is that of the last `knet run` before."""
RECIPE = """\
data:
  format: shapes
  shapes: {num_train: 32, num_val: 4, size: 64}
  short_edge: [64, 64]
  long_edge: 64
  num_workers: 0
model:
  backbone: {name: test_resnet, pretrained: false, frozen_stages: 0, norm_eval: false}
  channels: 32
  num_kernels: 10
  num_heads: 4
  ffn_channels: 64
train: {iterations: 12, batch_size: 8, log_every: 4, eval_every: 12}
eval: {batch_size: 4, probe_images: 0, fps_iterations: 0}
"""


def bare_worker(config: dict[str, Any]) -> None:
    """Train, and report the checkpoint as any Ray Train user would."""
    import ray.train

    from knet_core import Recipe, Report, fit

    class Reporter:
        def on_report(self, report: Report) -> None:
            checkpoint = None
            if report.checkpoint is not None:
                checkpoint = ray.train.Checkpoint.from_directory(str(report.checkpoint))
            ray.train.report({"step": report.step}, checkpoint=checkpoint)

    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe.from_dict(config["recipe"])
        fit(recipe, callbacks=[Reporter()], output_dir=Path(folder))


def bare_driver(config: dict[str, Any]) -> None:
    """Fit one `TorchTrainer`, as Ray's guide shows it."""
    import ray.train
    import ray.tune
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    result = TorchTrainer(
        bare_worker,
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=ray.train.RunConfig(
            name=ray.tune.get_context().get_trial_id(),
            storage_path=config["storage"],
            callbacks=[TuneReportCallback()],
        ),
    ).fit()
    ray.tune.report({"done": result.error is None})


def run_bare(recipes: list[dict[str, Any]], storage: Path, slots: int) -> None:
    """Run the recipes under Tune; as many at once as `knet run` would."""
    import ray.tune

    results = ray.tune.Tuner(
        ray.tune.with_resources(bare_driver, HEAD),
        param_space={"recipe": ray.tune.grid_search(recipes), "storage": str(storage)},
        tune_config=ray.tune.TuneConfig(max_concurrent_trials=slots),
        run_config=ray.tune.RunConfig(storage_path=str(storage / "tune"), verbose=0),
    ).fit()
    assert not results.errors, results.errors


def leave_checkpoint(folder: Path) -> None:
    """Write what a trained step would leave, without its megabytes."""
    checkpoint = folder / "checkpoint_1"
    checkpoint.mkdir(parents=True)
    for name in ("model.safetensors", "trainer.pt", "recipe.yaml"):
        (checkpoint / name).write_bytes(b"-")  # an empty file counts as one cut short
    state = {
        "format": 1,
        "step": 1,
        "epoch": 1.0,
        "categories": [],
        "metrics": {"val/AP": 0.5, "train/loss": 1.0},
        "evaluations": [],
        "seconds": 0.0,
        "num_parameters": 1,
    }
    (checkpoint / "state.json").write_text(json.dumps(state))


def noop_group(
    job: "TrialJob", store: "TrialStore", attempt: int, images_at_once: int | None
) -> tuple[str, bool]:
    """Take the place of the Train group."""
    import ray.tune

    from knet_platform.storage import Group

    store.add_group(Group(workers=1, seconds=0.0))
    leave_checkpoint(Path(store.uri))
    Path(job.store_uri, f"process_{os.getpid()}").touch()
    ray.tune.report({"step": 1, "total": 1, "points": [], "saved": True})
    return "cpu", True


def noop_trial(config: dict[str, Any]) -> None:
    """Be the driver of `knet run` around nothing."""
    from knet_platform.driver import run_trial

    run_trial(config, train=noop_group)


def bare_noop(config: dict[str, Any]) -> None:
    """Do the same under bare Tune."""
    import ray.tune

    leave_checkpoint(Path(config["storage"], str(config["index"])))
    Path(config["storage"], f"process_{os.getpid()}").touch()
    ray.tune.report({"step": 1})
    ray.tune.report({"done_training": True})


def measure_noop(folder: Path, num_trials: int) -> None:
    """Plan, run every side in a process of its own, and print all of it."""
    file = write_noop_sweep(folder, num_trials)
    plan = [sys.executable, "-m", "knet_platform.cli.main", "plan", str(file), "--json"]
    began = time.monotonic()
    subprocess.run(plan, check=True, stdout=subprocess.DEVNULL)
    print(f"plan of {num_trials} arms: {time.monotonic() - began:.1f} s", flush=True)

    ours = math.nan
    for side, title in SIDES.items():
        command = [sys.executable, __file__, "--noop", "--side", side, "--trials", str(num_trials)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        if side.startswith("knet"):
            ours = found["seconds"]
        print(
            f"{title}: {1000 * found['seconds'] / num_trials:.0f} ms a trial, "
            f"{found['drivers']} driver(s), ratio {ours / found['seconds']:.2f}; MiB of the "
            f"process by finished trials: {found['memory']}",
            flush=True,
        )


def write_noop_sweep(folder: Path, num_trials: int) -> Path:
    """Write a sweep of as many arms, and its recipe."""
    arms = "\n".join(f"  a{i}: {{optim.lr: {1e-6 * (i + 1):.8f}}}" for i in range(num_trials))
    head = SWEEP.format(title="No-ops", seeds=0).partition("arms:")[0]
    file = folder / "overhead.yaml"
    file.write_text(f"{head.replace('plain', 'a0')}arms:\n{arms}\nresources: {{workers: 2}}\n")
    (folder / "recipe.yaml").write_text(RECIPE)
    return file


def run_noop(folder: Path, num_trials: int, uri: str) -> dict[str, Any]:
    """Run no-ops through `knet run`, tracked at `uri`, until everything has arrived there."""
    from knet_platform.planning import load_sweep
    from knet_platform.storage import Store
    from knet_platform.tracking import journaled, open_tracker
    from knet_platform.tuner import run_sweep

    journaled.CLOSE_SECONDS = 600.0  # Ray's callback makes its sweep wait for every update, too
    sweep = load_sweep(write_noop_sweep(folder, num_trials))
    tracker = open_tracker(sweep.name, uri, folder, warn=print)
    memory = Memory(num_trials)
    place = folder / "storage"
    began = time.monotonic()
    outcome = run_sweep(
        sweep,
        Store(str(place)),
        tracker,
        Watch(sweep, memory),
        home=folder,
        trainable=noop_trial,
    )
    seconds = time.monotonic() - began
    assert len(outcome.finished) == num_trials, outcome.failed[:1]
    assert not tracker.waiting + tracker.lost, tracker.left()
    drivers = len(list(place.glob("process_*")))
    return {"seconds": seconds, "drivers": drivers, "memory": memory.found}


def run_bare_noop(folder: Path, num_trials: int, *, tracked: bool) -> dict[str, Any]:
    """Run no-ops under Tune, one at a time as `knet run` does on a cluster of two processors."""
    import ray.tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    memory = Memory(num_trials)

    class Look(ray.tune.Callback):
        def on_trial_complete(self, **info: Any) -> None:
            memory.look()

    callbacks: list[ray.tune.Callback] = [Look()]
    if tracked:
        uri = f"sqlite:///{folder}/mlflow.db"
        callbacks.append(MLflowLoggerCallback(tracking_uri=uri, experiment_name="overhead"))
    began = time.monotonic()
    results = ray.tune.Tuner(
        ray.tune.with_resources(bare_noop, HEAD),
        param_space={
            "index": ray.tune.grid_search(list(range(num_trials))),
            "storage": str(folder),
        },
        tune_config=ray.tune.TuneConfig(max_concurrent_trials=1, reuse_actors=True),
        run_config=ray.tune.RunConfig(
            storage_path=str(folder / "tune"), callbacks=callbacks, verbose=0
        ),
    ).fit()
    seconds = time.monotonic() - began
    assert not results.errors, results.errors
    drivers = len(list(folder.glob("process_*")))
    return {"seconds": seconds, "drivers": drivers, "memory": memory.found}


class Memory:
    """Looks at this process's memory after every tenth of the trials."""

    def __init__(self, num_trials: int) -> None:
        self.found: dict[int, int] = {}
        """MiB by finished trials."""
        self._ended = 0
        self._every = max(1, num_trials // 10)

    def look(self) -> None:
        """Count one trial more."""
        self._ended += 1
        if self._ended % self._every == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.found[self._ended] = pages * os.sysconf("SC_PAGE_SIZE") // 2**20


class Watch(PlainProgress):
    """Looks at the memory instead of printing."""

    def __init__(self, sweep: Sweep, memory: Memory) -> None:
        super().__init__(sweep, 0)
        self._memory = memory

    def begin(self, trial: Trial, attempt: int) -> None:
        """Say nothing."""

    def update(self, trial: Trial, moment: Moment) -> None:
        """Say nothing."""

    def end(self, trial: Trial, outcome: str) -> None:
        """Look."""
        self._memory.look()


def compare(folder: Path, rounds: int, num_trials: int) -> None:
    """Alternate, print each round, and the median ratio."""
    from knet_platform.cli.main import main as knet
    from knet_platform.planning import load_sweep

    (folder / "recipe.yaml").write_text(RECIPE)
    file = folder / "overhead.yaml"
    ratios = []
    for index in range(rounds):
        seeds = range(index * num_trials, (index + 1) * num_trials)
        file.write_text(SWEEP.format(title="Overhead", seeds=", ".join(map(str, seeds))))
        recipes = [trial.recipe.to_dict() for trial in load_sweep(file).trials]
        seconds = {}
        sides = ("knet", "bare") if index % 2 else ("bare", "knet")
        for side in sides:
            began = time.monotonic()
            if side == "knet":
                assert knet(["run", str(file), "--json"]) == 0
            else:
                run_bare(recipes, folder / "bare", slots=1)
            seconds[side] = time.monotonic() - began
        ratios.append(seconds["knet"] / seconds["bare"])
        print(
            f"round {index}: knet run {seconds['knet']:.1f} s, bare {seconds['bare']:.1f} s, "
            f"ratio {ratios[-1]:.2f}",
            flush=True,
        )
    print(
        f"median ratio {statistics.median(ratios):.2f} over {rounds} rounds of {num_trials} trials"
    )


def main() -> None:
    """Start Ray, unless the sides of --noop each start their own, and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--trials", type=int)
    parser.add_argument("--noop", action="store_true")
    parser.add_argument("--side", choices=SIDES, help="with --noop: this one alone, as JSON")
    args = parser.parse_args()
    args.trials = args.trials or (1000 if args.noop else 5)
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not args.noop or (args.side and not args.side.startswith("bare")):
        prepare_environment()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["KNET_HOME"] = str(folder / "home")
        if args.noop and not args.side:
            measure_noop(folder, args.trials)
            return
        import ray

        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=True,
            log_to_driver=False,
            logging_level="ERROR",
        )
        if args.side in ("knet", "knet-mlflow"):
            uri = UNTRACKED if args.side == "knet" else f"sqlite:///{folder}/mlflow.db"
            print(json.dumps(run_noop(folder, args.trials, uri)))
        elif args.side:
            tracked = args.side == "bare-mlflow"
            print(json.dumps(run_bare_noop(folder, args.trials, tracked=tracked)))
        else:
            compare(folder, args.rounds, args.trials)
        ray.shutdown()


if __name__ == "__main__":
    main()
