"""One worker and then two over gloo; `test_evaluation` starts them and reads what they write.

Usage: score_workers.py FOLDER NUM_IMAGES. Every task is evaluated with a model that moves the
ground truth about, the same way wherever an image is predicted.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import distributed, multiprocessing

from knet_core import DataConfig, EvalConfig, ShapesConfig, build_dataset
from knet_core.evaluation import evaluate
from knet_core.structures import Instances, PanopticMap, SemanticMap

TASKS = ("instance", "panoptic", "semantic")


class Guesser(torch.nn.Module):
    def __init__(self, dataset):
        super().__init__()
        self.num_classes = dataset.num_classes
        self.updates = [None]
        self.truth = {
            dataset.load(i, epoch=0).info.image_id: dataset.truth(i) for i in range(len(dataset))
        }

    def forward(self, images):
        return SimpleNamespace(stages=[None] * 2)

    def postprocess(self, output, infos, *, stage=-1):
        return [moved(self.truth[info.image_id], info.image_id) for info in infos]


def moved(truth, seed):
    generator = torch.Generator().manual_seed(seed)
    shift = int(torch.randint(-6, 7, (), generator=generator))
    if isinstance(truth, Instances):
        scores = torch.randint(0, 4, (len(truth.labels),), generator=generator) / 4  # with ties
        masks = truth.masks.roll(shift, dims=2)
        return Instances(scores=scores, labels=truth.labels, masks=masks)
    if isinstance(truth, PanopticMap):
        return PanopticMap(ids=truth.ids.roll(shift, dims=1), segments=truth.segments)
    return SemanticMap(labels=truth.labels.roll(shift, dims=1))


def scores(num_images):
    """Return the metrics of all tasks, and how many images this worker predicted for each."""
    data = DataConfig(
        format="shapes",
        shapes=ShapesConfig(num_train=1, num_val=num_images, size=64),
        short_edge=(64, 64),
        long_edge=64,
    )
    result = {}
    for task in TASKS:
        dataset = build_dataset(data, "val", seed=0, task=task)
        seen = []
        metrics, _ = evaluate(
            Guesser(dataset),
            dataset,
            EvalConfig(probe_images=0),
            device=torch.device("cpu"),
            on_prediction=lambda info, _, seen=seen: seen.append(info.image_id),
        )
        result[task] = {"metrics": metrics, "seen": seen}
    return result


def work(rank, world_size, folder, num_images):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous{world_size}",
        rank=rank,
        world_size=world_size,
    )
    found = json.dumps(scores(num_images))
    (folder / f"worker{rank}_of_{world_size}.json").write_text(found)
    distributed.destroy_process_group()


if __name__ == "__main__":
    for workers in (1, 2):
        # Forked, so that what takes seconds to import is imported once.
        arguments = (workers, Path(sys.argv[1]), int(sys.argv[2]))
        multiprocessing.start_processes(work, arguments, nprocs=workers, start_method="fork")
