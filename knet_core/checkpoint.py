"""Checkpoints: written whole or not at all, read with one clear line about what is wrong.

`checkpoint_<step>/` holds the model (safetensors), the optimizer's and the random generators'
state (`trainer.pt`, loads with `weights_only=True`), how far the run had come (`state.json`), its
recipe (`recipe.yaml`) and, written last, the digests of all these (`manifest.json`). Of an
imported model `trainer.pt` only says where it came from (`IMPORTED`), and the step is 0.
"""

import dataclasses
import errno
import io
import os
import pickle
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from knet_core.checkpoint_manifest import (
    CONTENT_FILES,
    MANIFEST_FILE,
    MODEL_FILE,
    MODEL_FILES,
    TRAINER_FILE,
    dump_manifest,
    verify_checkpoint,
)
from knet_core.checkpoint_state import (
    RECIPE_FILE,
    STATE_FILE,
    CheckpointState,
    dump_recipe,
    load_recipe,
    read_file,
    read_state,
    unreadable,
)
from knet_core.config import EvalConfig, Recipe
from knet_core.errors import CheckpointError, DiskFullError
from knet_core.models.knet import KNet, build_model

IMPORTED = "imported_from"
"""Key of `trainer.pt` where weights came from elsewhere: there is no optimizer to go on with."""

_FREE_TO_CHANGE = frozenset(
    {
        "data.root",
        "data.num_workers",
        "train.log_every",
        "train.checkpoint_minutes",
        "eval.probe_images",
        "eval.fps_iterations",
    }
)
"""Keys of a recipe that change no result, so a run may resume under other values."""
_MOST_NAMED = 3


def checkpoint_name(step: int) -> str:
    """Return the directory name of a checkpoint."""
    return f"checkpoint_{step}"


def save_checkpoint(
    directory: Path,
    *,
    model: nn.Module,
    trainer: Mapping[str, Any],
    state: CheckpointState,
    recipe: Recipe,
) -> None:
    """Write a checkpoint; `directory` appears complete or not at all, and replaces an older one.

    Everything is serialised in memory first: torch and safetensors report a full disk in ways
    of their own, and the space needed is known before the first byte.

    Raises:
        DiskFullError: The disk is full; nothing half-written is left.
    """
    weights = {
        name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()
    }
    buffer = io.BytesIO()
    torch.save(dict(trainer), buffer)
    files = {
        MODEL_FILE: safetensors.torch.save(weights),
        TRAINER_FILE: buffer.getvalue(),
        STATE_FILE: state.to_json().encode(),
        RECIPE_FILE: dump_recipe(recipe).encode(),
    }
    _write_whole(directory, files)


def copy_checkpoint(source: Path, directory: Path) -> None:
    """Copy a checkpoint; `directory` appears complete or not at all.

    Raises:
        CheckpointError: A file is missing.
        DiskFullError: The disk is full; nothing half-written is left.
    """
    _write_whole(directory, {name: read_file(source, name) for name in CONTENT_FILES})


def load_model(
    directory: Path,
    device: str | torch.device = "cpu",
    *,
    evaluation: EvalConfig | None = None,
) -> KNet:
    """Return the model of a checkpoint, ready to predict.

    Args:
        directory: The checkpoint.
        device: Where the model shall compute.
        evaluation: Thresholds and limits of its results; unset: those of its recipe.

    Raises:
        CheckpointError: A file is missing, damaged, of a newer version or of another model.
    """
    verify_checkpoint(directory, MODEL_FILES)
    state = read_state(directory)
    recipe = load_recipe(directory)
    if evaluation is not None:
        recipe = dataclasses.replace(recipe, eval=evaluation)
    model = build_model(without_pretrained(recipe), state.categories)
    load_weights(model, directory)
    return model.to(device).eval()


def load_weights(model: nn.Module, directory: Path) -> None:
    """Copy a checkpoint's weights into a model of the same architecture.

    Raises:
        CheckpointError: The file is missing, cut short, not finite, or belongs to another model.
    """
    file = directory / MODEL_FILE
    try:
        found = safetensors.torch.load(read_file(directory, MODEL_FILE))
    except SafetensorError as error:
        raise unreadable(str(file), error) from error
    differences = list(_differences(model.state_dict(), found))
    if differences:
        rest = len(differences) - _MOST_NAMED
        raise CheckpointError(
            f"{file}: weights of another model: {'; '.join(differences[:_MOST_NAMED])}"
            f"{f'; and {rest} more' if rest > 0 else ''}; "
            f"use the checkpoint of a run with this recipe"
        )
    if spoilt := [name for name, weight in found.items() if not weight.isfinite().all()]:
        raise CheckpointError(
            f"{file}: {len(spoilt)} weights hold NaN or infinity, the first is {spoilt[0]}; "
            f"expected finite ones: use another checkpoint of the run"
        )
    model.load_state_dict(found)


def load_trainer(directory: Path) -> dict[str, Any]:
    """Return what `save_checkpoint` was given as `trainer`, on the CPU.

    Raises:
        CheckpointError: The file is missing, cut short, or of an imported model, which has no such
            state.
    """
    content = io.BytesIO(read_file(directory, TRAINER_FILE))
    try:
        trainer: dict[str, Any] = torch.load(content, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise unreadable(str(directory / TRAINER_FILE), error) from error
    if IMPORTED in trainer:
        raise CheckpointError(
            f"{directory}: imported from {trainer[IMPORTED]}, without the state of an optimizer; "
            f"a run cannot resume from it, start one without this checkpoint"
        )
    return trainer


def require_same_recipe(directory: Path, recipe: Recipe, step: int) -> None:
    """Refuse to resume from a run with other results up to its `step`.

    Raises:
        CheckpointError: The checkpoint's recipe differs in a key that can have changed a result.
    """
    theirs = dict(_leaves(_until(step, load_recipe(directory)).to_dict()))
    ours = dict(_leaves(_until(step, recipe).to_dict()))
    differing = [
        f"{key} is {theirs.get(key)!r} there, {ours.get(key)!r} here"
        for key in sorted(ours.keys() | theirs.keys())
        if key not in _FREE_TO_CHANGE and ours.get(key) != theirs.get(key)
    ]
    if differing:
        rest = len(differing) - _MOST_NAMED
        raise CheckpointError(
            f"{directory / RECIPE_FILE}: trained by another recipe: "
            f"{'; '.join(differing[:_MOST_NAMED])}{f'; and {rest} more' if rest > 0 else ''}; "
            f"resume with the same recipe, or start without this checkpoint"
        )


def _until(step: int, recipe: Recipe) -> Recipe:
    """Return a recipe without what it changes only after `step`."""
    optim = recipe.optim
    past = sum(at < step for at in optim.rescale_at)
    optim = dataclasses.replace(
        optim, rescale_at=optim.rescale_at[:past], rescale_by=optim.rescale_by[:past]
    )
    return dataclasses.replace(recipe, optim=optim)


def without_pretrained(recipe: Recipe) -> Recipe:
    """Return a recipe that fetches no backbone weights, for a model about to be overwritten."""
    backbone = dataclasses.replace(recipe.model.backbone, pretrained=False, checkpoint=None)
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, backbone=backbone))


def _write_whole(directory: Path, content: Mapping[str, bytes]) -> None:
    files = {**content, MANIFEST_FILE: dump_manifest(content).encode()}
    unfinished = directory.with_name(f".{directory.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)  # of an attempt that was killed
        unfinished.mkdir(parents=True)
        for name, data in files.items():
            _write(unfinished / name, data)
        shutil.rmtree(directory, ignore_errors=True)
        unfinished.replace(directory)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _disk_full(directory, sum(map(len, files.values()))) from error


def _write(file: Path, content: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _disk_full(directory: Path, needed: int) -> DiskFullError:
    free = shutil.disk_usage(directory.parent).free
    return DiskFullError(
        f"{directory}: no space left; a checkpoint needs {needed} bytes, {free} are free; "
        f"free some space there and resume the run"
    )


def _differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Iterator[str]:
    for name in [*expected, *(key for key in found if key not in expected)]:
        ours, theirs = (
            tuple(tensors[name].shape) if name in tensors else "nothing"
            for tensors in (expected, found)
        )
        if ours != theirs:
            yield f"{name} expected {ours}, found {theirs}"


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
