"""One Ray Train worker: the only file that knows both Ray Train and `knet_core.fit`."""

import fnmatch
import math
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray.train

from knet_core import NonFiniteError, Recipe, Report
from knet_platform.attempts import may_go_on, verify
from knet_platform.previews import preview
from knet_platform.provenance import accelerator
from knet_platform.storage import FAILURES, Evaluation, Failure, Store, TrialStore
from knet_platform.watchdog import Watchdog

PICTURES = "pictures"


def train_worker(config: dict[str, Any]) -> tuple[str, bool]:
    """Train one trial's share, from its newest checkpoint.

    Args:
        config: `recipe` (plain values), `store_uri`, `trial_hash`, `run_id`, `attempt`,
            `images_at_once` (None: as the recipe asks) and `hang_minutes`.

    Returns:
        The device's name, and whether the trial came to its end.
    """
    import torch
    from ray.train.torch import get_device

    from knet_core import fit, keep_freed_memory

    run_id, trial_hash = config["run_id"], config["trial_hash"]
    everything = Store(config["store_uri"])
    store = everything.trial(trial_hash)
    recipe = Recipe.from_dict(config["recipe"])
    resumed = ray.train.get_checkpoint()
    if resumed is None and (name := store.latest_checkpoint()):  # Ray Train lost its record
        resumed = ray.train.Checkpoint(f"{store.uri}/{name}")
    rank = ray.train.get_context().get_world_rank()
    stacks_name = f"{FAILURES}/hang_attempt{config['attempt']}_rank{rank}.txt"
    watchdog = Watchdog(
        config["hang_minutes"] * 60 or math.inf,
        lambda stacks: store.write_bytes(stacks_name, stacks),
    )
    reporter = RayReporter(
        store,
        run_id,
        attempt=config["attempt"],
        eval_batch=recipe.eval.batch_size,
        resumed_from=Path(resumed.path).name if resumed else "",
    )
    device = get_device()
    keep_freed_memory()
    if ray.train.get_context().get_world_rank() == 0:
        store.write_machine(threads=torch.get_num_threads(), accelerator=accelerator())
    with (
        watchdog,
        tempfile.TemporaryDirectory(prefix="knet-") as folder,
        resumed.as_directory() if resumed else nullcontext() as start,
    ):
        scratch = Path(folder)
        resume_from = Path(start) if start else None
        try:
            result = fit(
                recipe,
                callbacks=[reporter],
                output_dir=scratch,
                resume_from=resume_from,
                device=device,
                images_at_once=config["images_at_once"],
                on_progress=watchdog.beat,
                should_stop=lambda: not may_go_on(everything, run_id, trial_hash),
            )
        except NonFiniteError as error:
            raise NonFiniteError(_keep_dumps(str(error), scratch, store)) from error
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return name, result.finished


class RayReporter:
    """Hands reports to Ray Train: metrics as they are, checkpoints and pictures to the store."""

    def __init__(
        self,
        store: TrialStore,
        run_id: str,
        *,
        attempt: int,
        eval_batch: int,
        resumed_from: str,
    ) -> None:
        self._points: list[Evaluation] = []
        """Since the newest checkpoint, which the next attempt begins at."""
        self._start = int(resumed_from.rpartition("_")[2] or 0)
        """Its step; 0 without one."""
        self._store = store
        self._run_id = run_id
        self._attempt = attempt
        self._eval_batch = eval_batch
        self._resumed_from = resumed_from

    def on_report(self, report: Report) -> None:
        """Report on every worker; the first one's metrics and checkpoint count."""
        first = ray.train.get_context().get_world_rank() == 0
        points = [Evaluation(step=p.step, time=p.time, metrics=p.metrics) for p in report.points]
        if report.evaluation is not None:
            now = time.time()
            points.append(Evaluation(step=report.step, time=now, metrics=report.evaluation))
        metrics: dict[str, Any] = {"step": report.step, "total": report.num_iterations}
        metrics["points"] = [asdict(point) for point in points]
        if first:
            verify(self._store, self._run_id)
            self._points += points
            self._store.write_points(self._start, self._points)
            if report.eval_batch is not None:
                self._note_eval_batch(report.eval_batch)
        if report.picture is not None:
            metrics["picture"] = picture_name(report.step)
            self._keep(metrics["picture"], report.picture)
        if report.stage_picture is not None:
            self._keep(stage_picture_name(report.step), report.stage_picture)
        name, checkpoint = None, None
        # A finished run reports its last checkpoint again. Ray Train must not count it twice:
        # keeping the newest two, it would then delete the one that counts.
        if report.checkpoint is not None and report.checkpoint.name != self._resumed_from:
            name = report.checkpoint.name
            checkpoint = ray.train.Checkpoint.from_directory(str(report.checkpoint))
        ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=name)
        if checkpoint is not None:
            self._start, self._points = report.step, []

    def _note_eval_batch(self, batch: int) -> None:
        """Record once to how many images at a time memory limits the evaluation."""
        if batch == self._eval_batch:
            return
        failure = Failure(
            cause="out_of_memory_evaluation",
            kind="OutOfMemoryError",
            message=f"no memory to evaluate {self._eval_batch} images of a worker at a time",
            action=f"evaluated {batch} at a time",
            attempt=self._attempt,
            step=self._store.latest_step(),
        )
        self._store.write_failure(failure, final=False)
        self._eval_batch = batch

    def _keep(self, name: str, png: bytes) -> None:
        self._store.write_bytes(name, png)
        self._store.write_bytes(f"{name.removesuffix('.png')}.webp", preview(png))


def picture_name(step: int) -> str:
    """Return where a trial's probe picture of `step` lies below its folder."""
    return f"{PICTURES}/step_{step:06d}.png"


def stage_picture_name(step: int) -> str:
    """Return where the masks after every update lie below a trial's folder."""
    return f"{PICTURES}/stages_{step:06d}.png"


def hang_reports(store: TrialStore, attempt: int) -> Sequence[str]:
    """Return where below the trial's folder the workers of a hung attempt left their stacks."""
    names = fnmatch.filter(store.list(FAILURES), f"hang_attempt{attempt}_rank*.txt")
    return [f"{FAILURES}/{name}" for name in names]


def _keep_dumps(message: str, scratch: Path, store: TrialStore) -> str:
    """Move what explains a failure from the scratch folder to the store."""
    for dump in scratch.glob("nonfinite_*.pt"):
        store.write_bytes(f"{FAILURES}/{dump.name}", dump.read_bytes())
    return message.replace(str(scratch), f"{store.uri}/{FAILURES}")
