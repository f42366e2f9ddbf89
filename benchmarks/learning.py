"""Mask AP on `shapes` at laptop scale: 1 and 3 update rounds, 3 with ten times the iterations.

python benchmarks/learning.py [--threads 2] [--seed 0]

One process, no Ray. Takes about 15 minutes on 2 cores, nearly all of it the last row.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from knet_core import Recipe, fit, make_shapes
from knet_platform.config import load_recipe

SWEEPS = Path(__file__).parents[1] / "sweeps"
RUNS = ((1, 1), (3, 1), (3, 10))
"""(update rounds, factor on the iterations)."""


def recipe_for(stages: int, factor: int, data: Path, seed: int) -> Recipe:
    """Return the laptop-scale recipe of `sweeps/stages.yaml`'s arm, for a factor's iterations."""
    base = SWEEPS / "recipes" / "knet_r50_instance_1x.yaml"
    scale = SWEEPS / "scales" / "laptop.yaml"
    iterations = load_recipe(base, scale=scale, arm={}, overrides=()).train.iterations
    assert iterations is not None, "the laptop scale counts iterations"
    overrides = [
        f"data.root={data}",
        f"train.iterations={factor * iterations}",
        f"train.eval_every={factor * iterations}",
    ]
    recipe = load_recipe(base, scale=scale, arm={"model.stages": stages}, overrides=overrides)
    return Recipe.from_dict(recipe.to_dict() | {"seed": seed})


def main() -> None:
    """Train each row and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| update rounds | iterations | AP | AP50 | AP75 | seconds |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "shapes")
        make_shapes(data, num_train=2000, num_val=64, size=96, seed=0)
        for stages, factor in RUNS:
            recipe = recipe_for(stages, factor, data, args.seed)
            began = time.monotonic()
            result = fit(recipe, output_dir=Path(folder, f"{stages}-{factor}"))
            ap = [f"{result.metrics[name]:.3f}" for name in ("val/AP", "val/AP50", "val/AP75")]
            seconds = time.monotonic() - began
            print(f"| {stages} | {result.step} | {' | '.join(ap)} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
