"""What saving and uploading checkpoints costs a step of training.

python benchmarks/checkpoints.py [--store s3://bucket/prefix] [--rounds 10]

Trains one recipe on synthetic images. A checkpoint is written every `--every` steps; every other
one is uploaded, so steps beside an upload and steps beside none alternate in one process. Printed
are the medians of both, what all steps beside an upload took longer, how long training waits for a
save, the share of all of it in the time between two checkpoints of a recipe (`--minutes`), and
from which interval on it is below 2 %.
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from knet_core import EvalConfig, Recipe, Report, ShapesConfig, fit
from knet_platform.config import load_recipe
from knet_platform.storage import Store


class Clock:
    """Times steps, and uploads every other checkpoint while training goes on."""

    def __init__(self, store: str, uploads: ThreadPoolExecutor) -> None:
        self._checkpoints = Store(store).trial("benchmark").checkpoints
        self._uploads = uploads
        self._upload: Future[None] | None = None
        self._last: float | None = None
        self._busy = False
        self._saves = 0
        self.alone: list[float] = []
        self.beside: list[float] = []
        self.waits: list[float] = []
        self.uploading: list[float] = []

    def on_progress(self) -> None:
        """Note that a step ended; it was beside an upload if that ran in any part of it."""
        now = time.perf_counter()
        if self._last is not None:
            (self.beside if self._busy else self.alone).append(now - self._last)
        self._begin(now)

    def on_report(self, report: Report) -> None:
        """Note how long the save took, and upload every other one."""
        if report.checkpoint is None:
            return
        began = time.perf_counter()
        self.waits.append(began - (self._last or began))
        self._saves += 1
        if self._saves % 2:
            self._upload = self._uploads.submit(self._put, report.checkpoint)
        self._begin(time.perf_counter())

    def _begin(self, now: float) -> None:
        self._last = now
        self._busy = self._upload is not None and not self._upload.done()

    def _put(self, checkpoint: Path) -> None:
        began = time.perf_counter()
        self._checkpoints.put(checkpoint)
        self.uploading.append(time.perf_counter() - began)


def recipe(path: Path, steps: int, every: int, batch: int, size: int) -> Recipe:
    base = load_recipe(path)
    trunk = dataclasses.replace(base.model.backbone, pretrained=False)
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, backbone=trunk),
        data=dataclasses.replace(
            base.data,
            format="shapes",
            shapes=ShapesConfig(num_train=64, num_val=1, size=size),
            short_edge=(size, size),
            num_workers=0,
        ),
        train=dataclasses.replace(
            base.train,
            iterations=steps,
            batch_size=batch,
            micro_batch=None,
            log_every=every,
            eval_every=steps,
            checkpoint_every=every,
            checkpoint_minutes=None,
        ),
        eval=EvalConfig(probe_images=0, fps_iterations=0),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--recipe", type=Path, default=Path("sweeps/recipes/knet_r50_instance_1x.yaml")
    )
    parser.add_argument("--store", help="folder or s3:// address (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=10, help="checkpoints")
    parser.add_argument("--every", type=int, default=8, help="steps between them")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--minutes", type=float, default=15, help="between checkpoints in earnest")
    args = parser.parse_args()
    run = recipe(args.recipe, args.rounds * args.every, args.every, args.batch, args.size)
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(1) as uploads,
    ):
        clock = Clock(args.store or f"{folder}/store", uploads)
        result = fit(
            run,
            callbacks=[clock],
            output_dir=Path(folder, "scratch"),
            on_progress=clock.on_progress,
        )
        size = sum(file.stat().st_size for file in result.checkpoint.iterdir())
    alone, beside = statistics.median(clock.alone), statistics.median(clock.beside)
    wait, upload = statistics.median(clock.waits), statistics.median(clock.uploading)
    slowed = sum(seconds - alone for seconds in clock.beside) / len(clock.uploading)
    cost = wait + max(0.0, slowed)
    print(f"{torch.get_num_threads()} threads on {os.cpu_count()} cores")
    print(f"checkpoint of {size / 1e6:.0f} MB; training waits {wait:.2f} s for its save")
    print(f"upload in {upload:.2f} s beside it")
    print(
        f"step alone {1000 * alone:.0f} ms, beside an upload {1000 * beside:.0f} ms, over "
        f"{len(clock.alone)} and {len(clock.beside)} steps: {slowed:.2f} s an upload"
    )
    print(
        f"{cost:.2f} s a checkpoint: {100 * cost / (60 * args.minutes):.2f} % of "
        f"{args.minutes:g} minutes, below 2 % where they are {cost / 0.02:.0f} s apart or more"
    )


if __name__ == "__main__":
    main()
