"""What a sweep file says, checked key by key; nothing is resolved yet.

Problems are gathered, so that all of a file are reported at once.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from knet_platform.config import suggestion
from knet_platform.metrics import METRICS, find_metric
from knet_platform.search import (
    SPEC_KEYS,
    Dimension,
    SearchSpec,
    arm_name,
    dimension_problem,
    ends,
    read_dimension,
    shown,
)

# Names become MLflow runs and folders of the report.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=,+-]{0,119}")
_LISTED = 8
"""Arms that an error names."""
KEYS = (
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
    "search",
    "budget",
)


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

    workers: int | tuple[int, int] = 1
    """Processes that share each batch; two numbers: at least and at most so many, as the cluster
    has room (elastic)."""
    gpus_per_worker: float = 0
    cpus_per_worker: float = 1
    max_concurrent: int | None = None
    """Unset: as many as the cluster holds."""
    hang_minutes: float = 15
    """Without a step, after which a trial is ended and tried once more; its first step may take
    four times that. 0 waits for ever."""
    keep_best: int = 1
    """Checkpoints of the best evaluations that are kept beside the newest two."""
    instance: str | None = None
    """What it runs on, as `cluster/prices.yaml` calls it."""
    spot: bool = False
    """Priced as spot instances."""
    price_per_gpu_hour: float | None = None
    """USD; wins over the instance's list price."""

    @property
    def least_workers(self) -> int:
        """Return what a trial cannot start without."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        """Return what a trial takes where there is room."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What all trials of the sweep together may cost, over all its runs."""

    usd: float | None = None
    gpu_hours: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asha:
    """Asynchronous successive halving (Li et al., arXiv:1810.05934), as a screen of the arms."""

    grace: float = 1 / 9
    """Share of a run before which nothing is stopped."""
    reduction_factor: float = 3
    """About one in so many trials passes a milestone; each lies so many times later in the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pbt:
    """Population based training (Jaderberg et al., arXiv:1711.09846) of the learning rate."""

    evaluations: int = 1
    """Of each member from one round to the next."""
    quantile: float = 0.25
    """Share of the members that is replaced after a round by copies of as many best ones."""
    factor: float = 1.25
    """A copy's learning rate is multiplied or divided by it."""
    seed: int = 0
    """Of which best one is copied, and whether its rate grows or shrinks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
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


class SweepReader:
    """Checks the parts of one sweep or scale file and gathers what is wrong with them."""

    def __init__(
        self,
        path: Path,
        values: Mapping[str, Any],
        *,
        known: Sequence[str] = KEYS,
        problems: list[str] | None = None,
    ) -> None:
        self._path = path
        self._values = values
        self.problems = [] if problems is None else problems
        self._unknown(values, known, "")

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

    def arms(self, scale: str | None) -> dict[str, Arm]:
        """Return every arm, with what it sets at the scale of that name."""
        settings = self._settings()
        at_scale = self._at_scale(scale, settings)
        default = self._base("base", self._values)
        return {
            name: Arm(
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
        known = sorted(file.stem for file in (self._path.parent / "scales").glob("*.yaml"))
        for name, changes in self._mapping("scales").items():
            # Scales may lie elsewhere, too; a name like one of those beside the sweep is a slip.
            if name != scale and name not in known and (near := suggestion(name, known)):
                self._wrong(f"scales.{name}", f"no such scale{near}")
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
            name = arm_name(settings)
            if name in arms:
                self._wrong("grid", f"gives arm '{name}' twice")
            arms[name] = settings
        for name in arms:
            self._check_name("arms", name)
        return arms

    def baseline(self, arms: Mapping[str, Any]) -> str:
        """Return the arm that the others are compared with."""
        value = self._values.get("baseline")
        name = "" if value is None else shown(value)
        if arms and name not in arms:
            self._wrong(
                "baseline",
                f"'{name}' is not an arm; arms are {_first(arms)}{suggestion(name, arms)}",
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
                good[name] = tuple(value) if isinstance(value, list) else value
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

    def scheduler(self) -> Asha | None:
        """Return the screen of the arms; None where all run in full, which is the default."""
        given = self._values.get("scheduler", "fifo")
        values = given if isinstance(given, dict) else {"name": given}
        name = values.get("name")
        if name == "pbt":
            return None  # see `population`
        if name not in ("fifo", "asha"):
            self._wrong("scheduler", f"expected fifo, asha or pbt, got {name!r}")
        if name != "asha":
            self._unknown(values, ("name",), "scheduler.")
            return None
        names = [item.name for item in dataclasses.fields(Asha)]
        self._unknown(values, ("name", *names), "scheduler.")
        good = {key: value for key, value in values.items() if key in names}
        grace, factor = good.get("grace", 0.5), good.get("reduction_factor", 2)
        if not _is_number(grace) or not 0 < grace < 1:
            self._wrong("scheduler.grace", f"expected a share of the run, 0 to 1, got {grace!r}")
            del good["grace"]
        if not _is_number(factor) or factor <= 1:
            self._wrong("scheduler.reduction_factor", f"expected a number > 1, got {factor!r}")
            del good["reduction_factor"]
        return Asha(**good)

    def population(self) -> Pbt | None:
        """Return how the arms train as a population; None where each trains by itself."""
        given = self._values.get("scheduler")
        values = given if isinstance(given, dict) else {"name": given}
        if values.get("name") != "pbt":
            return None
        rules: dict[str, tuple[Callable[[Any], bool], str]] = {
            "evaluations": (lambda x: type(x) is int and x >= 1, "an integer >= 1"),
            "quantile": (lambda x: _is_number(x) and 0 < x <= 0.5, "a share > 0, at most 0.5"),
            "factor": (lambda x: _is_number(x) and x > 1, "a number > 1"),
            "seed": (lambda x: type(x) is int and x >= 0, "an integer >= 0"),
        }
        self._unknown(values, ("name", *rules), "scheduler.")
        good: dict[str, Any] = {}
        for key in values.keys() & rules.keys():
            is_right, expected = rules[key]
            if is_right(values[key]):
                good[key] = values[key]
            else:
                self._wrong(f"scheduler.{key}", f"expected {expected}, got {values[key]!r}")
        return Pbt(**good)

    def search(self) -> SearchSpec | None:
        """Return the open-ended search; None without one."""
        if self._values.get("search") is None:
            return None
        values = self._mapping("search", required=True)
        self._unknown(values, SPEC_KEYS, "search.")
        if values.get("name") != "optuna":
            self._wrong("search.name", f"expected optuna, got {values.get('name')!r}")
        trials, seed = values.get("trials"), values.get("seed", 0)
        for key, value, least in (("trials", trials, 1), ("seed", seed, 0)):
            if type(value) is not int or value < least:
                self._wrong(f"search.{key}", f"expected an integer >= {least}, got {value!r}")
        return SearchSpec(
            trials=cast(int, trials), seed=cast(int, seed), space=self._space(values.get("space"))
        )

    def _space(self, stated: Any) -> dict[str, Dimension]:
        if not isinstance(stated, dict) or not stated:
            self._wrong(
                "search.space", f"expected {{key: {{uniform: [low, high]}}}}, got {stated!r}"
            )
            return {}
        space: dict[str, Dimension] = {}
        for key, values in stated.items():
            if problem := dimension_problem(values):
                self._wrong(f"search.space.{key}", problem)
            else:
                space[key] = read_dimension(values)
        before = len(self.problems)
        for settings in ends(space):
            self._check_name("search.space", arm_name(settings))
        if len(self.problems) == before:
            longest = {key: dimension.longest for key, dimension in space.items()}
            self._check_name("search.space", arm_name(longest))
        return space

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


def _first(names: Collection[str]) -> str:
    """List names on one line, a grid's hundreds in part."""
    listed = ", ".join(itertools.islice(names, _LISTED))
    return f"{listed} and {len(names) - _LISTED} more" if len(names) > _LISTED else listed


def _resource_problem(name: str, value: Any) -> str | None:
    if value is None and name in ("max_concurrent", "instance", "price_per_gpu_hour"):
        return None
    if name == "instance":
        return None if isinstance(value, str) else f"expected an instance's name, got {value!r}"
    if name == "spot":
        return None if isinstance(value, bool) else f"expected true or false, got {value!r}"
    if name == "workers" and isinstance(value, list):
        right = [type(item) for item in value] == [int, int] and 1 <= value[0] < value[1]
        return None if right else f"expected [least, most] with 1 <= least < most, got {value!r}"
    if name in ("workers", "max_concurrent"):
        right = type(value) is int and value >= 1
        return None if right else f"expected an integer >= 1, got {value!r}"
    if name == "keep_best":
        right = type(value) is int and value >= 0
        return None if right else f"expected an integer >= 0, got {value!r}"
    return None if _is_number(value) and value >= 0 else f"expected a number >= 0, got {value!r}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
