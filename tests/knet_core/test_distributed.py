"""Two real worker processes over gloo, against one process with the same global batch.

A worker's mask, dice and seg losses are means over its own micro-batch, and gradients are averaged
over workers: exactly what one process does that accumulates over the workers' micro-batches. Only
the class loss differs by design, as it counts objects over all workers; its weight is 0 there, and
it is compared by itself.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from knet_core import (
    BackboneConfig,
    build_dataset,
    build_model,
    fit,
    load_model,
    mean_activations,
)
from knet_core.checkpoint_state import RECIPE_FILE, dump_recipe
from knet_core.data import Category
from knet_core.distributed import (
    gather_on_zero,
    mean_over_ranks,
    on_rank_zero,
    rank,
    sync_batch_norm,
    world_size,
)

WORKERS = Path(__file__).with_name("run_workers.py")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(tiny_recipe):
    return tiny_recipe(iterations=4, eval_every=2, loss={"cls": 0.0})


@pytest.fixture
def workers(recipe, tmp_path):
    """Run both workers and return what each wrote."""
    (tmp_path / RECIPE_FILE).write_text(dump_recipe(recipe))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKERS), str(tmp_path)]
    subprocess.run(command, env=environment, check=True, timeout=200)
    return [json.loads((tmp_path / f"result{rank}.json").read_text()) for rank in range(2)]


def single(recipe, micro_batch, output_dir):
    """Return losses, gradient norms, metrics and weights of one process, step by step."""

    class Recorder:
        points = ()

        def on_report(self, report):
            self.points = (*self.points, *report.points)

    recorder = Recorder()
    train = dataclasses.replace(recipe.train, micro_batch=micro_batch)
    result = fit(
        dataclasses.replace(recipe, train=train), callbacks=[recorder], output_dir=output_dir
    )
    return (
        [point.metrics["train/loss"] for point in recorder.points],
        [point.metrics["train/grad_norm"] for point in recorder.points],
        {name: value for name, value in result.metrics.items() if name.startswith("val/")},
        load_file(result.checkpoint / "model.safetensors"),
    )


def test_two_workers_train_as_one_process_would(workers, recipe, tmp_path):
    for name, micro_batch, tolerance in (("whole", 2, 1e-6), ("accumulating", 1, 1e-4)):
        losses, norms, scores, weights = single(recipe, micro_batch, tmp_path / "single")
        for worker in workers:
            assert worker[name]["losses"] == pytest.approx(losses, rel=tolerance)
            assert worker[name]["norms"] == pytest.approx(norms, rel=tolerance)
            found = {key: worker[name]["metrics"][key] for key in scores}
            assert found == pytest.approx(scores, abs=1e-6)
        theirs = load_file(tmp_path / name / "checkpoint_4" / "model.safetensors")
        for key, value in weights.items():
            torch.testing.assert_close(theirs[key], value, rtol=tolerance, atol=tolerance)

    for worker in workers:
        assert worker["whole"]["steps"] == [2, 4]
    assert [worker["whole"]["pictures"] for worker in workers] == [[True] * 2, [False] * 2]
    assert [worker["whole"]["maps"] for worker in workers] == [[False, True], [False] * 2]
    model = load_model(tmp_path / "whole" / "checkpoint_4")
    dataset = build_dataset(recipe.data, "val", seed=0)
    maps = mean_activations(model, dataset, device=torch.device("cpu"))
    for worker in workers:  # each saw half of the images
        assert worker["activations"] == pytest.approx([maps.mean(), maps.std(), maps.max()])
    assert [worker["whole"]["checkpoints"] for worker in workers] == [[True] * 2, [False] * 2]

    for worker in workers:  # gradients are exchanged once, after the last piece
        assert worker["in_pieces"]["norms"] == pytest.approx(worker["whole"]["norms"], rel=1e-4)
    for worker in workers:  # bit for bit
        assert worker["interrupted"]["losses"] == worker["whole"]["losses"][:2]
        assert worker["resumed"]["losses"] == worker["whole"]["losses"][2:]

    # All evaluate the model that the first one saves, running statistics included.
    saved = load_model(tmp_path / "statistics" / "checkpoint_4")
    assert workers[0]["statistics"] == workers[1]["statistics"]
    assert workers[0]["statistics"][-1] == [b.double().sum().item() for b in saved.buffers()]
    assert workers[0]["statistics"][0] != workers[0]["statistics"][1]

    # The sum over a worker's kernels is divided by the mean of both workers' objects.
    objects = [worker["class_alone"]["objects"] for worker in workers]
    assert objects[0] != objects[1]
    for worker, own in zip(workers, objects, strict=True):
        expected = [loss * own / (sum(objects) / 2) for loss in worker["class_alone"]["losses"]]
        assert worker["class_together"]["losses"] == pytest.approx(expected, rel=1e-6)
        assert len(expected) == 2  # updates

    assert [worker["mean"] for worker in workers] == [[0.5, 1.0]] * 2
    assert [worker["gathered"] for worker in workers] == [[{"rank": 0}, {"rank": 1}], []]
    assert [worker["shared"] for worker in workers] == ["from 0"] * 2
    assert [worker["shared_error"] for worker in workers] == ["no space"] * 2

    for worker in workers:
        assert worker["synchronised"] == (
            "train.sync_batch_norm: got true for 2 workers on CPUs, expected GPUs or one worker; "
            "set train.sync_batch_norm=false"
        )

    assert "the loss of images [2] of another worker is not finite" in workers[0]["nan"]
    assert "the loss is not finite; the images with ids [2]" in workers[1]["nan"]
    assert (tmp_path / "nonfinite_step1_rank1.pt").exists()


@pytest.mark.parametrize("backbone", ["test_resnet", "resnetv2_50"])  # plain, with activations
@torch.no_grad()
def test_synchronised_normalisation_has_the_same_weights_and_predictions(tiny_recipe, backbone):
    torch.manual_seed(0)
    switches = {"backbone": BackboneConfig(name=backbone, pretrained=False, frozen_stages=0)}
    recipe = tiny_recipe(model=switches | {"task": "semantic"})
    model = build_model(recipe, [Category(1, "one"), Category(2, "two")]).eval()
    images = torch.randn(2, 3, 64, 64)
    expected, before = model(images), {k: v.clone() for k, v in model.state_dict().items()}
    names = {name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}

    sync_batch_norm(model, torch.device("cpu"))  # one worker has nobody to wait for
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    synchronised = {n for n, m in model.named_modules() if isinstance(m, nn.SyncBatchNorm)}
    assert synchronised == names
    assert len(names) > 5
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    found = model(images)
    for ours, theirs in zip(found.stages, expected.stages, strict=True):
        assert torch.equal(ours.masks, theirs.masks)
        assert torch.equal(ours.kernels, theirs.kernels)


def test_alone_a_process_is_the_first_worker_of_one():
    assert (rank(), world_size()) == (0, 1)
    values = torch.ones(2)
    assert mean_over_ranks(values) is values
    assert gather_on_zero("mine") == ["mine"]
    assert on_rank_zero(lambda: 5) == 5
