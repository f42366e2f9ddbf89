"""A sweep file in, frozen trials out: every arm with every seed, fully resolved and checked.

A trial is known by the hash of everything that can change its result (`identity`). So the same run
in two sweeps is one trial, and a finished trial is never run again. Loads no torch, Ray or MLflow;
writes nothing but, of data behind an address, the annotations into the cache.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knet_core import ConfigError, DataConfig, Recipe
from knet_platform.config import (
    COMMAND_LINE,
    SCALE_KEYS,
    Layer,
    collecting,
    file_layers,
    mapping_layers,
    override_layers,
    read_yaml,
    require_kind,
    resolve,
    scale_layers,
    suggestion,
    unread_problems,
)
from knet_platform.errors import PlatformError
from knet_platform.identity import digest, same_run, trial_hash
from knet_platform.members import population_note, population_problems, with_members
from knet_platform.metrics import unmeasured
from knet_platform.search import Search, SearchSpec, arm_name, ends
from knet_platform.staging import fingerprint
from knet_platform.sweep import Sweep, Trial
from knet_platform.sweep_file import (
    Arm,
    Asha,
    Metric,
    Paper,
    Resources,
    SweepReader,
)


class LargeSweepError(PlatformError):
    """A sweep is so large that it should be meant.

    Args:
        count: Trials that it would have.
        sample: The same sweep with one or two of its arms, fully resolved.
    """

    exit_code = 2

    def __init__(self, count: int, sample: Sweep) -> None:
        self.count = count
        self.sample = sample
        super().__init__(f"{sample.path}: {count:,} trials")


def load_sweep(
    path: Path,
    *,
    scale: str | None = None,
    overrides: Sequence[str] = (),
    seeds: int | None = None,
    most_trials: int | None = None,
) -> Sweep:
    """Read, check and expand a sweep.

    Args:
        path: The sweep file; `base:` and `scales/` are relative to its folder.
        scale: Name of a file in `scales/`, or a path ending in .yaml.
        overrides: `key=value` arguments; they win over arms.
        seeds: Run seeds 0 to `seeds` - 1 instead of the listed ones.
        most_trials: Expand no more than these; unset: any number.

    Raises:
        ConfigError: Everything that is wrong with the sweep, at once.
        LargeSweepError: It has more than `most_trials`; found before they are made.
        DataError: The data set is not there.
    """
    values = read_yaml(path)
    require_kind(path, values, "sweep")
    problems: list[str] = []
    scale_path, scale_values = None, dict[str, Any]()
    if scale is not None:
        with collecting(problems):
            scale_path = find_scale(path.parent / "scales", scale)
            scale_values = read_yaml(scale_path)
    listed = scale_values.get("seeds", values.get("seeds", [0]))
    count = _num_arms(values) * (seeds if seeds is not None else len(listed or [0]))
    if most_trials is not None and count > most_trials:
        values = _sample(values)
    reader = SweepReader(path, values, problems=problems)
    name = reader.name()
    arms = reader.arms(scale_path.stem if scale_path else None)
    baseline = reader.baseline(arms)
    metric = reader.metric()
    paper = reader.paper(arms)
    spec = reader.search()
    resources = reader.resources("resources", values.get("resources"), Resources())
    budget = reader.budget()
    scheduler, population = reader.scheduler(), reader.population()
    chosen = reader.seeds("seeds", values.get("seeds", [0]))
    if scale_path is not None:
        reader = SweepReader(scale_path, scale_values, known=SCALE_KEYS, problems=problems)
        resources = reader.resources("resources", scale_values.get("resources"), resources)
        if "seeds" in scale_values:
            chosen = reader.seeds("seeds", scale_values["seeds"])
    if seeds is not None:
        if seeds < 1:
            problems.append(f"{COMMAND_LINE}: --seeds: expected at least 1, got {seeds}")
        chosen = tuple(range(seeds))

    base = values["base"] if spec and isinstance(values.get("base"), str) else None
    bases = [*(arm.base for arm in arms.values()), base]
    layers = _read_layers(path, bases, scale_path, scale_values, overrides, problems)
    stacks = _stacks(path, arms, layers, scale_path, problems)
    search = None
    if spec is not None:
        search = Search(spec=spec, path=path, below=layers.below(base), above=layers.last)
        problems.extend(search.key_problems())
    if problems:
        raise ConfigError(problems)
    recipes: dict[str, Recipe] = {}
    sections: dict[str, Any] = {}
    for arm, stack in stacks.items():
        with collecting(problems):
            recipes[arm] = resolve(stack, built=sections)
    if search is not None:
        search = _with_ends(search, sections, problems)
    notes: list[str] = []
    if not problems:
        alone = {baseline} if population else {}  # equal to a member, it is another run still
        equal = {arm: recipe for arm, recipe in recipes.items() if arm not in alone}
        notes = _merge_notes(path, equal, baseline, problems) + _scale_notes(arms)
        notes += _arm_unread_notes(path, arms, layers, stacks, recipes, problems)
        everything = [*recipes.values(), *(search.ends.values() if search else ())]
        problems.extend(unread_problems(layers.last, everything))
        problems.extend(_metric_problems(path, recipes, metric, paper))
        for arm, recipe in recipes.items():
            problems.extend(worker_problems(f"{path}: arms.{arm}", recipe, resources))
        if population is not None:
            problems.extend(
                f"{path}: scheduler: pbt: {problem}"
                for problem in population_problems(recipes, baseline, chosen, search)
            )
        if search is not None:
            space = Layer(f"{path}: search.space", search.spec.space)
            problems.extend(unread_problems([space], list(search.ends.values())))
            for end, recipe in search.ends.items():
                problems.extend(worker_problems(f"{path}: search.space: {end}", recipe, resources))
        if (scheduler or population) and not metric.name.startswith("val/"):
            problems.append(
                f"{path}: metric.name: got {metric.name}, which is known at the end of a run; "
                f"expected a val/ metric: the scheduler judges evaluations"
            )
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))

    if unused := sorted({recipe.seed for recipe in recipes.values()} - {0}):
        notes.append(
            f"seed {', '.join(map(str, unused))} of the recipe is not used: a sweep has seeds of "
            f"its own"
        )
    if budget.gpu_hours is not None and not resources.gpus_per_worker:
        notes.append("budget.gpu_hours limits nothing without GPUs; budget.usd would")
    if scheduler is not None:
        notes.append(_screen_note(scheduler, chosen[0]))
    if search is not None:
        notes.append(_search_note(search.spec, chosen[0]))
        search = _with_id(search, metric, chosen[0])
    if population is not None:
        notes.append(population_note(population))
    sweep = Sweep(
        name=name,
        path=path,
        title=_title(path),
        metric=metric,
        baseline=baseline,
        seeds=chosen,
        arms=tuple(arms),
        paper=paper,
        resources=resources,
        budget=budget,
        scheduler=scheduler,
        population=population,
        search=search,
        trials=make_trials(
            name, recipes, {arm: said.stated | said.at_scale for arm, said in arms.items()}, chosen
        ),
        notes=tuple(notes),
    )
    if population is not None:
        sweep = with_members(sweep, population)
    if most_trials is not None and count > most_trials:
        raise LargeSweepError(count, sweep)
    return sweep


def make_trials(
    sweep: str,
    recipes: Mapping[str, Recipe],
    settings: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
) -> tuple[Trial, ...]:
    """Return every arm with every seed, seed by seed.

    Args:
        sweep: Its name.
        recipes: By arm, resolved.
        settings: By arm, what it sets.
        seeds: Of each arm.

    Raises:
        DataError: A data set is not there.
    """
    fingerprints: dict[DataConfig, str] = {}
    trials = []
    for seed, (arm, recipe) in itertools.product(seeds, recipes.items()):
        if recipe.data not in fingerprints:
            fingerprints[recipe.data] = fingerprint(recipe.data)
        seeded = dataclasses.replace(recipe, seed=seed)
        trials.append(
            Trial(
                sweep=sweep,
                arm=arm,
                seed=seed,
                overrides=dict(settings[arm]),
                recipe=seeded,
                hash=trial_hash(seeded, fingerprints[recipe.data]),
            )
        )
    return tuple(trials)


def _num_arms(values: Mapping[str, Any]) -> int:
    arms, grid = values.get("arms") or {}, values.get("grid") or {}
    axes = [axis for axis in grid.values() if isinstance(axis, list)]
    search = values.get("search")
    trials = search.get("trials") if isinstance(search, dict) else 0
    suggested = trials if isinstance(trials, int) else 0
    return len(arms) + (math.prod(map(len, axes)) if axes else 0) + suggested


def _sample(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sweep of the same kind with one arm of each listed one and of the grid."""
    cut = {key: axis[:1] for key, axis in (values.get("grid") or {}).items()}
    arm = arm_name({key: value for key, (value,) in cut.items()})
    arms = dict(itertools.islice((values.get("arms") or {}).items(), 1))
    changes: dict[str, Any] = {"arms": arms, "grid": cut, "baseline": arm or next(iter(arms))}
    kept = {
        key: value
        for key, value in values.items()
        if key not in ("paper", "scales", "scheduler", "search")
    }
    return kept | {key: value for key, value in changes.items() if value}


def _title(path: Path) -> str:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#!"):
            continue
        return line.lstrip("# ").strip() if line.startswith("#") else ""
    return ""


def find_scale(folder: Path, scale: str) -> Path:
    """Return the scale's file, named by its path or by its name in the folder.

    Raises:
        ConfigError: The folder has none of that name.
    """
    if scale.endswith((".yaml", ".yml")):
        return Path(scale)
    names = sorted(file.stem for file in folder.glob("*.yaml"))
    if scale not in names:
        raise ConfigError(
            f"{COMMAND_LINE}: --scale: no scale '{scale}' in {folder}, which has "
            f"{', '.join(names) or 'none'}{suggestion(scale, names)}; expected one of them, or "
            f"the path of a file"
        )
    return folder / f"{scale}.yaml"


@dataclass(frozen=True, slots=True)
class _Layers:
    """What stands below and above the arms."""

    recipes: Mapping[str | None, tuple[Layer, ...]]
    """By file name; none where that could not be read."""
    scaled: tuple[Layer, ...]
    last: tuple[Layer, ...]
    """Of the command line."""

    def below(self, base: str | None) -> tuple[Layer, ...]:
        """Return what arms of a recipe are set on."""
        return (*self.recipes.get(base, ()), *self.scaled)


def _read_layers(
    path: Path,
    bases: Iterable[str | None],
    scale_path: Path | None,
    scale_values: Mapping[str, Any],
    overrides: Sequence[str],
    problems: list[str],
) -> _Layers:
    recipes: dict[str | None, tuple[Layer, ...]] = {None: ()}
    for base in dict.fromkeys(filter(None, bases)):
        with collecting(problems):
            recipes[base] = file_layers(path.parent / base)
    scaled: tuple[Layer, ...] = ()
    if scale_path is not None:
        with collecting(problems):
            scaled = scale_layers(scale_path, scale_values)
    last: tuple[Layer, ...] = ()
    with collecting(problems):
        last = override_layers(overrides)
    return _Layers(recipes, scaled, last)


def _stacks(
    path: Path,
    arms: Mapping[str, Arm],
    layers: _Layers,
    scale_path: Path | None,
    problems: list[str],
) -> dict[str, tuple[Layer, ...]]:
    """Return each arm's layers: recipe < scale < arm < arm at that scale < command line."""
    stacks: dict[str, tuple[Layer, ...]] = {}
    settings = list(layers.last)
    for name, arm in arms.items():
        with collecting(problems):
            own = mapping_layers(f"{path}: arms.{name}", arm.settings, folder=path.parent)
            if arm.at_scale and scale_path is not None:
                source = f"{path}: scales.{scale_path.stem}.{name}"
                own += mapping_layers(source, arm.at_scale, folder=path.parent)
            settings.extend(own)
            stacks[name] = (*layers.below(arm.base), *own, *layers.last)
    problems.extend(
        f"{layer.source}: seed: a sweep runs every arm with its seeds; "
        f"set seeds: in the sweep or --seeds N"
        for layer in settings
        if "seed" in layer.values
    )
    return stacks


def _with_ends(search: Search, built: dict[str, Any], problems: list[str]) -> Search:
    found: dict[str, Recipe] = {}
    for settings in ends(search.spec.space):
        with collecting(problems):
            found[arm_name(settings)] = search.resolve(settings, built=built)
    return dataclasses.replace(search, ends=found)


def _with_id(search: Search, metric: Metric, seed: int) -> Search:
    """Return the search under its id, which holds on every machine as a trial's hash does."""
    recipe = dataclasses.replace(resolve((*search.below, *search.above)), seed=seed)
    space = {key: [item.kind, *item.values] for key, item in search.spec.space.items()}
    base = trial_hash(recipe, fingerprint(recipe.data))
    judged = [metric.name, metric.mode]
    return dataclasses.replace(search, id=digest(base, space, search.spec.seed, judged))


def _scale_notes(arms: Mapping[str, Arm]) -> list[str]:
    """Say which arms are not what the paper's row of that name is."""
    return [
        f"arm {name} is another one at this scale: "
        + ", ".join(f"{key}={value}" for key, value in arm.at_scale.items())
        for name, arm in arms.items()
        if arm.at_scale
    ]


def _arm_unread_notes(
    path: Path,
    arms: Mapping[str, Arm],
    layers: _Layers,
    stacks: Mapping[str, Sequence[Layer]],
    recipes: Mapping[str, Recipe],
    problems: list[str],
) -> list[str]:
    """Say what arms set and nothing reads; an arm of which nothing is read is refused.

    A grid may well set the heads of an attention that one of its other axes leaves out.
    """
    notes: list[str] = []
    for arm, recipe in recipes.items():
        stack = stacks[arm]
        own = stack[len(layers.below(arms[arm].base)) : len(stack) - len(layers.last)]
        found = unread_problems(own, [recipe])
        if len(found) == sum(len(layer.values) for layer in own):
            problems.extend(found)
        else:
            notes.extend(line.removeprefix(f"{path}: ") for line in found)
    return notes


def _metric_problems(
    path: Path, recipes: Mapping[str, Recipe], metric: Metric, paper: Paper | None
) -> list[str]:
    """Name what the sweep is judged by or compared in and an arm's results lack, once each."""
    columns = paper.columns if paper else {}
    names = dict.fromkeys(columns, "paper.columns") | {metric.name: "metric.name"}
    lacking: dict[tuple[str, str], str] = {}
    for arm, recipe in recipes.items():
        for name in names:
            if reason := unmeasured(name, recipe):
                lacking.setdefault((name, reason), arm)
    return [
        f"{path}: {names[name]}: no run of arm {arm} has {name}: {reason}"
        for (name, reason), arm in lacking.items()
    ]


def _merge_notes(
    path: Path, recipes: Mapping[str, Recipe], baseline: str, problems: list[str]
) -> list[str]:
    """Say which arms are the same run; the baseline is named as the one that others equal."""
    groups: dict[str, list[str]] = {}
    for arm in sorted(recipes, key=lambda name: name != baseline):
        with collecting(problems, prefix=f"{path}: arms.{arm}: "):
            groups.setdefault(same_run(recipes[arm]), []).append(arm)
    return [
        f"arms {', '.join(same)} are the same run: trained once, shown as each of them "
        f"(a key=value argument wins over arms)"
        for same in groups.values()
        if len(same) > 1
    ]


def _screen_note(scheduler: Asha, seed: int) -> str:
    return (
        f"asha screens the arms with seed {seed}, from {scheduler.grace:.0%} of a run on: arms "
        f"that it prunes are not run with other seeds and show no values, which would not compare "
        f"with those of full runs; it never prunes the baseline; seed {seed} favours those it kept"
    )


def _search_note(spec: SearchSpec, seed: int) -> str:
    return (
        f"optuna searches {', '.join(spec.space)} by the results of seed {seed}; the best of many "
        f"tries owes some of it to chance: confirm it with other seeds"
    )


def worker_problems(where: str, recipe: Recipe, resources: Resources) -> list[str]:
    """Return what keeps a recipe from being trained by so many workers."""
    problems = []
    if problem := _sharing_problem(recipe, resources):
        problems.append(f"{where}: {problem}")
    least, most = resources.least_workers, resources.most_workers
    if recipe.train.sync_batch_norm and least < most:
        problems.append(
            f"{where}: train.sync_batch_norm: got true for resources.workers = "
            f"[{least}, {most}], whose statistics would change with the number of "
            f"workers; expected one number of workers, or set train.sync_batch_norm=false"
        )
    elif recipe.train.sync_batch_norm and most > 1 and not resources.gpus_per_worker:
        problems.append(
            f"{where}: train.sync_batch_norm: got true for resources.workers = "
            f"{resources.workers} without GPUs, expected resources.gpus_per_worker > 0 or one "
            f"worker; set train.sync_batch_norm=false"
        )
    if recipe.train.precision == "fp16" and not resources.gpus_per_worker:
        problems.append(
            f"{where}: train.precision: got fp16 without GPUs, expected "
            f"resources.gpus_per_worker > 0, or train.precision=fp32"
        )
    return problems


def worker_counts(recipe: Recipe, resources: Resources) -> tuple[int, ...]:
    """Return the numbers of workers that a trial may train with, ascending.

    Of `[least, most]` those that share each batch equally, in whole micro-batches; where none
    does, the least, which the core refuses.
    """
    batch, micro = recipe.train.batch_size, recipe.train.micro_batch or 1
    least, most = resources.least_workers, resources.most_workers
    counts = (count for count in range(least, most + 1) if batch % (count * micro) == 0)
    return tuple(counts) or (least,)


def _sharing_problem(recipe: Recipe, resources: Resources) -> str | None:
    batch, micro = recipe.train.batch_size, recipe.train.micro_batch
    least, most = resources.least_workers, resources.most_workers
    for workers in (least, most):
        if batch % workers:
            return (
                f"train.batch_size: {batch} images cannot be shared equally "
                f"by resources.workers = {workers}"
            )
        if micro and (batch // workers) % micro:
            return (
                f"train.micro_batch: {micro} does not divide the "
                f"{batch // workers} images of each worker"
            )
    if least < most and micro is None:
        # Losses are means over a micro-batch, so its size is part of what is trained.
        return (
            f"train.micro_batch: unset, expected the images of a pass, which stay the same for "
            f"every number of resources.workers = [{least}, {most}]; "
            f"set train.micro_batch={math.gcd(batch // least, batch // most)}"
        )
    return None
