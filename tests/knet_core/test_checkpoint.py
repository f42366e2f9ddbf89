import dataclasses
import errno
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from knet_core import CheckpointError, DiskFullError, NewerFormatError, Point, build_model
from knet_core.checkpoint import (
    copy_checkpoint,
    load_model,
    load_trainer,
    load_weights,
    require_same_recipe,
    save_checkpoint,
)
from knet_core.checkpoint_manifest import verify_checkpoint
from knet_core.checkpoint_state import CheckpointState, load_recipe, read_state
from knet_core.data.source import Category
from knet_core.randomness import random_state, restore_random_state

STATE = CheckpointState(
    step=5,
    epoch=0.5,
    categories=(Category(3, "nut"), Category(7, "bolt")),
    metrics={"val/AP": 0.1234567890123456, "train/loss": 2.0},
    evaluations=(Point(step=5, time=1.5, metrics={"val/AP": 0.1234567890123456}),),
    seconds=12.25,
    num_parameters=42,
)
CONTENT = ["model.safetensors", "trainer.pt", "state.json", "recipe.yaml"]
FILES = [*CONTENT, "manifest.json"]


def build(recipe):
    return build_model(recipe, STATE.categories)


def save(directory, recipe, model=None):
    model = model or build(recipe)
    trainer = {"optimizer": {}, "random": [random_state()]}
    save_checkpoint(directory, model=model, trainer=trainer, state=STATE, recipe=recipe)


@pytest.fixture
def saved(tmp_path, tiny_recipe):
    directory = tmp_path / "checkpoint_5"
    save(directory, tiny_recipe())
    return directory


def one_line(error):
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_checkpoint_holds_exactly_its_files(saved):
    assert sorted(path.name for path in saved.iterdir()) == sorted(FILES)
    assert list(saved.parent.iterdir()) == [saved]


def test_state_and_recipe_come_back_exactly(saved, tiny_recipe):
    assert read_state(saved) == STATE
    assert load_recipe(saved) == tiny_recipe()


def test_a_loaded_model_predicts_as_the_saved_one(tmp_path, tiny_recipe):
    model = build(tiny_recipe()).to(memory_format=torch.channels_last)
    save(tmp_path / "checkpoint_5", tiny_recipe(), model)
    loaded = load_model(tmp_path / "checkpoint_5")
    assert not loaded.training
    images = torch.randn(1, 3, 64, 64)
    expected = model.to(memory_format=torch.contiguous_format).eval()(images)
    assert torch.equal(loaded(images).stages[-1].masks, expected.stages[-1].masks)


def test_loading_fetches_no_pretrained_weights(tmp_path, tiny_recipe, monkeypatch):
    recipe = tiny_recipe()
    model = build(recipe)
    backbone = dataclasses.replace(recipe.model.backbone, pretrained=True)
    recipe = dataclasses.replace(
        recipe, model=dataclasses.replace(recipe.model, backbone=backbone)
    )
    save(tmp_path / "checkpoint_5", recipe, model)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    load_model(tmp_path / "checkpoint_5")


def test_random_numbers_continue_after_loading(saved):
    restore_random_state(load_trainer(saved)["random"][0])
    first = (random.random(), np.random.rand(), torch.rand(()).item())
    np.random.randn()  # an odd number of normals leaves one cached
    state = random_state()
    second = (random.random(), np.random.randn(), torch.rand(()).item())
    restore_random_state(state)
    assert (random.random(), np.random.randn(), torch.rand(()).item()) == second
    restore_random_state(load_trainer(saved)["random"][0])
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == first


def test_an_older_checkpoint_of_the_same_step_is_replaced(saved, tiny_recipe):
    (saved / "left_over").touch()
    save(saved, tiny_recipe())
    assert sorted(path.name for path in saved.iterdir()) == sorted(FILES)


def test_a_full_disk_leaves_nothing_half_written(tmp_path, tiny_recipe, monkeypatch):
    before = tmp_path / "checkpoint_4"
    save(before, tiny_recipe())
    calls = []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DiskFullError) as error:
        save(tmp_path / "checkpoint_5", tiny_recipe())
    assert list(tmp_path.iterdir()) == [before]
    needed = sum((before / name).stat().st_size for name in FILES)
    message = one_line(error)
    assert str(tmp_path / "checkpoint_5") in message
    assert f"needs {needed} bytes" in message
    assert "are free" in message


def test_what_a_killed_attempt_left_is_no_obstacle(tmp_path, tiny_recipe):
    left = tmp_path / ".checkpoint_5.unfinished"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    save(tmp_path / "checkpoint_5", tiny_recipe())
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_5"]


def read_everything(directory):
    load_model(directory)
    load_trainer(directory)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(CheckpointError) as error:
        read_everything(saved)
    assert one_line(error).startswith(f"{saved / name}: no such file")


def test_a_directory_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such file; expected a checkpoint directory"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.98])
def test_a_file_cut_short_is_named(saved, name, kept):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(CheckpointError) as error:
        read_everything(saved)
    assert one_line(error).startswith(f"{saved / name}: cut short or damaged")


def test_weights_that_are_no_numbers_are_named(tmp_path, tiny_recipe):
    """They would score 0 without a word."""
    model = build(tiny_recipe())
    with torch.no_grad():
        model.static.kernels.instance.weight[0] = float("nan")
    save(tmp_path / "checkpoint_5", tiny_recipe(), model)
    with pytest.raises(CheckpointError, match=r"NaN .* static\.kernels\.instance\.weight;"):
        load_model(tmp_path / "checkpoint_5")


def test_weights_of_another_model_are_named_with_their_shapes(saved, tmp_path, tiny_recipe):
    other = tmp_path / "checkpoint_6"
    save(other, tiny_recipe(model={"channels": 64, "stages": 3}))
    with pytest.raises(CheckpointError) as error:
        load_weights(build(tiny_recipe()), other)
    message = one_line(error)
    assert "weights of another model: static.fpn." in message
    assert "expected (32, " in message
    assert "found (64, " in message
    assert " more; use the checkpoint of a run with this recipe" in message


@pytest.mark.parametrize("name", ["state.json", "manifest.json"])
def test_a_newer_format_says_so(saved, name):
    file = saved / name
    file.write_text(file.read_text().replace('"format": 2', '"format": 3'))
    read = read_state if name == "state.json" else load_model
    with pytest.raises(NewerFormatError, match=r"newer version, in format 3; .* update knet"):
        read(saved)


def as_first_format(directory):
    (directory / "manifest.json").unlink()
    file = directory / "state.json"
    file.write_text(file.read_text().replace('"format": 2', '"format": 1'))


def test_a_checkpoint_from_before_manifests_still_loads(saved, tiny_recipe):
    as_first_format(saved)
    load_model(saved)
    copy_checkpoint(saved, saved.with_name("checkpoint_6"))
    load_model(saved.with_name("checkpoint_6"))


def test_a_checkpoint_without_its_manifest_was_never_finished(saved):
    (saved / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json: no such file, .* never finished"):
        load_model(saved)


@pytest.mark.parametrize("name", CONTENT)
def test_one_wrong_bit_is_found(saved, name):
    content = bytearray((saved / name).read_bytes())
    content[len(content) // 2] ^= 1
    (saved / name).write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        verify_checkpoint(saved)
    assert one_line(error).startswith(f"{saved / name}: cut short or damaged (its SHA-256")


def test_a_model_wants_only_the_files_that_it_is_made_of(saved):
    """So a model can be handed on without the optimizer's state."""
    (saved / "trainer.pt").unlink()
    load_model(saved)
    (saved / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="0 of"):
        load_model(saved)


def test_a_recipe_with_an_unknown_key_is_of_another_version(saved):
    with (saved / "recipe.yaml").open("a") as stream:
        stream.write("colour: blue\n")
    with pytest.raises(CheckpointError, match=r"another version \(colour: unknown key"):
        load_recipe(saved)


def test_only_a_recipe_with_the_same_results_may_resume(saved, tiny_recipe):
    recipe = tiny_recipe()
    data = dataclasses.replace(recipe.data, num_workers=3, root="elsewhere")
    require_same_recipe(saved, dataclasses.replace(recipe, data=data), 1)
    with pytest.raises(CheckpointError) as error:
        require_same_recipe(saved, tiny_recipe(model={"stages": 1}, optim={"lr": 0.5}), 1)
    message = one_line(error)
    assert "model.stages is 2 there, 1 here" in message
    assert "optim.lr is 0.0001 there, 0.5 here" in message


def test_reading_the_state_needs_no_torch():
    code = "import sys, knet_core.checkpoint_state; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
