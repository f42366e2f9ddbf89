"""A sweep file in, frozen trials out: every arm with every seed, fully resolved and checked.

A trial is known by the hash of everything that can change its result (`identity`). So the same run
in two sweeps is one trial, and a finished trial is never run again. Loads no torch, Ray or MLflow;
writes nothing.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from knet_core import ConfigError, DataConfig, Recipe, data_fingerprint
from knet_platform.config import (
    COMMAND_LINE,
    Layer,
    collecting,
    file_layers,
    mapping_layers,
    override_layers,
    read_yaml,
    resolve,
    scale_layers,
    suggestion,
)
from knet_platform.errors import PlatformError
from knet_platform.identity import same_run, trial_hash
from knet_platform.metrics import METRICS, find_metric

# Names become MLflow runs and folders of the report.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=,+-]{0,119}")
_KEYS = (
    "name",
    "base",
    "metric",
    "seeds",
    "baseline",
    "arms",
    "grid",
    "scales",
    "paper",
    "resources",
    "scheduler",
    "budget",
)
_LATER = ("search",)
_SCALE_KEYS = ("recipe", "seeds", "resources")


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """What the sweep is judged by."""

    name: str
    mode: Literal["min", "max"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Paper:
    """The published numbers of the same arms."""

    source: str
    columns: dict[str, str]
    """Metric name to column title, in the order of the rows."""
    rows: dict[str, tuple[float | None, ...]]
    """Arm to values as printed in the paper; None where it gives none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What one trial takes, and how many may run at once."""

    workers: int = 1
    gpus_per_worker: float = 0
    cpus_per_worker: float = 1
    max_concurrent: int | None = None
    """Unset: as many as the cluster holds."""
    hang_minutes: float = 15
    """Without a step, after which a trial is ended and tried once more; its first step may take
    four times that. 0 waits for ever."""
    instance: str | None = None
    """What it runs on, as `cluster/prices.yaml` calls it."""
    spot: bool = False
    """Priced as spot instances."""
    price_per_gpu_hour: float | None = None
    """USD; wins over the instance's list price."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What all trials of the sweep together may cost, over all its runs."""

    usd: float | None = None
    gpu_hours: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Arm:
    """What a sweep file says of one arm."""

    base: str | None
    """Its recipe: its own `base:`, else the sweep's. None where that is no file name."""
    stated: dict[str, Any]
    """All that stands under its name."""
    at_scale: dict[str, Any]
    """What `scales:` sets instead at the scale in use."""

    @property
    def settings(self) -> dict[str, Any]:
        """Return what it sets on its recipe."""
        return {key: value for key, value in self.stated.items() if key != "base"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One arm with one seed."""

    sweep: str
    arm: str
    seed: int
    overrides: dict[str, Any]
    """What the arm sets, as dotted keys, and as `base` the recipe that it names."""
    recipe: Recipe
    hash: str
    """16 hex digits."""

    @property
    def name(self) -> str:
        """Return `arm/seed`, the name of the MLflow run."""
        return f"{self.arm}/{self.seed}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """A sweep file, checked and expanded."""

    name: str
    path: Path
    title: str
    """First comment line of the file."""
    metric: Metric
    baseline: str
    seeds: tuple[int, ...]
    arms: tuple[str, ...]
    paper: Paper | None
    resources: Resources
    budget: Budget
    trials: tuple[Trial, ...]
    """Seed by seed, so that an interrupted sweep has compared every arm at least once early."""
    notes: tuple[str, ...] = ()
    """What a reader of the plan or of the table should know."""

    @property
    def distinct_trials(self) -> tuple[Trial, ...]:
        """Return the trials to train: of equal ones the baseline's, else the first."""
        chosen: dict[str, Trial] = {}
        for trial in self.trials:
            if trial.hash not in chosen or trial.arm == self.baseline:
                chosen[trial.hash] = trial
        return tuple(chosen.values())

    @property
    def by_priority(self) -> tuple[Trial, ...]:
        """Return the trials to train, most important first: seed by seed, the baseline first.

        Every other arm is compared with the baseline of its seed.
        """
        arms = {arm: (arm != self.baseline, index) for index, arm in enumerate(self.arms)}
        seeds = {seed: index for index, seed in enumerate(self.seeds)}
        return tuple(sorted(self.distinct_trials, key=lambda t: (seeds[t.seed], arms[t.arm])))


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
    problems: list[str] = []
    scale_path, scale_values = None, dict[str, Any]()
    if scale is not None:
        with collecting(problems):
            scale_path = _find_scale(path, scale)
            scale_values = read_yaml(scale_path)
    listed = scale_values.get("seeds", values.get("seeds", [0]))
    count = _num_arms(values) * (seeds if seeds is not None else len(listed or [0]))
    if most_trials is not None and count > most_trials:
        values = _sample(values)
    reader = _Reader(path, values, problems=problems)
    name = reader.name()
    arms = reader.arms(scale_path.stem if scale_path else None)
    baseline = reader.baseline(arms)
    metric = reader.metric()
    paper = reader.paper(arms)
    reader.unimplemented()
    resources = reader.resources("resources", values.get("resources"), Resources())
    budget = reader.budget()
    chosen = reader.seeds("seeds", values.get("seeds", [0]))
    if scale_path is not None:
        reader = _Reader(scale_path, scale_values, known=_SCALE_KEYS, problems=problems)
        resources = reader.resources("resources", scale_values.get("resources"), resources)
        if "seeds" in scale_values:
            chosen = reader.seeds("seeds", scale_values["seeds"])
    if seeds is not None:
        if seeds < 1:
            problems.append(f"{COMMAND_LINE}: --seeds: expected at least 1, got {seeds}")
        chosen = tuple(range(seeds))

    layers = _layers(path, arms, scale_path, scale_values, overrides, problems)
    if problems:
        raise ConfigError(problems)
    recipes: dict[str, Recipe] = {}
    sections: dict[str, Any] = {}
    for arm, stack in layers.items():
        with collecting(problems):
            recipes[arm] = resolve(stack, built=sections)
    notes: list[str] = []
    if not problems:
        notes = _merge_notes(path, recipes, baseline, problems)
        problems.extend(_worker_problems(recipes, resources, path))
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))

    fingerprints: dict[DataConfig, str] = {}
    trials = []
    for seed, (arm, recipe) in itertools.product(chosen, recipes.items()):
        if recipe.data not in fingerprints:
            fingerprints[recipe.data] = data_fingerprint(recipe.data)
        seeded = dataclasses.replace(recipe, seed=seed)
        trials.append(
            Trial(
                sweep=name,
                arm=arm,
                seed=seed,
                overrides=arms[arm].stated | arms[arm].at_scale,
                recipe=seeded,
                hash=trial_hash(seeded, fingerprints[recipe.data]),
            )
        )
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
        trials=tuple(trials),
        notes=tuple(notes),
    )
    if most_trials is not None and count > most_trials:
        raise LargeSweepError(count, sweep)
    return sweep


def _num_arms(values: Mapping[str, Any]) -> int:
    arms, grid = values.get("arms") or {}, values.get("grid") or {}
    axes = [axis for axis in grid.values() if isinstance(axis, list)]
    return len(arms) + (math.prod(map(len, axes)) if axes else 0)


def _sample(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a sweep of the same kind with one arm of each listed one and of the grid."""
    cut = {key: axis[:1] for key, axis in (values.get("grid") or {}).items()}
    arm = ",".join(f"{key}={_shown(value)}" for key, (value,) in cut.items())
    arms = dict(itertools.islice((values.get("arms") or {}).items(), 1))
    changes: dict[str, Any] = {"arms": arms, "grid": cut, "baseline": arm or next(iter(arms))}
    kept = {key: value for key, value in values.items() if key not in ("paper", "scales")}
    return kept | {key: value for key, value in changes.items() if value}


def _title(path: Path) -> str:
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#!"):
            continue
        return line.lstrip("# ").strip() if line.startswith("#") else ""
    return ""


def _find_scale(sweep: Path, scale: str) -> Path:
    if scale.endswith((".yaml", ".yml")):
        return Path(scale)
    folder = sweep.parent / "scales"
    names = sorted(file.stem for file in folder.glob("*.yaml"))
    if scale not in names:
        raise ConfigError(
            f"{COMMAND_LINE}: --scale: no scale '{scale}' in {folder}, which has "
            f"{', '.join(names) or 'none'}{suggestion(scale, names)}"
        )
    return folder / f"{scale}.yaml"


def _layers(
    path: Path,
    arms: Mapping[str, _Arm],
    scale_path: Path | None,
    scale_values: Mapping[str, Any],
    overrides: Sequence[str],
    problems: list[str],
) -> dict[str, tuple[Layer, ...]]:
    """Return each arm's layers: recipe < scale < arm < arm at that scale < command line."""
    recipes: dict[str | None, tuple[Layer, ...]] = {None: ()}
    for base in dict.fromkeys(arm.base for arm in arms.values() if arm.base):
        with collecting(problems):
            recipes[base] = file_layers(path.parent / base)
    scaled: tuple[Layer, ...] = ()
    if scale_path is not None:
        with collecting(problems):
            scaled = scale_layers(scale_path, scale_values)
    last: tuple[Layer, ...] = ()
    with collecting(problems):
        last = override_layers(overrides)
    stacks: dict[str, tuple[Layer, ...]] = {}
    settings = list(last)
    for name, arm in arms.items():
        with collecting(problems):
            own = mapping_layers(f"{path}: arms.{name}", arm.settings, folder=path.parent)
            if arm.at_scale and scale_path is not None:
                source = f"{path}: scales.{scale_path.stem}.{name}"
                own += mapping_layers(source, arm.at_scale, folder=path.parent)
            settings.extend(own)
            stacks[name] = (*recipes.get(arm.base, ()), *scaled, *own, *last)
    for layer in settings:
        if "seed" in layer.values:
            problems.append(
                f"{layer.source}: seed: a sweep runs every arm with its seeds; "
                f"set seeds: in the sweep or --seeds N"
            )
    return stacks


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


def _worker_problems(recipes: Mapping[str, Recipe], resources: Resources, path: Path) -> list[str]:
    problems = []
    for arm, recipe in recipes.items():
        batch, micro = recipe.train.batch_size, recipe.train.micro_batch
        if batch % resources.workers:
            problems.append(
                f"{path}: arms.{arm}: train.batch_size: {batch} images cannot be shared equally "
                f"by resources.workers = {resources.workers}"
            )
        elif micro and (batch // resources.workers) % micro:
            problems.append(
                f"{path}: arms.{arm}: train.micro_batch: {micro} does not divide the "
                f"{batch // resources.workers} images of each worker"
            )
        if (
            recipe.train.sync_batch_norm
            and resources.workers > 1
            and not resources.gpus_per_worker
        ):
            problems.append(
                f"{path}: arms.{arm}: train.sync_batch_norm: got true for resources.workers = "
                f"{resources.workers} without GPUs, expected resources.gpus_per_worker > 0 or one "
                f"worker; set train.sync_batch_norm=false"
            )
    return problems


class _Reader:
    """Checks the parts of one sweep or scale file and gathers what is wrong with them."""

    def __init__(
        self,
        path: Path,
        values: Mapping[str, Any],
        *,
        known: Sequence[str] = _KEYS,
        problems: list[str] | None = None,
    ) -> None:
        self._path = path
        self._values = values
        self.problems = [] if problems is None else problems
        later = _LATER if known is _KEYS else ()
        self._unknown(values, (*known, *later), "")

    def unimplemented(self) -> None:
        """Refuse what the format reserves and this version does not do yet."""
        for key in _LATER:
            if key in self._values:
                self._wrong(key, "is part of the format but not implemented yet; remove it")
        scheduler = self._values.get("scheduler", "fifo")
        name = scheduler.get("name") if isinstance(scheduler, dict) else scheduler
        if name == "asha":
            self._wrong("scheduler", "asha is not implemented yet; use fifo or remove the key")
        elif scheduler not in ("fifo", {"name": "fifo"}):
            self._wrong("scheduler", f"expected fifo, got {scheduler!r}")

    def name(self) -> str:
        """Return the sweep's name."""
        name = self._values.get("name")
        if not isinstance(name, str):
            self._wrong("name", f"expected the sweep's name, got {name!r}")
            return ""
        self._check_name("name", name)
        return name

    def metric(self) -> Metric:
        """Return the metric the sweep is judged by."""
        values = self._mapping("metric", required=True)
        self._unknown(values, ("name", "mode"), "metric.")
        name, mode = values.get("name"), values.get("mode")
        info = self._metric_info("metric.name", name) if values else None
        right = None if info is None else "max" if info.higher_is_better else "min"
        if values and mode not in ("min", "max"):
            self._wrong("metric.mode", f"expected min or max, got {mode!r}")
        elif right is not None and mode != right:
            self._wrong("metric.mode", f"got {mode}, expected {right}, which is better for {name}")
        return Metric(name=str(name), mode=cast(Literal["min", "max"], mode))

    def seeds(self, key: str, values: Any) -> tuple[int, ...]:
        """Return a list of distinct seeds."""
        if not isinstance(values, list) or not values:
            self._wrong(key, f"expected a list with at least one seed, got {values!r}")
            return ()
        wrong = [seed for seed in values if type(seed) is not int or seed < 0]
        if wrong:
            self._wrong(key, f"expected integers >= 0, got {wrong[0]!r}")
            return ()
        twice = sorted({seed for seed in values if values.count(seed) > 1})
        if twice:
            self._wrong(key, f"seed {twice[0]} is listed twice")
        return tuple(values)

    def arms(self, scale: str | None) -> dict[str, _Arm]:
        """Return every arm, with what it sets at the scale of that name."""
        settings = self._settings()
        at_scale = self._at_scale(scale, settings)
        default = self._base("base", self._values)
        return {
            name: _Arm(
                base=self._base(f"arms.{name}.base", values) if "base" in values else default,
                stated=values,
                at_scale=at_scale.get(name, {}),
            )
            for name, values in settings.items()
        }

    def _base(self, key: str, values: Mapping[str, Any]) -> str | None:
        base = values.get("base")
        if isinstance(base, str):
            return base
        self._wrong(key, f"expected a recipe file beside the sweep, got {base!r}")
        return None

    def _at_scale(self, scale: str | None, arms: Collection[str]) -> dict[str, dict[str, Any]]:
        chosen: dict[str, dict[str, Any]] = {}
        for name, changes in self._mapping("scales").items():
            if not isinstance(changes, dict):
                self._wrong(f"scales.{name}", f"expected {{arm: {{key: value}}}}, got {changes!r}")
                continue
            for arm, settings in changes.items():
                key = f"scales.{name}.{arm}"
                if arm not in arms:
                    self._wrong(key, f"is not an arm{suggestion(arm, arms)}")
                elif not isinstance(settings, dict):
                    self._wrong(key, f"expected {{key: value}}, got {settings!r}")
                elif name == scale:
                    chosen[arm] = settings
        return chosen

    def _settings(self) -> dict[str, dict[str, Any]]:
        """Return what every arm sets: those of `arms:`, then every combination of `grid:`."""
        arms = dict(self._mapping("arms", required="grid" not in self._values))
        for name, settings in arms.items():
            if settings is not None and not isinstance(settings, dict):
                self._wrong(f"arms.{name}", f"expected {{key: value}}, got {settings!r}")
                settings = None
            arms[name] = settings or {}
        grid = self._mapping("grid")
        axes = {key: axis for key, axis in grid.items() if isinstance(axis, list) and axis}
        for key in grid.keys() - axes.keys():
            self._wrong(f"grid.{key}", f"expected a list of values, got {grid[key]!r}")
        for combination in itertools.product(*axes.values()) if axes else ():
            settings = dict(zip(axes, combination, strict=True))
            name = ",".join(f"{key}={_shown(value)}" for key, value in settings.items())
            if name in arms:
                self._wrong("grid", f"gives arm '{name}' twice")
            arms[name] = settings
        for name in arms:
            self._check_name("arms", name)
        return arms

    def baseline(self, arms: Mapping[str, Any]) -> str:
        """Return the arm that the others are compared with."""
        value = self._values.get("baseline")
        name = "" if value is None else _shown(value)
        if arms and name not in arms:
            self._wrong(
                "baseline",
                f"'{name}' is not an arm; arms are {', '.join(arms)}{suggestion(name, arms)}",
            )
        return name

    def paper(self, arms: Mapping[str, Any]) -> Paper | None:
        """Return the published numbers, if the sweep states any."""
        if self._values.get("paper") is None:
            return None
        values = self._mapping("paper", required=True)
        if not values:
            return None
        self._unknown(values, ("source", "columns", "rows"), "paper.")
        columns, rows = values.get("columns"), values.get("rows")
        if not isinstance(columns, dict) or not columns:
            self._wrong("paper.columns", f"expected {{metric: title}}, got {columns!r}")
            columns = {}
        if not isinstance(rows, dict):
            self._wrong("paper.rows", f"expected {{arm: [numbers]}}, got {rows!r}")
            rows = {}
        for metric in columns:
            self._metric_info("paper.columns", metric)
        for arm, row in rows.items():
            if arm not in arms:
                self._wrong(f"paper.rows.{arm}", f"is not an arm{suggestion(arm, arms)}")
            if not isinstance(row, list) or len(row) != len(columns):
                self._wrong(
                    f"paper.rows.{arm}",
                    f"expected {len(columns)} values, one per column, got {row!r}",
                )
                rows = rows | {arm: []}
            elif wrong := [item for item in row if not (item is None or _is_number(item))]:
                self._wrong(f"paper.rows.{arm}", f"expected numbers or null, got {wrong[0]!r}")
        return Paper(
            source=str(values.get("source", "")),
            columns={metric: str(title) for metric, title in columns.items()},
            rows={arm: tuple(row) for arm, row in rows.items()},
        )

    def resources(self, key: str, values: Any, default: Resources) -> Resources:
        """Return `default` with what the file sets."""
        if values is None:
            return default
        if not isinstance(values, dict):
            self._wrong(key, f"expected {{workers: 2, ...}}, got {values!r}")
            return default
        names = [item.name for item in dataclasses.fields(Resources)]
        self._unknown(values, names, f"{key}.")
        good: dict[str, Any] = {}
        for name, value in values.items():
            if name in names and (problem := _resource_problem(name, value)):
                self._wrong(f"{key}.{name}", problem)
            elif name in names:
                good[name] = value
        return dataclasses.replace(default, **good)

    def budget(self) -> Budget:
        """Return what the sweep may cost."""
        values = self._mapping("budget")
        names = [item.name for item in dataclasses.fields(Budget)]
        self._unknown(values, names, "budget.")
        good = {name: value for name, value in values.items() if name in names}
        for name, value in list(good.items()):
            if not _is_number(value) or value < 0:
                self._wrong(f"budget.{name}", f"expected a number >= 0, got {good.pop(name)!r}")
        return Budget(**good)

    def _wrong(self, key: str, problem: str) -> None:
        self.problems.append(f"{self._path}: {key}: {problem}")

    def _mapping(self, key: str, *, required: bool = False) -> dict[str, Any]:
        value = self._values.get(key)
        if value is None and not required:
            return {}
        if not isinstance(value, dict) or not value:
            self._wrong(key, f"expected keys below it, got {value!r}")
            return {}
        return value

    def _unknown(self, values: Mapping[str, Any], known: Sequence[str], prefix: str) -> None:
        for key in values:
            if key not in known:
                near = suggestion(key, known) or f"; expected {', '.join(known)}"
                self._wrong(f"{prefix}{key}", f"unknown key{near}")

    def _check_name(self, key: str, name: str) -> None:
        if not _NAME.fullmatch(name):
            self._wrong(
                key,
                f"'{name}' cannot name a run and a folder; use letters, digits and . _ = , + - "
                f"(not first), at most 120",
            )

    def _metric_info(self, key: str, name: Any) -> Any:
        info = find_metric(name) if isinstance(name, str) else None
        if info is None:
            self._wrong(key, f"unknown metric {name!r}{suggestion(str(name), METRICS)}")
        return info


def _resource_problem(name: str, value: Any) -> str | None:
    if value is None and name in ("max_concurrent", "instance", "price_per_gpu_hour"):
        return None
    if name == "instance":
        return None if isinstance(value, str) else f"expected an instance's name, got {value!r}"
    if name == "spot":
        return None if isinstance(value, bool) else f"expected true or false, got {value!r}"
    if name in ("workers", "max_concurrent"):
        right = type(value) is int and value >= 1
        return None if right else f"expected an integer >= 1, got {value!r}"
    return None if _is_number(value) and value >= 0 else f"expected a number >= 0, got {value!r}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
