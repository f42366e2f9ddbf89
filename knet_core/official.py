"""The published checkpoints of K-Net, brought into this project's format (KNET_SPEC 9).

A published file is a pickle of `meta` and `state_dict`. It is read without running any code of
its own, its weights get their names here, and its configuration follows from their shapes.
"""

import dataclasses
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from knet_core.checkpoint import IMPORTED, save_checkpoint, without_pretrained
from knet_core.checkpoint_state import CheckpointState
from knet_core.config import Recipe
from knet_core.data.source import Category
from knet_core.errors import CheckpointError, ConfigError
from knet_core.models.knet import KNet, build_model
from knet_core.official_config import (
    Published,
    category_ids,
    disagreements,
    infer,
    published_recipe,
    window_of,
)
from knet_core.official_names import SWIN_INDEX, SWIN_TABLE, constants, rename, window_index

_MOST_NAMED = 3
_NUMPY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")  # numpy 1 and 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What became of a published checkpoint."""

    directory: Path
    recipe: Recipe
    categories: tuple[Category, ...]
    num_keys: int
    """Weights and statistics taken over."""
    num_parameters: int
    num_trainable: int
    notes: tuple[str, ...]
    """What the file holds and the import leaves out, one line each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedFile:
    """The content of a published file."""

    weights: Mapping[str, Tensor]
    class_names: tuple[str, ...] | None
    """Of `meta`, where the file names its classes."""
    other: tuple[str, ...]
    """Further entries, such as the optimizer's."""


def import_official(
    file: Path | str,
    out: Path | str,
    recipe: Recipe | None = None,
    *,
    things: int | None = None,
) -> Imported:
    """Write a published checkpoint as a checkpoint directory of this project.

    Args:
        file: A `.pth` of the K-Net repository or of mmsegmentation.
        out: The checkpoint directory to write; absent or empty.
        recipe: Its model takes the place of what names and shapes say, and its `data.classes` of
            the file's names.
        things: Countable classes, where neither the recipe nor COCO's numbers tell.

    Raises:
        CheckpointError: The file is damaged, holds what need not be read, or is no K-Net's.
        ConfigError: The recipe's model is not the file's.
        DiskFullError: The disk is full; nothing half-written is left.
    """
    file, out = Path(file), Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: exists; name a folder that does not exist yet")
    content = read_published(file)
    shapes = {key: tuple(tensor.shape) for key, tensor in content.weights.items()}
    given = None if recipe is None else recipe.model
    published = infer(shapes, str(file), given=given, things=things)
    if recipe is None:
        recipe = published_recipe(published.model)
    elif problems := disagreements(published, recipe.model, str(file), shapes):
        raise ConfigError(problems)
    if recipe.data.classes and len(recipe.data.classes) != published.num_classes:
        raise ConfigError(
            f"data.classes: the recipe has {len(recipe.data.classes)} names, {file} "
            f"{published.num_classes} classes; expected a name for each: take the data set that "
            f"the weights were trained on"
        )
    recipe = dataclasses.replace(without_pretrained(recipe), compat="published")
    categories, notes = _categories(published, recipe.data.classes or content.class_names)
    with torch.device("meta"):
        model = build_model(recipe, categories)
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.load_state_dict(fit_weights(model, content.weights, str(file)), assign=True)
    save_checkpoint(
        out,
        model=model,
        trainer={IMPORTED: file.name},
        state=CheckpointState(
            step=0,
            epoch=0.0,
            categories=categories,
            metrics={},
            evaluations=(),
            seconds=0.0,
            num_parameters=num_trainable,
        ),
        recipe=recipe,
    )
    return Imported(
        directory=out,
        recipe=recipe,
        categories=categories,
        num_keys=len(content.weights) - len(constants(content.weights)),
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_trainable=num_trainable,
        notes=(*notes, *left_out(content)),
    )


def read_published(file: Path) -> PublishedFile:
    """Return what a published file holds; no code of the file is run.

    Raises:
        CheckpointError: The file is missing, cut short, or holds other things than finite weights,
            text and numbers.
    """
    try:
        file.open("rb").close()
    except OSError as error:
        raise CheckpointError(
            f"{file}: cannot read the file ({error.strerror}); expected a published .pth"
        ) from error
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_safe_globals()):
            warnings.simplefilter("ignore")  # of a pickle that torch did not write
            content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes are instructions too, and fail in every way
        raise _unreadable(file, error) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{file}: holds a {type(content).__name__}, expected a mapping with state_dict"
        )
    weights = content.get("state_dict", content)
    if not isinstance(weights, dict) or not weights:
        raise CheckpointError(f"{file}: state_dict holds no weights; use a complete file")
    odd = [str(key) for key, value in weights.items() if not isinstance(value, Tensor)]
    if odd:
        raise CheckpointError(f"{file}: no tensors, where weights are expected: {_few(odd)}")
    spoilt = [str(key) for key, tensor in weights.items() if not tensor.isfinite().all()]
    if spoilt:
        raise CheckpointError(
            f"{file}: holds NaN or infinity in {_few(spoilt)}; expected finite weights: fetch the "
            f"file again"
        )
    meta = content.get("meta") if weights is not content else None
    names = meta.get("CLASSES") if isinstance(meta, dict) else None
    return PublishedFile(
        weights={str(key): value for key, value in weights.items()},
        # Some of mmdetection's names begin with a blank.
        class_names=tuple(str(name).strip() for name in names)
        if isinstance(names, (list, tuple))
        else None,
        other=()
        if weights is content
        else tuple(str(key) for key in content if key not in ("meta", "state_dict")),
    )


def fit_weights(model: KNet, weights: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return published weights under the names and in the types of `model`.

    Raises:
        CheckpointError: A weight is left over, missing or of another shape; names the first.
    """
    expected = model.state_dict()
    renamed, origins, unknown = rename(weights)
    problems = [f"{key} is unknown" for key in unknown]
    for name, tensor in renamed.items():
        if name not in expected:
            problems.append(f"{origins[name]} has no place in the model")
        elif tensor.shape != expected[name].shape:
            problems.append(
                f"{origins[name]} is {tuple(tensor.shape)}, the model's {name} is "
                f"{tuple(expected[name].shape)}"
            )
    problems += [f"{name} is missing" for name in expected if name not in renamed]
    if problems:
        raise CheckpointError(
            f"{source}: weights do not fit the model: {_few(problems)}; describe it by a recipe "
            f"(--recipe), or use an unchanged published file"
        )
    return {name: tensor.to(expected[name].dtype).contiguous() for name, tensor in renamed.items()}


def _safe_globals() -> list[Any]:
    """Return what published files hold beside tensors, text and containers: numbers of numpy."""
    multiarray: Any = np.asarray(0.0).__reduce__()[0]  # its own way to make an array again
    scalar: Any = np.float64(0.0).__reduce__()[0]
    kinds = {type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}
    return [
        np.dtype,
        np.ndarray,
        *kinds,
        *((multiarray, f"{module}._reconstruct") for module in _NUMPY_MODULES),
        *((scalar, f"{module}.scalar") for module in _NUMPY_MODULES),
    ]


def _unreadable(file: Path, error: Exception) -> CheckpointError:
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused and isinstance(error, pickle.UnpicklingError):
        return CheckpointError(
            f"{file}: holds {refused[1]}, which may run code when read; expected tensors, text "
            f"and numbers; where you trust the file, save its state_dict alone"
        )
    # torch's own words advise to run the file's code; they stay in the traceback's cause.
    return CheckpointError(
        f"{file}: cut short or damaged; expected a complete file of torch.save; fetch it again"
    )


def _categories(
    published: Published, names: Sequence[str] | None
) -> tuple[tuple[Category, ...], tuple[str, ...]]:
    """Return the model's classes, things first, and what to say about their names."""
    notes: tuple[str, ...] = ()
    if names is None or len(names) != published.num_classes:
        found = "no names" if names is None else f"{len(names)} names"
        notes = (
            f"{found} for {published.num_classes} classes: called class_0, class_1, ... here",
        )
        names = [f"class_{label}" for label in range(published.num_classes)]
    numbers = category_ids(published.num_things, published.num_classes)
    return tuple(
        Category(number, name, label < published.num_things)
        for label, (number, name) in enumerate(zip(numbers, names, strict=True))
    ), notes


def left_out(content: PublishedFile) -> Iterator[str]:
    """Yield a line for each kind of content that an import does not take over."""
    if content.other:
        yield f"left out, a run cannot resume from it: {', '.join(content.other)}"
    constant = constants(content.weights)
    if not constant:
        return
    yield f"left out, the window size implies them: {len(constant)} {SWIN_INDEX}"
    odd = []
    for key in constant:
        table = content.weights[key.replace(SWIN_INDEX, SWIN_TABLE)]
        if not torch.equal(content.weights[key].long(), window_index(window_of(table.shape))):
            odd.append(key)
    if odd:
        yield f"not what the window size implies, so results may differ: {_few(odd)}"


def _few(problems: Sequence[str]) -> str:
    rest = len(problems) - _MOST_NAMED
    return "; ".join(problems[:_MOST_NAMED]) + (f"; and {rest} more" if rest > 0 else "")
