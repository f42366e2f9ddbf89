"""What `knet run` adds: its trials against the same Ray Train groups under bare Ray Tune.

python benchmarks/sweep_overhead.py [--rounds 4] [--trials 5]

Both sides train the same recipe through `knet_core.fit` with two workers on one local cluster;
`knet run` adds the store, retries, checkpoints' bookkeeping, MLflow, progress and the report.
Rounds alternate between the two; the median of the rounds' ratios is the answer.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from knet_platform.cluster import HEAD, prepare_environment

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


def main() -> None:
    """Alternate, print each round, and the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--trials", type=int, default=5)
    args = parser.parse_args()
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
