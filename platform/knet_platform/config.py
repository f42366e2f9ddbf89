"""YAML and `key=value` in, one frozen `Recipe` out. The only module that knows OmegaConf.

Every source of values becomes one or more `Layer`s of dotted keys. A layer is checked against the
schema when it is made, so that a file's unknown keys are all reported at once (OmegaConf stops at
the first); `resolve` then merges the layers in order and checks types and ranges.
"""

import dataclasses
import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from knet_core import ConfigError, Recipe, unread

COMMAND_LINE = "command line"
SCALE_KEYS = ("recipe", "seeds", "resources")
"""Of a file in `scales/`."""

# A data file says which data set this is. How its images enter the network (sizes, flips,
# loader processes) stays with the recipe and the scale unless the file sets it too.
_DESCRIPTION = (
    "data.format",
    "data.root",
    "data.train",
    "data.val",
    "data.classes",
    "data.shapes",
)


@dataclass(frozen=True, slots=True)
class Layer:
    """Values of one source, as dotted keys that the schema knows."""

    source: str
    """Where the values were written, for messages."""
    values: Mapping[str, Any]
    describes_data: bool = False
    """The description of the data set in earlier layers is dropped before this one applies."""


@contextmanager
def collecting(problems: list[str], *, prefix: str = "") -> Iterator[None]:
    """Add the problems of a `ConfigError` to `problems` instead of stopping at it."""
    try:
        yield
    except ConfigError as error:
        problems.extend(f"{prefix}{problem}" for problem in error.problems)


def suggestion(name: str, choices: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest choice, or nothing.

    A choice whose last part is the name counts as near: `lr` means `optim.lr`, `AP` `val/AP`.
    """
    choices = list(choices)
    near = difflib.get_close_matches(name, choices, n=1)
    near = near or [choice for choice in choices if re.split(r"[./]", choice)[-1] == name]
    return f"; did you mean '{near[0]}'?" if near else ""


def read_yaml(path: Path) -> dict[str, Any]:
    """Return a YAML file's mapping as plain values, keys as strings.

    Raises:
        ConfigError: The file is missing, is not YAML, or is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the file ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text; expected a YAML file") from error
    # OmegaConf's own loader: 1e-3 is a number, a repeated key an error; nothing is interpolated.
    with _yaml_errors(str(path)):
        values = _text_keys(OmegaConf.to_container(OmegaConf.create(text), resolve=False))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    return values


def require_kind(path: Path, values: Mapping[str, Any], expected: str) -> None:
    """Refuse a whole file of another kind in one line instead of key by key.

    Raises:
        ConfigError: It is a sweep, a recipe or a scale, and something else is expected.
    """
    if "metric" in values or "arms" in values:
        found, use = "sweep", "knet run"
    elif {"model", "loss", "optim"} & values.keys():
        found, use = "recipe", "knet train"
    elif "recipe" in values:
        found, use = "scale", "--scale"
    else:
        return
    if found != expected:
        raise ConfigError(f"{path}: is a {found}, for {use}; expected a {expected}")


def file_layers(path: Path) -> tuple[Layer, ...]:
    """Return the layers of a recipe file, those of its `base:` chain first."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    following: Path | None = path
    while following is not None:
        if following.resolve() in {seen.resolve() for seen, _ in chain}:
            raise ConfigError(f"{path}: base: '{following}' leads back to itself")
        values = read_yaml(following)
        require_kind(following, values, "recipe")
        chain.append((following, values))
        base = values.pop("base", None)
        if base is not None and not isinstance(base, str):
            raise ConfigError(f"{following}: base: expected a file name, got {base!r}")
        following = following.parent / base if base else None
    problems: list[str] = []
    layers: list[Layer] = []
    for source, values in reversed(chain):
        with collecting(problems):
            layers.extend(mapping_layers(str(source), values, folder=source.parent))
    if problems:
        raise ConfigError(problems)
    return tuple(layers)


def mapping_layers(
    source: str, values: Mapping[str, Any], *, folder: Path = Path()
) -> tuple[Layer, ...]:
    """Return the layers of nested or dotted values; `data: FILE` is relative to `folder`.

    Raises:
        ConfigError: Keys the schema does not know, or interpolations; all of them.
    """
    flat = dict(flatten(values))
    problems: list[str] = []
    layers: list[Layer] = []
    if isinstance(flat.get("data"), str):
        name = flat.pop("data")
        with collecting(problems):
            layers.append(_data_layer(source, Path(os.path.normpath(folder / name))))
    for key, value in flat.items():
        if problem := _key_problem(key, value):
            problems.append(f"{source}: {key}: {problem}")
    if problems:
        raise ConfigError(problems)
    return (*layers, Layer(source, flat))


def override_layers(overrides: Sequence[str]) -> tuple[Layer, ...]:
    """Return the layers of `key=value` arguments; of a key given twice the last one counts."""
    problems: list[str] = []
    values: dict[str, Any] = {}
    for item in overrides:
        key, equals, _ = item.partition("=")
        if not equals or not key:
            problems.append(f"{COMMAND_LINE}: '{item}': expected key=value")
            continue
        with collecting(problems), _yaml_errors(f"{COMMAND_LINE}: {key}"):
            one = OmegaConf.to_container(OmegaConf.from_dotlist([item]), resolve=False)
            values |= dict(flatten(_text_keys(one)))
    with collecting(problems):
        layers = mapping_layers(COMMAND_LINE, values)
    if problems:
        raise ConfigError(problems)
    return layers


def resolve(layers: Sequence[Layer], *, built: dict[str, Any] | None = None) -> Recipe:
    """Merge defaults and layers, later ones winning, into one recipe.

    Args:
        layers: Values by source.
        built: Sections of recipes resolved before; taken from and added to. The arms of a sweep
            share most of theirs, and OmegaConf needs some 50 ms for a whole recipe.

    Raises:
        ConfigError: Values of the wrong type or range, all of them, each with its source.
    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for layer in layers:
        if layer.describes_data:
            values = {key: value for key, value in values.items() if not _describes(key)}
        values |= layer.values
        sources |= dict.fromkeys(layer.values, layer.source)
    try:
        recipe = _build(values, {} if built is None else built)
    except OmegaConfBaseException as error:
        problems = list(_type_problems(values, sources))
        # A type that single values have right and their combination has not: OmegaConf's words.
        raise ConfigError(problems or str(error).splitlines()[0]) from error
    except ConfigError as error:
        main = next((item.source for item in layers if not item.describes_data), COMMAND_LINE)
        raise ConfigError(
            [f"{sources.get(p.split(':')[0], main)}: {p}" for p in _range_problems(values)]
        ) from error
    return recipe


def _build(values: Mapping[str, Any], built: dict[str, Any]) -> Recipe:
    """Build the recipe section by section."""
    tree = _nested(values)
    arguments = {}
    for name in get_type_hints(Recipe):
        content = {name: tree[name]} if name in tree else {}
        key = f"{name} {content!r}"
        if key not in built:
            section: Any = OmegaConf.masked_copy(_template(), name)
            objects: Any = OmegaConf.to_object(OmegaConf.merge(section, content))
            built[key] = objects[name]
        arguments[name] = built[key]
    return Recipe(**arguments)


@cache
def _template() -> Any:
    """Return the schema with its defaults; merging copies it."""
    return OmegaConf.structured(Recipe)


def load_recipe(
    path: Path,
    *,
    scale: Path | None = None,
    arm: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> Recipe:
    """Merge defaults < the recipe (its `base:` first) < scale < arm < `key=value`.

    Raises:
        ConfigError: Everything that is wrong with any of them.
    """
    problems: list[str] = []
    layers: list[Layer] = []
    with collecting(problems):
        layers.extend(file_layers(path))
    if scale is not None:
        with collecting(problems):
            values = read_yaml(scale)
            problems.extend(
                f"{scale}: {key}: unknown key{suggestion(key, SCALE_KEYS)}"
                for key in values
                if key not in SCALE_KEYS
            )
            layers.extend(scale_layers(scale, values))
    stated: list[Layer] = []
    with collecting(problems):
        stated.extend(mapping_layers("arm", arm or {}))
    with collecting(problems):
        stated.extend(override_layers(overrides))
    layers.extend(stated)
    if problems:
        raise ConfigError(problems)
    recipe = resolve(layers)
    if problems := unread_problems(stated, [recipe]):
        raise ConfigError(problems)
    return recipe


def unread_problems(layers: Iterable[Layer], recipes: Sequence[Recipe]) -> list[str]:
    """Name the keys that layers set and none of the recipes reads, with what decides that.

    For what somebody states for these very recipes. Files may hold more: a checkpoint's recipe
    has every key, and a file that others stand on serves several tasks.
    """
    decided = [unread(recipe) for recipe in recipes]
    problems = []
    for layer in layers:
        for key in () if layer.describes_data else layer.values:
            reasons = [_reason(key, found) for found in decided]
            if reasons[0] and all(reasons):
                decider, _, value = reasons[0].partition("=")
                problems.append(
                    f"{layer.source}: {key}: nothing reads it with {decider}={value}; leave it "
                    f"out, or change {decider}"
                )
    return problems


def _reason(key: str, found: Mapping[str, str]) -> str | None:
    """Return what decides that a key is not read; None if it is."""
    parts = key.split(".")
    above = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((found[part] for part in above if part in found), None)


def scale_layers(path: Path, values: Mapping[str, Any]) -> tuple[Layer, ...]:
    """Return the layers of the `recipe:` part of a scale file."""
    recipe = values.get("recipe") or {}
    if not isinstance(recipe, dict):
        raise ConfigError(f"{path}: recipe: expected keys of a recipe, got {recipe!r}")
    return mapping_layers(str(path), recipe, folder=path.parent)


@contextmanager
def _yaml_errors(source: str) -> Iterator[None]:
    try:
        yield
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise ConfigError(f"{source}: {line}not valid YAML ({error.problem})") from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{source}: not valid YAML ({str(error).splitlines()[0]})") from error


def _text_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _text_keys(item) for key, item in value.items()}
    return [_text_keys(item) for item in value] if isinstance(value, list) else value


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings under dotted keys."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _data_layer(source: str, path: Path) -> Layer:
    if not path.is_file():
        raise ConfigError(
            f"{source}: data: no file '{path}'; expected a data set's description such as "
            f"sweeps/data/coco.yaml"
        )
    values = read_yaml(path)
    require_kind(path, values, "data set's description")
    (layer,) = mapping_layers(str(path), {"data": values})
    return dataclasses.replace(layer, describes_data=True)


def _describes(key: str) -> bool:
    return any(key == part or key.startswith(f"{part}.") for part in _DESCRIPTION)


@cache
def _schema() -> tuple[dict[str, Any], frozenset[str]]:
    """Return the type of every dotted key, and the names of the sections that hold them."""
    leaves: dict[str, Any] = {}
    sections: set[str] = set()

    def walk(schema: type, prefix: str) -> None:
        for name, kind in get_type_hints(schema).items():
            if dataclasses.is_dataclass(kind):
                assert isinstance(kind, type)
                sections.add(f"{prefix}{name}")
                walk(kind, f"{prefix}{name}.")
            else:
                leaves[f"{prefix}{name}"] = kind

    walk(Recipe, "")
    return leaves, frozenset(sections)


def _key_problem(key: str, value: Any) -> str | None:
    leaves, sections = _schema()
    if key in sections:
        expected = "keys below it, or a file name" if key == "data" else "keys below it"
        return f"got {value!r}, expected {expected} ({key}.…)"
    if key not in leaves:
        return f"unknown key{suggestion(key, leaves)}"
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str) and ("${" in item or item == "???"):
            return f"got '{item}', expected the value itself (nothing is interpolated here)"
    return None


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def _merge(values: Mapping[str, Any]) -> Any:
    return OmegaConf.merge(_template(), _nested(values))


def _type_problems(values: Mapping[str, Any], sources: Mapping[str, str]) -> Iterator[str]:
    leaves, _ = _schema()
    for key, value in values.items():
        try:
            _merge({key: value})
        except OmegaConfBaseException:
            yield f"{sources[key]}: {key}: expected {_describe(leaves[key])}, got {value!r}"


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is tuple:
        first, second = get_args(kind)
        return f"a list of {first.__name__}" if second is Ellipsis else f"two {first.__name__}"
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("None", "null")


def _range_problems(values: Mapping[str, Any]) -> list[str]:
    """Build every section on its own, so that one bad section does not hide the next."""
    merged = _merge(values)
    problems: list[str] = []

    def build(schema: type, node: Any) -> Any:
        """Return the section; None if it is wrong, and what holds it has its default instead."""
        plain: dict[str, Any] = {}
        for name, kind in get_type_hints(schema).items():
            value = node[name]
            if dataclasses.is_dataclass(kind):
                assert isinstance(kind, type)
                section = build(kind, value)
                if section is not None:
                    plain[name] = section
            else:
                plain[name] = OmegaConf.to_object(value) if OmegaConf.is_config(value) else value
        with collecting(problems):
            return schema(**plain)
        return None

    build(Recipe, merged)
    return problems
