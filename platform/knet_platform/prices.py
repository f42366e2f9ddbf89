"""What one trial costs an hour: from `cluster/prices.yaml`, or as the sweep states it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources as package_files
from pathlib import Path
from typing import Any

from knet_core import ConfigError
from knet_platform.config import read_yaml, suggestion
from knet_platform.sweep_file import Resources

_NUMBERS = ("gpus", "gpu_memory_gb", "cpus", "on_demand")


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One row of the table."""

    gpu: str
    """Name of its GPUs, such as A100."""
    gpus: float
    gpu_memory_gb: float
    """Of one GPU."""
    cpus: float
    on_demand: float
    """USD an hour."""
    spot: float | None = None
    """USD an hour; None where it is not known."""
    date: str
    """When the prices were published."""
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceList:
    """Instances by name."""

    path: Path
    default: str
    """Priced where a sweep names none."""
    instances: dict[str, Instance]


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What a trial of a sweep costs, and what that is the price of."""

    usd_per_hour: float
    """Of one trial: all its workers (of an elastic one the least), each with its share of an
    instance."""
    trials_per_instance: float
    """Below 1 for a trial that needs several instances."""
    gpu: str
    gpu_memory_gb: float
    basis: str
    """For people: instance, purchase, date."""
    assumed: bool
    """The sweep names no instance and no price."""


def read_prices(path: Path | None = None) -> PriceList:
    """Return the prices of a file; unset: those that come with the project.

    Raises:
        ConfigError: Everything that is wrong with the file.
    """
    if path is None:
        path = Path(str(package_files.files("knet_platform") / "prices.yaml"))
    values = read_yaml(path)
    rows, default = values.get("instances"), values.get("default")
    if not isinstance(rows, dict) or not rows:
        raise ConfigError(f"{path}: instances: expected {{name: {{gpu: ..., ...}}}}, got {rows!r}")
    known = ("default", "instances")
    problems = [
        f"{path}: {key}: unknown key{suggestion(key, known)}" for key in values if key not in known
    ]
    instances = {name: _instance(f"{path}: {name}", row, problems) for name, row in rows.items()}
    if default not in rows:
        problems.append(f"{path}: default: expected one of the instances, got {default!r}")
    if problems:
        raise ConfigError(problems)
    return PriceList(path=path, default=str(default), instances=instances)


def price_of(resources: Resources, prices: PriceList) -> Price:
    """Return what a trial with these resources costs.

    Raises:
        ConfigError: The instance is not in the list, or not at that purchase.
    """
    name = resources.instance or prices.default
    if name not in prices.instances:
        near = suggestion(name, prices.instances) or f"; it has {', '.join(prices.instances)}"
        raise ConfigError(f"resources.instance: '{name}' is not in {prices.path}{near}")
    instance = prices.instances[name]
    hourly = instance.spot if resources.spot else instance.on_demand
    if hourly is None:
        raise ConfigError(
            f"resources.spot: {prices.path} has no spot price of {name}; add it, or leave out spot"
        )
    if resources.gpus_per_worker and not instance.gpus:
        raise ConfigError(
            f"resources.instance: {name} has no GPUs in {prices.path}, and "
            f"resources.gpus_per_worker is {resources.gpus_per_worker:g}; choose one that has"
        )
    share = (
        resources.gpus_per_worker / instance.gpus
        if resources.gpus_per_worker
        else resources.cpus_per_worker / instance.cpus
    )
    purchase = "spot" if resources.spot else "on demand"
    basis = f"{name} {purchase}, list price of {instance.date}"
    usd = share * hourly * resources.least_workers
    stated = resources.price_per_gpu_hour if resources.gpus_per_worker else None
    if stated is not None:
        usd = resources.least_workers * resources.gpus_per_worker * stated
        basis = f"{stated:g} USD per GPU hour as stated"
    return Price(
        usd_per_hour=usd,
        trials_per_instance=1 / (share * resources.least_workers),
        gpu=instance.gpu,
        gpu_memory_gb=instance.gpu_memory_gb,
        basis=basis,
        assumed=resources.instance is None and stated is None,
    )


def _instance(where: str, row: Any, problems: list[str]) -> Instance:
    values: Mapping[str, Any] = row if isinstance(row, dict) else {}
    known = [item.name for item in dataclasses.fields(Instance)]
    problems.extend(
        f"{where}: {key}: unknown key{suggestion(key, known)}" for key in values.keys() - known
    )
    for key in (*_NUMBERS, "spot"):
        value: Any = values.get(key)
        if key == "spot" and value is None:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (number and value >= 0) or (key == "cpus" and value == 0):
            least = "> 0" if key == "cpus" else ">= 0"
            problems.append(f"{where}: {key}: expected a number {least}, got {value!r}")
    numbers: dict[str, Any] = {key: values.get(key) for key in (*_NUMBERS, "spot")}
    texts: dict[str, Any] = {key: str(values.get(key, "")) for key in ("gpu", "date", "source")}
    return Instance(**texts, **numbers)
