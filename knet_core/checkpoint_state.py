"""The parts of a checkpoint that need no torch: `state.json` and `recipe.yaml`."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from knet_core.config import Recipe
from knet_core.data.source import Category
from knet_core.errors import CheckpointError, ConfigError, NewerFormatError
from knet_core.progress import Point

FORMAT = 2
"""Of the checkpoints that are written; 1 is read too, and had no manifest."""
STATE_FILE = "state.json"
RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointState:
    """How far a run had come."""

    step: int
    """Optimizer steps done; also the position in the training sequence."""
    epoch: float
    """Passes over the training images."""
    categories: tuple[Category, ...]
    """Classes in the order of labels."""
    metrics: dict[str, float]
    """Of the last evaluation, with the last `train/loss`."""
    evaluations: tuple[Point, ...]
    seconds: float
    """Wall-clock seconds of training and evaluation so far, over all attempts."""
    num_parameters: int
    """Parameters that train."""

    def to_json(self) -> str:
        """Return the text of `state.json`."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2, allow_nan=False) + "\n"


def parse_state(text: str | bytes, source: str) -> CheckpointState:
    """Return the state in the text of a `state.json`; `source` names it in errors.

    Raises:
        NewerFormatError: A newer version wrote it.
        CheckpointError: The text is not such a state.
    """
    try:
        values: dict[str, Any] = json.loads(text)
        require_known(values.pop("format"), source)
        return CheckpointState(
            **{
                **values,
                "categories": tuple(Category(**item) for item in values["categories"]),
                "evaluations": tuple(Point(**item) for item in values["evaluations"]),
            }
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise unreadable(source, error) from error


def read_state(directory: Path) -> CheckpointState:
    """Return the state of a checkpoint.

    Raises:
        CheckpointError: The file is missing, cut short or not a checkpoint's.
    """
    return parse_state(read_file(directory, STATE_FILE), str(directory / STATE_FILE))


def checkpoint_format(directory: Path) -> int:
    """Return the format in which a checkpoint was written.

    Raises:
        CheckpointError: Its state is missing, cut short or not a checkpoint's.
    """
    file = directory / STATE_FILE
    try:
        return int(json.loads(read_file(directory, STATE_FILE))["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise unreadable(str(file), error) from error


def require_known(found: int, source: str) -> None:
    """Refuse a format that did not exist when this version was made.

    Raises:
        NewerFormatError: It did not.
    """
    if found > FORMAT:
        raise NewerFormatError(
            f"{source}: written by a newer version, in format {found}; this one reads up to "
            f"format {FORMAT}: update knet"
        )


def load_recipe(directory: Path) -> Recipe:
    """Return the recipe that a checkpoint was trained by.

    Raises:
        CheckpointError: The file is missing, cut short or not a recipe of this version.
    """
    file = directory / RECIPE_FILE
    try:
        values = yaml.safe_load(read_file(directory, RECIPE_FILE))
        return Recipe.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(
            f"{file}: written by another version ({'; '.join(error.problems)}); "
            f"train again with this version"
        ) from error
    except (yaml.YAMLError, TypeError, ValueError, AttributeError) as error:
        raise unreadable(str(file), error) from error


def dump_recipe(recipe: Recipe) -> str:
    """Return the text of `recipe.yaml`."""
    text: str = yaml.safe_dump(recipe.to_dict(), sort_keys=False)
    return text


def read_file(directory: Path, name: str) -> bytes:
    """Return the bytes of one of a checkpoint's files.

    Raises:
        CheckpointError: There is no such file.
    """
    try:
        return (directory / name).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{directory / name}: no such file; expected a checkpoint directory "
            f"checkpoint_<step> with model.safetensors, trainer.pt, {STATE_FILE} and {RECIPE_FILE}"
        ) from error


def unreadable(file: str, error: Exception | str) -> CheckpointError:
    """Return the error for a file that exists but cannot be understood."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return CheckpointError(
        f"{file}: cut short or damaged ({reason}); use another checkpoint of the run"
    )
