"""What `knet run` adds: its trials against the same Ray Train groups under bare Ray Tune.

python benchmarks/sweep_overhead.py [--rounds 4] [--trials 5]
python benchmarks/sweep_overhead.py --noop [--trials 1000]

Both sides train the same recipe through `knet_core.fit` with two workers on one local cluster;
`knet run` adds the store, retries, checkpoints' bookkeeping, MLflow, progress and the report.
Rounds alternate between the two; the median of the rounds' ratios is the answer.

With --noop the group is replaced by a body that only leaves a checkpoint, on both sides, so that
nothing but the overhead is left: planning, time per trial, and the memory of this process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knet_platform.cluster import HEAD, prepare_environment
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


def measure_noop(folder: Path, file: Path, num_trials: int) -> None:
    """Plan and run on our side, then run bare, and print all of it."""
    from knet_platform.home import UNTRACKED
    from knet_platform.planning import load_sweep
    from knet_platform.storage import Store
    from knet_platform.tracking import open_tracker
    from knet_platform.tuner import run_sweep

    arms = "\n".join(f"  a{i}: {{optim.lr: {1e-6 * (i + 1):.8f}}}" for i in range(num_trials))
    head = SWEEP.format(title="No-ops", seeds=0).partition("arms:")[0]
    file.write_text(f"{head.replace('plain', 'a0')}arms:\n{arms}\nresources: {{workers: 2}}\n")
    home = folder / "home"
    plan = [sys.executable, "-m", "knet_platform.cli.main", "plan", str(file), "--json"]
    began = time.monotonic()
    subprocess.run(plan, check=True, stdout=subprocess.DEVNULL)
    print(f"plan of {num_trials} arms: {time.monotonic() - began:.1f} s", flush=True)

    sweep = load_sweep(file)
    for store in (UNTRACKED, f"sqlite:///{folder}/mlflow.db"):
        tracker = open_tracker(sweep.name, store, folder, warn=print)
        progress = Watch(sweep, num_trials)
        began = time.monotonic()
        place = home / store[:6]
        outcome = run_sweep(
            sweep, Store(str(place)), tracker, progress, home=home, trainable=noop_trial
        )
        ours = time.monotonic() - began
        assert len(outcome.finished) == num_trials, outcome.failed[:1]
        print(
            f"knet run, tracking {store[:6]}: {ours:.1f} s, {1000 * ours / num_trials:.0f} ms a "
            f"trial, {len(list(place.glob('process_*')))} driver(s), {tracker.waiting} updates "
            f"wait; memory of this process by finished trials, MiB: {progress.memory}",
            flush=True,
        )

    began = time.monotonic()
    run_bare_noop(folder / "bare", num_trials)
    bare = time.monotonic() - began
    print(
        f"bare: {bare:.1f} s, {1000 * bare / num_trials:.0f} ms a trial; ratio {ours / bare:.2f}",
        flush=True,
    )


def run_bare_noop(folder: Path, num_trials: int) -> None:
    """Run no-ops under Tune, one at a time as `knet run` does on a cluster of two processors."""
    import ray.tune

    results = ray.tune.Tuner(
        ray.tune.with_resources(bare_noop, HEAD),
        param_space={
            "index": ray.tune.grid_search(list(range(num_trials))),
            "storage": str(folder),
        },
        tune_config=ray.tune.TuneConfig(max_concurrent_trials=1, reuse_actors=True),
        run_config=ray.tune.RunConfig(storage_path=str(folder / "tune"), verbose=0),
    ).fit()
    assert not results.errors, results.errors


class Watch(PlainProgress):
    """Keeps the process's memory after every tenth of the trials instead of printing them."""

    def __init__(self, sweep: Sweep, num_trials: int) -> None:
        super().__init__(sweep, 0)
        self.memory: dict[int, int] = {}
        self._ended = 0
        self._every = max(1, num_trials // 10)

    def begin(self, trial: Trial, attempt: int) -> None:
        """Say nothing."""

    def update(self, trial: Trial, moment: Moment) -> None:
        """Say nothing."""

    def end(self, trial: Trial, outcome: str) -> None:
        """Look at the memory now and then."""
        self._ended += 1
        if self._ended % self._every == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.memory[self._ended] = pages * os.sysconf("SC_PAGE_SIZE") // 2**20


def main() -> None:
    """Alternate, print each round, and the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--trials", type=int)
    parser.add_argument("--noop", action="store_true")
    args = parser.parse_args()
    args.trials = args.trials or (1000 if args.noop else 5)
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    prepare_environment()
    import ray

    from knet_platform.cli.main import main as knet
    from knet_platform.planning import load_sweep

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["KNET_HOME"] = str(folder / "home")
        (folder / "recipe.yaml").write_text(RECIPE)
        file = folder / "overhead.yaml"
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=True,
            log_to_driver=False,
            logging_level="ERROR",
        )
        if args.noop:
            measure_noop(folder, file, args.trials)
            ray.shutdown()
            return
        ratios = []
        for index in range(args.rounds):
            seeds = range(index * args.trials, (index + 1) * args.trials)
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
            f"median ratio {statistics.median(ratios):.2f} over {args.rounds} rounds of "
            f"{args.trials} trials"
        )
        ray.shutdown()


if __name__ == "__main__":
    main()
