import dataclasses

import pytest

from knet_core import BackboneConfig, DataConfig, ModelConfig, Recipe, TrainConfig
from knet_platform.pace import (
    Done,
    Estimate,
    Pace,
    forward_gflop,
    num_iterations,
    peak_memory_gb,
)
from knet_platform.sweep import Trial
from knet_platform.sweep_file import Resources

RECIPE = Recipe(train=TrainConfig(iterations=100))


def trial(arm: str, seed: int, recipe: Recipe = RECIPE) -> Trial:
    return Trial(sweep="s", arm=arm, seed=seed, overrides={}, recipe=recipe, hash=f"{arm}{seed}")


A0, A1 = trial("a", 0), trial("a", 1)
B0 = trial("b", 0, dataclasses.replace(RECIPE, model=ModelConfig(stages=1)))
TRIALS = (A0, B0, A1)


def estimate(trial, resources, history, trials, **known) -> Estimate:
    return Pace(trials, resources, history, **known).estimate(trial)


def test_the_published_model_costs_what_was_counted():
    assert forward_gflop(Recipe()) == pytest.approx(370, rel=0.03)


def test_cost_follows_pixels():
    half = Recipe(data=DataConfig(short_edge=(400, 400)))
    assert forward_gflop(half) == pytest.approx(forward_gflop(Recipe()) / 4)


def test_without_history_the_arithmetic_speaks_with_a_wide_band():
    found = estimate(A0, Resources(), {}, TRIALS)
    assert (found.source, found.band) == ("model", 3.0)
    faster = estimate(A0, Resources(workers=8, gpus_per_worker=1), {}, TRIALS)
    assert faster.seconds < found.seconds / 100


def test_other_seeds_of_the_same_arm_are_the_best_witness():
    history = {"a0": Done(step=100, seconds=50.0), "b0": Done(step=100, seconds=5000.0)}
    found = estimate(A1, Resources(), history, TRIALS)
    assert found.source == "history"
    assert found.seconds == pytest.approx(50.0, abs=25.0)


def test_other_arms_are_scaled_by_their_arithmetic():
    history = {"a0": Done(step=100, seconds=500.0)}
    found = estimate(B0, Resources(), history, TRIALS)
    assert found.source == "history"
    assert 450.0 < found.seconds - 20.0 < 500.0


def test_a_partial_trial_needs_only_the_rest():
    history = {"a0": Done(step=75, seconds=75.0)}
    assert estimate(A0, Resources(), history, TRIALS).seconds == pytest.approx(20.0 + 25.0)


def test_epochs_become_iterations_by_counting_images(tmp_path):
    (tmp_path / "train/ulm").mkdir(parents=True)  # as in Cityscapes
    for index in range(4):
        (tmp_path / "train" / f"{index}.jpg").touch()
        (tmp_path / "train/ulm" / f"{index}.jpg").touch()
    data = DataConfig(root=str(tmp_path))
    recipe = Recipe(data=data, train=TrainConfig(epochs=6, batch_size=4))
    assert num_iterations(recipe) == 12
    begun = dataclasses.replace(recipe, train=TrainConfig(epochs=0.6, batch_size=4))
    assert num_iterations(begun) == 2  # the core trains an epoch's last batch whole
    missing = dataclasses.replace(recipe, data=DataConfig(root=str(tmp_path / "gone")))
    assert num_iterations(missing) is None
    assert estimate(trial("c", 0, missing), Resources(), {}, ()).source == "unknown"


def test_a_probe_speaks_where_the_arm_has_no_history():
    probed = estimate(A0, Resources(), {}, TRIALS, probes={"a": 2.0})
    assert (probed.source, probed.seconds) == ("probe", 20.0 + 200.0)
    history = {"b0": Done(step=100, seconds=100.0), "a1": Done(step=100, seconds=100.0)}
    assert estimate(A0, Resources(), history, TRIALS, probes={"a": 2.0}).seconds == 120.0
    history.pop("a1")
    assert estimate(A0, Resources(), history, TRIALS, probes={"a": 2.0}).seconds == 220.0


def test_a_faster_gpu_is_known_to_be_faster():
    resources = Resources(gpus_per_worker=1)
    slow = estimate(A0, resources, {}, TRIALS, gpu="L4")
    fast = estimate(A0, resources, {}, TRIALS, gpu="H100")
    assert fast.seconds < slow.seconds


def test_memory_is_near_what_was_measured():
    """Measured (benchmarks/RESULTS.md): 3.16 GB for one image of 800 x 1216, 5.19 for two."""
    one = Recipe(train=TrainConfig(batch_size=1))
    two = Recipe(train=TrainConfig(batch_size=2))
    assert peak_memory_gb(one, Resources()) == pytest.approx(3.16, rel=0.2)
    assert peak_memory_gb(two, Resources()) == pytest.approx(5.19, rel=0.2)


def test_memory_follows_what_trains_at_once():
    recipe = Recipe(train=TrainConfig(batch_size=16))
    whole = peak_memory_gb(recipe, Resources(workers=2))
    pieces = dataclasses.replace(recipe, train=TrainConfig(batch_size=16, micro_batch=2))
    half = dataclasses.replace(recipe, train=TrainConfig(batch_size=16, precision="bf16"))
    deep = ModelConfig(backbone=BackboneConfig(name="resnet101"))
    assert peak_memory_gb(recipe, Resources(workers=8)) == peak_memory_gb(pieces, Resources())
    assert peak_memory_gb(half, Resources(workers=2)) < 0.6 * whole
    larger = dataclasses.replace(recipe, model=deep)
    assert peak_memory_gb(larger, Resources(workers=2)) > 1.3 * whole
