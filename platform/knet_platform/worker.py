"""One Ray Train worker: the only file that knows both Ray Train and `knet_core.fit`."""

import fnmatch
import math
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray.train
import ray.train.collective

from knet_core import NonFiniteError, Recipe, Report
from knet_platform.attempts import may_go_on, verify
from knet_platform.checkpoints import Retention, step_of
from knet_platform.notices import Notices
from knet_platform.previews import preview
from knet_platform.provenance import accelerator
from knet_platform.staging import Cache, staged
from knet_platform.storage import FAILURES, Evaluation, Failure, Group, Store, TrialStore
from knet_platform.watchdog import Watchdog

PICTURES = "pictures"


def train_worker(config: dict[str, Any]) -> tuple[str, bool]:
    """Train one trial's share, from its newest checkpoint.

    Args:
        config: `recipe` (plain values), `data_fingerprint`, `cache`, `store_uri`, `trial_hash`,
            `run_id`, `attempt`, `images_at_once` (None: as the recipe asks), `most_evaluations`
            (None: all), `retention` and `hang_minutes`.

    Returns:
        The device's name, and whether the trial came to its end.
    """
    recipe = Recipe.from_dict(config["recipe"])
    cache = Cache(Path(config["cache"]["folder"]), config["cache"]["gb"])
    # Before workers wait for each other, which torch does for minutes only.
    with staged(recipe.data, cache=cache, expected=config["data_fingerprint"]):
        return _train(recipe, config)


def _train(recipe: Recipe, config: dict[str, Any]) -> tuple[str, bool]:
    import torch
    from ray.train.torch import get_device

    from knet_core import fit

    run_id, trial_hash = config["run_id"], config["trial_hash"]
    everything = Store(config["store_uri"])
    store = everything.trial(trial_hash)
    rank = ray.train.get_context().get_world_rank()
    resumed, damaged = ray.train.collective.broadcast_from_rank_zero(
        _starting_point(store, config["attempt"]) if rank == 0 else (None, [])
    )
    stacks_name = f"{FAILURES}/hang_attempt{config['attempt']}_rank{rank}.txt"
    watchdog = Watchdog(
        config["hang_minutes"] * 60 or math.inf,
        lambda stacks: store.write_bytes(stacks_name, stacks),
    )
    device = get_device()
    if rank == 0:
        store.write_machine(threads=torch.get_num_threads(), accelerator=accelerator())
        before = store.checkpoints.state(resumed).seconds if resumed else 0.0
        workers = ray.train.get_context().get_world_size()
        store.add_group(Group(workers=workers, seconds=before))
    with (
        watchdog,
        tempfile.TemporaryDirectory(prefix="knet-") as folder,
        store.checkpoints.open(resumed) if resumed else nullcontext() as start,
        ThreadPoolExecutor(1, "upload") as uploads,  # is done before the scratch folder goes
        Notices() as notices,
    ):
        scratch = Path(folder)
        reporter = RayReporter(
            store,
            run_id,
            uploads=uploads,
            retention=Retention(**config["retention"]),
            attempt=config["attempt"],
            eval_batch=recipe.eval.batch_size,
            resumed_from=resumed or "",
            damaged=damaged,
        )
        try:
            result = fit(
                recipe,
                callbacks=[reporter],
                output_dir=scratch,
                resume_from=start,
                device=device,
                images_at_once=config["images_at_once"],
                on_progress=watchdog.beat,
                should_stop=lambda: not may_go_on(everything, run_id, trial_hash),
                should_save=notices.take,
                most_evaluations=config["most_evaluations"],
            )
            reporter.finish()
        except NonFiniteError as error:
            raise NonFiniteError(_keep_dumps(str(error), scratch, store)) from error
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return name, result.finished


def _starting_point(store: TrialStore, attempt: int) -> tuple[str | None, list[str]]:
    """Return the checkpoint to go on from, and one line about each damaged one it had to pass."""
    name, problems = store.checkpoints.newest_undamaged()
    action = f"went on from {name}" if name else "started anew"
    for problem in problems:
        failure = Failure(
            cause="damaged_checkpoint",
            kind="CheckpointError",
            message=problem,
            action=action,
            attempt=attempt,
            step=step_of(name) if name else 0,
        )
        store.write_failure(failure, final=False)
    return name, [f"{problem}; {action}" for problem in problems]


class RayReporter:
    """Hands reports to Ray Train: metrics as they are, checkpoints and pictures to the store.

    Checkpoints go to the store in a thread of their own while training goes on, one at a time.
    """

    def __init__(
        self,
        store: TrialStore,
        run_id: str,
        *,
        uploads: ThreadPoolExecutor,
        retention: Retention,
        attempt: int,
        eval_batch: int,
        resumed_from: str,
        damaged: Sequence[str],
    ) -> None:
        self._points: list[Evaluation] = []
        """Since the newest checkpoint, which the next attempt begins at."""
        self._start = step_of(resumed_from) if resumed_from else 0
        """Its step; 0 without one."""
        self._uploads = uploads
        self._upload: Future[None] | None = None
        """The last one, perhaps still under way."""
        self._retention = retention
        self._damaged = list(damaged)
        """What nobody has been told yet."""
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
        if report.kernel_maps is not None:
            self._keep(kernel_maps_name(report.step), report.kernel_maps)
        if self._damaged:
            metrics["retry"] = "; ".join(self._damaged)
            self._damaged.clear()
        name, checkpoint = None, None
        # A finished run reports its last checkpoint again; the store has it.
        if report.checkpoint is not None and report.checkpoint.name != self._resumed_from:
            self.finish()
            name = report.checkpoint.name
            checkpoint = ray.train.Checkpoint.from_directory(str(report.checkpoint))
            self._upload = self._uploads.submit(self._put, report.checkpoint)
        # Asynchronous also without a checkpoint: it would else wait for the one before it.
        ray.train.report(
            metrics,
            checkpoint=checkpoint,
            checkpoint_dir_name=name,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=self._uploaded,
        )
        if checkpoint is not None:
            self._start, self._points = report.step, []

    def finish(self) -> None:
        """Wait until the store has the last checkpoint.

        Raises:
            StorageError: It refused it.
            DiskFullError: It is full.
        """
        if self._upload is not None:
            self._upload.result()

    def _put(self, checkpoint: Path) -> None:
        self._store.checkpoints.put(checkpoint)
        self._store.checkpoints.thin_out(self._retention)

    def _uploaded(self, checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        """Return a checkpoint in the store once it is there; Ray Train calls it in a thread."""
        self.finish()
        place = ray.train.get_context().get_storage()
        return ray.train.Checkpoint(
            place.build_checkpoint_path_from_name(name), place.storage_filesystem
        )

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


def kernel_maps_name(step: int) -> str:
    """Return where the mean activations of the kernels lie below a trial's folder."""
    return f"{PICTURES}/kernels_{step:06d}.png"


def hang_reports(store: TrialStore, attempt: int) -> Sequence[str]:
    """Return where below the trial's folder the workers of a hung attempt left their stacks."""
    names = fnmatch.filter(store.list(FAILURES), f"hang_attempt{attempt}_rank*.txt")
    return [f"{FAILURES}/{name}" for name in names]


def _keep_dumps(message: str, scratch: Path, store: TrialStore) -> str:
    """Move what explains a failure from the scratch folder to the store."""
    for dump in scratch.glob("nonfinite_*.pt"):
        store.write_bytes(f"{FAILURES}/{dump.name}", dump.read_bytes())
    return message.replace(str(scratch), f"{store.uri}/{FAILURES}")
