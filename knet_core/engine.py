"""The training loop: from a recipe to a trained model, resumable at every checkpoint.

The same function trains on a laptop and as one of many workers: where torch.distributed is
initialised each process is one worker. Whoever wants to see progress passes callbacks.
"""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from knet_core.checkpoint import (
    checkpoint_name,
    copy_checkpoint,
    load_trainer,
    load_weights,
    require_same_recipe,
    save_checkpoint,
    without_pretrained,
)
from knet_core.checkpoint_manifest import verify_checkpoint
from knet_core.checkpoint_state import CheckpointState, read_state
from knet_core.config import Recipe
from knet_core.data import SegmentationDataset, build_dataset, train_loader
from knet_core.distributed import (
    gather_on_zero,
    on_rank_zero,
    rank,
    take_buffers_of_zero,
    world_size,
)
from knet_core.errors import CheckpointError, TrainingMemoryError
from knet_core.evaluation import MemoryLimit, evaluate, measure_fps, stage_picture
from knet_core.inference import keep_freed_memory
from knet_core.kernel_maps import draw_kernel_maps, mean_activations
from knet_core.meter import Meter
from knet_core.models.knet import build_model
from knet_core.pieces import is_separable
from knet_core.progress import Callback, FitResult, Point, Report
from knet_core.randomness import random_state, restore_random_state, seed_everything
from knet_core.save_clock import SaveClock
from knet_core.schedule import Schedule, plan_schedule
from knet_core.trainer import Trainer

_KEPT_CHECKPOINTS = 2
_RANK_SEED_STRIDE = 1_000_003
"""Workers draw different random numbers, the same in every run."""


def fit(
    recipe: Recipe,
    *,
    callbacks: Sequence[Callback] = (),
    output_dir: Path,
    resume_from: Path | None = None,
    device: torch.device | None = None,
    report_every_seconds: float = 10.0,
    images_at_once: int | None = None,
    on_progress: Callable[[], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    should_save: Callable[[], bool] | None = None,
    most_evaluations: int | None = None,
) -> FitResult:
    """Train, evaluate and save; every worker calls it and gets the same result.

    Seeds the process, and lets it keep what it frees (`keep_freed_memory`).

    Args:
        recipe: The run.
        callbacks: Called on every worker at evaluations and checkpoints, and at points of the
            curves when the last report is old.
        output_dir: Scratch: takes the newest two checkpoints, and dumps of failures.
        resume_from: A checkpoint of the same recipe; the run goes on as if never interrupted.
            One that is finished is only reported again.
        device: Where to compute; unset: this worker's GPU if there is one.
        report_every_seconds: Age at which reports are due; 0 reports every point.
        images_at_once: Most images of a worker that train together, after a
            `TrainingMemoryError`; slower, with the same results up to rounding.
        on_progress: Called on every worker after each step and each batch of an evaluation.
        should_stop: Asked on the first worker before each report; once it says yes, the run saves,
            reports and returns.
        should_save: Asked on every worker, or on none, about every other second between steps; as
            soon as one says yes, the run saves and reports, which changes no result. It says yes
            once for each reason.
        most_evaluations: After so many, with those before `resume_from`, the run saves, reports
            and returns as if it had been asked to stop.

    Raises:
        ConfigError: The recipe cannot be run on this many workers or with this data.
        DataError: Data is missing or damaged.
        CheckpointError: `resume_from` is damaged or of another run.
        NonFiniteError: A loss, a gradient or a matching cost is not finite.
        DiskFullError: No space for a checkpoint.
        TrainingMemoryError: The device has no memory for a step.
        EvaluationMemoryError: Nor for the prediction of a single image.
    """
    device = device or _default_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    output_dir.mkdir(parents=True, exist_ok=True)
    train_set = build_dataset(recipe.data, "train", seed=recipe.seed, task=recipe.model.task)
    schedule = plan_schedule(recipe.train, num_images=len(train_set), world_size=world_size())
    state = None
    if resume_from is not None:
        verify_checkpoint(resume_from)
        state = read_state(resume_from)
        require_same_recipe(resume_from, recipe, state.step)
        if state.categories != train_set.categories:
            raise CheckpointError(
                f"{resume_from}: trained on {len(state.categories)} other categories than the "
                f"{len(train_set.categories)} of data.root = {recipe.data.root}; "
                f"resume with the same data"
            )
        if state.step >= schedule.num_iterations:
            return _report_again(state, resume_from, schedule, callbacks, output_dir)

    seed_everything(recipe.seed)
    building = recipe if resume_from is None else without_pretrained(recipe)
    model = build_model(building, train_set.categories)
    trainer = Trainer(
        model,
        recipe,
        num_iterations=schedule.num_iterations,
        device=device,
        output_dir=output_dir,
        images_at_once=images_at_once,
    )
    seed_everything(recipe.seed + rank() * _RANK_SEED_STRIDE)
    run = _Run(
        recipe=recipe,
        schedule=schedule,
        trainer=trainer,
        train_set=train_set,
        val_set=build_dataset(recipe.data, "val", seed=recipe.seed, task=recipe.model.task),
        device=device,
        output_dir=output_dir,
        callbacks=callbacks,
        report_every_seconds=report_every_seconds,
        images_at_once=images_at_once,
        on_progress=on_progress,
        should_stop=should_stop,
        should_save=should_save,
        most_evaluations=most_evaluations,
    )
    if state is not None and resume_from is not None:
        run.resume(state, resume_from)
    keep_freed_memory()  # not before: reading a large data set would leave holes that stay
    return run.train()


class _Run:
    """A run in progress on one worker."""

    def __init__(
        self,
        *,
        recipe: Recipe,
        schedule: Schedule,
        trainer: Trainer,
        train_set: SegmentationDataset,
        val_set: SegmentationDataset,
        device: torch.device,
        output_dir: Path,
        callbacks: Sequence[Callback],
        report_every_seconds: float,
        images_at_once: int | None,
        on_progress: Callable[[], None] | None,
        should_stop: Callable[[], bool] | None,
        should_save: Callable[[], bool] | None,
        most_evaluations: int | None,
    ) -> None:
        self._recipe = recipe
        self._schedule = schedule
        self._trainer = trainer
        self._train_set = train_set
        self._val_set = val_set
        self._device = device
        self._output_dir = output_dir
        self._callbacks = callbacks
        self._report_every_seconds = report_every_seconds
        self._images_at_once = min(images_at_once or schedule.micro_batch, schedule.micro_batch)
        self._on_progress = on_progress or _nothing
        self._eval_limit = MemoryLimit(recipe.eval.batch_size)
        self._should_stop = should_stop
        self._should_save = should_save
        self._most_evaluations = most_evaluations
        self._stopped = False
        self._step = 0
        self._meter = Meter(schedule.batch_size)
        self._points: list[Point] = []
        self._evaluations: list[Point] = []
        self._metrics: dict[str, float] = {}
        self._seconds_before = 0.0
        self._start = self._last_report = time.perf_counter()

    def resume(self, state: CheckpointState, directory: Path) -> None:
        """Go on from a checkpoint."""
        load_weights(self._trainer.model, directory)
        saved = load_trainer(directory)
        self._trainer.load_state_dict(saved)
        if rank() < len(saved["random"]):  # more workers than before: the new ones start afresh
            restore_random_state(saved["random"][rank()])
        if len(saved.get("meter", ())) == world_size():
            self._meter.load_state_dict(saved["meter"][rank()], self._device)
        self._step = state.step
        self._evaluations = list(state.evaluations)
        self._metrics = state.metrics
        self._seconds_before = state.seconds

    def train(self) -> FitResult:
        """Run to the end."""
        schedule = self._schedule
        batches = train_loader(
            self._train_set,
            seed=self._recipe.seed,
            batch_size=schedule.batch_size,
            micro_batch=schedule.micro_batch,
            rank=rank(),
            world_size=world_size(),
            start_step=self._step,
            num_steps=schedule.num_iterations,
            num_workers=self._recipe.data.num_workers,
        )
        self._trainer.model.train()
        self._clock = SaveClock(
            self._recipe.train.checkpoint_minutes, self._should_save, step=self._step
        )
        checkpoint = None
        while self._step < schedule.num_iterations and not self._stopped:
            asked = time.perf_counter()
            micro_batches = [next(batches) for _ in range(schedule.num_micro_batches)]
            waited = time.perf_counter() - asked
            try:
                self._meter.add(self._trainer.step(self._step, micro_batches), waited=waited)
            except torch.OutOfMemoryError as error:
                raise self._memory_error(error) from error
            self._step += 1
            self._on_progress()
            if schedule.logs(self._step):
                point = self._meter.point(self._step)
                self._points.append(point)
                self._metrics = {**self._metrics, "train/loss": point.metrics["train/loss"]}
                checkpoint = self._after_point() or checkpoint
                self._meter.restart()  # evaluating and saving took no training time
            elif self._clock.is_due(self._step):
                checkpoint = self._save_between()
        assert checkpoint is not None, "the last step saves"
        return FitResult(
            step=self._step,
            finished=self._step == schedule.num_iterations,
            metrics=self._metrics,
            evaluations=tuple(self._evaluations),
            checkpoint=checkpoint,
            num_parameters=self._trainer.num_parameters,
            seconds=self._seconds(),
        )

    def _memory_error(self, error: torch.OutOfMemoryError) -> TrainingMemoryError:
        """Say with how many images to go on, or what else would help."""
        images = self._images_at_once
        advice = "lower data.short_edge, data.long_edge or model.num_kernels"
        if images == 1:
            fewer = None
        elif is_separable(self._trainer.model):
            fewer, advice = (
                -(-images // 2),
                f"train.micro_batch={-(-images // 2)} needs less, but weighs images differently",
            )
        else:
            fewer = None
            advice = "its batch normalisation needs them together: use more workers, or " + advice
        reason = str(error).partition(". ")[0]
        return TrainingMemoryError(
            f"step {self._step + 1}: no memory to train on {images} image(s) of a worker at a "
            f"time ({reason}); {advice}, or try train.precision=bf16",
            fewer,
        )

    def _after_point(self) -> Path | None:
        """Evaluate, save and report as far as due; return the new checkpoint."""
        evaluates, saves = self._schedule.evaluates(self._step), self._schedule.saves(self._step)
        eval_batch, picture = self._evaluate() if evaluates else (None, None)
        saves = saves or self._clock.is_due(self._step)
        reports = evaluates or saves or self._report_is_due()
        self._stopped = reports and self._stop_is_asked()
        checkpoint = self._save() if saves or self._stopped else None
        if reports:
            self._report(
                checkpoint,
                evaluation=self._evaluations[-1].metrics if evaluates else None,
                eval_batch=eval_batch,
                picture=picture,
                stage_picture=self._stage_picture() if evaluates else None,
                kernel_maps=self._kernel_maps() if evaluates else None,
            )
        return checkpoint

    def _save_between(self) -> Path:
        """Save and report between two points of the curves."""
        self._stopped = self._stop_is_asked()
        checkpoint = self._save()
        self._report(checkpoint)
        return checkpoint

    def _report(
        self,
        checkpoint: Path | None,
        *,
        evaluation: dict[str, float] | None = None,
        eval_batch: int | None = None,
        picture: bytes | None = None,
        stage_picture: bytes | None = None,
        kernel_maps: bytes | None = None,
    ) -> None:
        report = Report(
            step=self._step,
            epoch=self._schedule.epoch(self._step),
            num_iterations=self._schedule.num_iterations,
            points=tuple(self._points),
            evaluation=evaluation,
            eval_batch=eval_batch,
            picture=picture,
            checkpoint=checkpoint if rank() == 0 else None,
            stage_picture=stage_picture,
            kernel_maps=kernel_maps,
        )
        self._points.clear()
        for callback in self._callbacks:
            callback.on_report(report)
        self._last_report = time.perf_counter()

    def _evaluate(self) -> tuple[int | None, bytes | None]:
        """Return the batch to which memory limited it, and the picture."""
        config = self._recipe.eval
        model = self._trainer.model
        take_buffers_of_zero(model)
        metrics, picture = evaluate(
            model,
            self._val_set,
            config,
            device=self._device,
            num_workers=self._recipe.data.num_workers,
            limit=self._eval_limit,
            on_progress=self._on_progress,
        )
        if self._step == self._schedule.num_iterations and config.fps_iterations > 0:
            fps = on_rank_zero(
                lambda: measure_fps(
                    model, self._val_set, config.fps_iterations, device=self._device
                )
            )
            metrics = {**metrics, "bench/fps": fps}
        self._evaluations.append(Point(step=self._step, time=time.time(), metrics=metrics))
        self._metrics = {**metrics, "train/loss": self._metrics["train/loss"]}
        batches = gather_on_zero(self._eval_limit.images)
        batch = on_rank_zero(lambda: min(batches))
        return batch if batch < config.batch_size else None, picture

    def _stage_picture(self) -> bytes | None:
        """Draw every update's masks once, when training is over."""
        last = self._step == self._schedule.num_iterations
        count, model = self._recipe.eval.probe_images, self._trainer.model
        if rank() != 0 or not last or not count or not model.updates:
            return None
        return stage_picture(model, self._val_set, count, device=self._device)

    def _kernel_maps(self) -> bytes | None:
        """Draw where every instance kernel looks, once training is over; all workers help."""
        last = self._step == self._schedule.num_iterations
        instances = self._recipe.model.task != "semantic"
        if not last or not instances or not self._recipe.eval.probe_images:
            return None
        maps = mean_activations(
            self._trainer.model,
            self._val_set,
            device=self._device,
            num_workers=self._recipe.data.num_workers,
            progress=lambda done, of: self._on_progress(),
        )
        return draw_kernel_maps(maps) if rank() == 0 else None

    def _save(self) -> Path:
        directory = self._output_dir / checkpoint_name(self._step)
        state = CheckpointState(
            step=self._step,
            epoch=self._schedule.epoch(self._step),
            categories=self._train_set.categories,
            metrics=self._metrics,
            evaluations=tuple(self._evaluations),
            seconds=self._seconds(),
            num_parameters=self._trainer.num_parameters,
        )
        random = gather_on_zero(random_state())
        meter = gather_on_zero(self._meter.state_dict())

        def save() -> None:
            save_checkpoint(
                directory,
                model=self._trainer.model,
                trainer={**self._trainer.state_dict(), "random": random, "meter": meter},
                state=state,
                recipe=self._recipe,
            )
            _remove_old_checkpoints(self._output_dir, self._step)

        on_rank_zero(save)
        self._clock.saved()
        return directory

    def _report_is_due(self) -> bool:
        """Ask the first worker's clock, so that all report at the same points."""
        age = time.perf_counter() - self._last_report
        return on_rank_zero(lambda: age >= self._report_every_seconds)

    def _stop_is_asked(self) -> bool:
        ask, most = self._should_stop, self._most_evaluations
        if most is not None and len(self._evaluations) >= most:
            return True
        return ask is not None and on_rank_zero(ask)

    def _seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._start


def _report_again(
    state: CheckpointState,
    directory: Path,
    schedule: Schedule,
    callbacks: Sequence[Callback],
    output_dir: Path,
) -> FitResult:
    """Report a finished run; its checkpoint is copied, as callbacks may move what they get."""
    checkpoint = output_dir / checkpoint_name(state.step)
    if checkpoint.resolve() != directory.resolve():
        on_rank_zero(lambda: copy_checkpoint(directory, checkpoint))
    report = Report(
        step=state.step,
        epoch=state.epoch,
        num_iterations=schedule.num_iterations,
        points=(),
        evaluation=state.evaluations[-1].metrics,
        eval_batch=None,
        picture=None,
        checkpoint=checkpoint if rank() == 0 else None,
    )
    for callback in callbacks:
        callback.on_report(report)
    return FitResult(
        step=state.step,
        finished=True,
        metrics=state.metrics,
        evaluations=state.evaluations,
        checkpoint=checkpoint,
        num_parameters=state.num_parameters,
        seconds=state.seconds,
    )


def _remove_old_checkpoints(output_dir: Path, step: int) -> None:
    """Keep the newest up to `step`; later ones, of an earlier attempt, are not this run's yet."""
    steps = [int(path.name.split("_")[1]) for path in output_dir.glob("checkpoint_[0-9]*")]
    for old in sorted(found for found in steps if found <= step)[:-_KEPT_CHECKPOINTS]:
        shutil.rmtree(output_dir / checkpoint_name(old))


def _nothing() -> None:
    """Take the place of a callback that nobody gave."""


def _default_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    place = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", place % torch.cuda.device_count())
