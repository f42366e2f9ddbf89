"""Two workers over gloo; `test_distributed` starts them and reads what they write.

Usage: run_workers.py FOLDER, which holds recipe.yaml of the run to repeat.
"""

import contextlib
import dataclasses
import json
import math
import sys
from pathlib import Path

import torch
from torch import distributed, multiprocessing

from knet_core import (
    KNetError,
    build_dataset,
    build_model,
    engine,
    fit,
    load_model,
    mean_activations,
)
from knet_core.checkpoint_state import load_recipe
from knet_core.data import collate
from knet_core.distributed import gather_on_zero, mean_over_ranks, on_rank_zero
from knet_core.trainer import Trainer


class Recorder:
    def __init__(self, stop_at=None):
        self.reports = []
        self.stop_at = stop_at

    def on_report(self, report):
        self.reports.append(report)
        if report.step == self.stop_at:
            raise InterruptedError


def run(recipe, output_dir, resume_from=None, stop_at=None, images_at_once=None):
    """Return what one `fit` told this worker, as plain values."""
    recorder = Recorder(stop_at)
    metrics = None
    with contextlib.suppress(InterruptedError):
        metrics = fit(
            recipe,
            callbacks=[recorder],
            output_dir=output_dir,
            resume_from=resume_from,
            images_at_once=images_at_once,
        ).metrics
    return {
        "metrics": metrics,
        "steps": [report.step for report in recorder.reports],
        "losses": [p.metrics["train/loss"] for r in recorder.reports for p in r.points],
        "norms": [p.metrics["train/grad_norm"] for r in recorder.reports for p in r.points],
        "pictures": [report.picture is not None for report in recorder.reports],
        "maps": [report.kernel_maps is not None for report in recorder.reports],
        "checkpoints": [report.checkpoint is not None for report in recorder.reports],
    }


def activations(recipe, checkpoint):
    """Return a summary of the kernel maps of a saved model."""
    dataset = build_dataset(recipe.data, "val", seed=0)
    maps = mean_activations(load_model(checkpoint), dataset, device=torch.device("cpu"))
    return [maps.mean().item(), maps.std().item(), maps.max().item()]


def statistics_in_evaluation(recipe, folder):
    """Return sums of the buffers that each evaluation of a run found; they train with weights."""
    backbone = dataclasses.replace(recipe.model.backbone, frozen_stages=0, norm_eval=False)
    model = dataclasses.replace(recipe.model, backbone=backbone)
    found = []

    def watched(model, *arguments, **options):
        found.append([buffer.double().sum().item() for buffer in model.buffers()])
        return evaluate(model, *arguments, **options)

    evaluate, engine.evaluate = engine.evaluate, watched
    fit(dataclasses.replace(recipe, model=model), output_dir=folder)
    engine.evaluate = evaluate
    return found


def class_losses(recipe, rank):
    """Return the class loss after every update for an image of this worker, and its objects."""
    recipe = dataclasses.replace(recipe, loss=dataclasses.replace(recipe.loss, cls=1.0))
    dataset = build_dataset(recipe.data, "train", seed=0)
    batch = collate([dataset.load(rank, epoch=0)])
    torch.manual_seed(0)
    model = build_model(recipe, dataset.categories).eval()
    with torch.no_grad():
        stages = model.criterion(model(batch.images), batch.targets).stages
    losses = [stage.cls.item() for stage in stages if stage.cls is not None]
    return {"losses": losses, "objects": len(batch.targets[0].labels)}


def nan_on_the_second_worker(recipe, folder, rank):
    """Return this worker's error when only the second worker's loss is not finite."""
    dataset = build_dataset(recipe.data, "train", seed=0)
    batch = collate([dataset.load(rank, epoch=0)])
    model = build_model(recipe, dataset.categories)
    trainer = Trainer(
        model.train(), recipe, num_iterations=9, device=torch.device("cpu"), output_dir=folder
    )
    if rank == 1:
        criterion = model.criterion
        model.criterion = lambda *args: dataclasses.replace(
            (terms := criterion(*args)), seg=terms.seg * math.nan
        )
    return error_of(lambda: trainer.step(0, [batch]))


def synchronised_on_a_cpu(recipe, folder):
    """Return this worker's error when batch normalisation is to be synchronised."""
    train = dataclasses.replace(recipe.train, sync_batch_norm=True)
    return error_of(lambda: fit(dataclasses.replace(recipe, train=train), output_dir=folder))


def fails_on_the_first_worker():
    raise KNetError("no space")


def error_of(work):
    try:
        work()
    except KNetError as error:
        return str(error)
    return None


def work(rank, folder):
    torch.set_num_threads(1)
    recipe = load_recipe(folder)
    alone = class_losses(recipe, rank)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    accumulating = dataclasses.replace(
        recipe, train=dataclasses.replace(recipe.train, micro_batch=1)
    )
    first = folder / "first"
    results = {
        "whole": run(recipe, folder / "whole"),
        "accumulating": run(accumulating, folder / "accumulating"),
        "in_pieces": run(recipe, folder / "in_pieces", images_at_once=1),
        "interrupted": run(recipe, first, stop_at=2),
        "resumed": run(recipe, folder / "second", resume_from=first / "checkpoint_2"),
        "mean": mean_over_ranks(torch.tensor([float(rank), 1.0])).tolist(),
        "gathered": gather_on_zero({"rank": rank}),
        "shared": on_rank_zero(lambda: f"from {rank}"),
        "shared_error": error_of(lambda: on_rank_zero(fails_on_the_first_worker)),
        "synchronised": synchronised_on_a_cpu(recipe, folder / "synchronised"),
        "activations": activations(recipe, folder / "whole" / "checkpoint_4"),
        "statistics": statistics_in_evaluation(recipe, folder / "statistics"),
        "class_alone": alone,
        "class_together": class_losses(recipe, rank),
        "nan": nan_on_the_second_worker(recipe, folder, rank),
    }
    (folder / f"result{rank}.json").write_text(json.dumps(results))
    distributed.destroy_process_group()


if __name__ == "__main__":
    # Forked, so that what takes seconds to import is imported once.
    multiprocessing.start_processes(work, (Path(sys.argv[1]),), nprocs=2, start_method="fork")
