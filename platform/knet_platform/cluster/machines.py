"""The machines that clouds offer (`cluster/machines.yaml`), and those that a description means."""

from dataclasses import dataclass
from importlib import resources as package_files
from pathlib import Path
from typing import Any

from knet_core import ConfigError
from knet_platform.cluster.connection import GROWS_TO
from knet_platform.cluster.description import HOME, SECRETS, Description
from knet_platform.config import read_yaml, suggestion
from knet_platform.prices import Instance, PriceList, read_prices


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """A limit that a cloud sets each account; in new accounts it is often 0."""

    unit: str
    """What is counted: vCPU or GPU."""
    on_demand: str
    """The cloud's name of the limit."""
    spot: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadMachine:
    """What the head runs on."""

    machine: str
    cpus: int
    memory_gb: int
    usd_per_hour: float
    system_image: str | None = None
    """What all machines of the cloud boot; None where every region has its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A GPU machine."""

    name: str
    cloud: str
    gpu: str
    gpus: int
    cpus: int
    memory_gb: int
    local_ssds: int
    """Disks that must be asked for beside it; other machines bring theirs."""
    regions: tuple[str, ...]
    quota: Quota
    price: Instance


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Machines of one kind and one purchase."""

    name: str
    spot: bool
    priority: int
    """The autoscaler takes the group with the highest first."""
    usd_per_hour: float | None
    """Of one machine; None where it is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A description with everything that follows from it."""

    description: Description
    machine: Machine
    head: HeadMachine
    region: str
    groups: tuple[Group, ...]

    def environment(self) -> dict[str, str]:
        """Return what every container is told; nothing of it is secret."""
        description = self.description
        most = description.max_workers
        settings = {
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "KNET_HOME": HOME,
            "KNET_STORAGE": description.storage.rstrip("/"),
            GROWS_TO: f"CPU={self.machine.cpus * most},GPU={self.machine.gpus * most}",
            "XDG_CACHE_HOME": f"{HOME}/cache",
        }
        if description.tracking_uri:
            settings["MLFLOW_TRACKING_URI"] = description.tracking_uri
        if self.machine.cloud == "aws":
            return settings | {"AWS_DEFAULT_REGION": self.region}
        # Google's buckets by their S3 interface, which does not take the checksums boto3 adds.
        return settings | {
            "AWS_ENDPOINT_URL": "https://storage.googleapis.com",
            "AWS_SHARED_CREDENTIALS_FILE": f"{SECRETS}/s3_credentials",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        }

    @property
    def usd_per_hour(self) -> float:
        """Return what all of it costs at most."""
        dearest = max(group.usd_per_hour or 0.0 for group in self.groups)
        return self.head.usd_per_hour + dearest * self.description.max_workers

    @property
    def quota_needed(self) -> tuple[str, int, str]:
        """Return name, amount and unit of the limit that all machines at once need."""
        quota = self.machine.quota
        each = self.machine.cpus if quota.unit == "vCPU" else self.machine.gpus
        name = quota.spot if self.description.spot else quota.on_demand
        return name, each * self.description.max_workers, quota.unit


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineTable:
    """The table, joined with the prices."""

    path: Path
    machines: tuple[Machine, ...]
    heads: dict[str, HeadMachine]
    """By cloud."""


_CLOUD_KEYS = ("date", "source", "head", "regions", "quotas")
_MACHINE_KEYS = ("cloud", "quota", "memory_gb", "local_ssds", "regions")


def read_machines(path: Path | None = None, prices: PriceList | None = None) -> MachineTable:
    """Return the machines of a file; unset: those that come with the project.

    Raises:
        ConfigError: The file is not such a table, or prices.yaml lacks a machine.
    """
    if path is None:
        path = Path(str(package_files.files("knet_platform") / "machines.yaml"))
    instances = (prices or read_prices()).instances
    values = read_yaml(path)
    try:
        clouds, rows = values["clouds"], values["machines"]
        problems = [
            f"{path}: machines: {name}: not in prices.yaml; add it"
            for name in rows
            if name not in instances
        ]
        problems += [
            f"{path}: {where}{key}: unknown key{suggestion(key, known)}"
            for where, listed, known in (
                ("", values, ("clouds", "machines")),
                *((f"clouds.{name}.", cloud, _CLOUD_KEYS) for name, cloud in clouds.items()),
                *((f"machines.{name}.", row, _MACHINE_KEYS) for name, row in rows.items()),
            )
            for key in listed
            if key not in known
        ]
        if problems:
            raise ConfigError(problems)
        return MachineTable(
            path=path,
            machines=tuple(_machine(n, row, clouds, instances[n]) for n, row in rows.items()),
            heads={name: HeadMachine(**cloud["head"]) for name, cloud in clouds.items()},
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: not a table of machines ({type(error).__name__}: {error}); expected the "
            f"form of cluster/machines.yaml"
        ) from error


def _machine(name: str, row: dict[str, Any], clouds: dict[str, Any], price: Instance) -> Machine:
    cloud = clouds[row["cloud"]]
    return Machine(
        name=name,
        cloud=row["cloud"],
        gpu=price.gpu,
        gpus=int(price.gpus),
        cpus=int(price.cpus),
        memory_gb=row["memory_gb"],
        local_ssds=row.get("local_ssds", 0),
        regions=tuple(row.get("regions", cloud["regions"])),
        quota=Quota(**cloud["quotas"][row["quota"]]),
        price=price,
    )


def plan_cluster(description: Description, table: MachineTable) -> Cluster:
    """Return the cluster that a description means.

    Raises:
        ConfigError: No such machine, not in that region, or more of them than the quota grants.
    """
    machine = _choose(description, table)
    region = description.stated_region or machine.regions[0]
    cluster = Cluster(
        description=description,
        machine=machine,
        head=table.heads[machine.cloud],
        region=region,
        groups=_groups(description.spot, machine),
    )
    _require_quota(cluster)
    return cluster


def _choose(description: Description, table: MachineTable) -> Machine:
    provider, region = description.provider, description.stated_region
    # Kubernetes runs on either cloud: what is asked for says which.
    machines = [m for m in table.machines if provider in (m.cloud, "kuberay")]
    kinds = sorted({machine.gpu for machine in machines})
    of_kind = [m for m in machines if m.gpu.lower() == description.gpu.lower()]
    if not of_kind:
        near = suggestion(description.gpu.upper(), kinds)
        raise ConfigError(
            f"gpu: {provider} has no '{description.gpu}' in {table.path}, only "
            f"{', '.join(kinds)}{near}"
        )
    fitting = [m for m in of_kind if description.gpus_per_machine in (None, m.gpus)]
    if not fitting:
        sizes = sorted({machine.gpus for machine in of_kind})
        raise ConfigError(
            f"gpus_per_machine: {provider} has no machine with {description.gpus_per_machine} x "
            f"{of_kind[0].gpu}; expected one of {', '.join(map(str, sizes))}"
        )
    there = [m for m in fitting if region is None or region in m.regions]
    if not there:
        regions = sorted({name for machine in fitting for name in machine.regions})
        raise ConfigError(
            f"region: {region} has no {fitting[0].name} ({fitting[0].gpu}); expected one of "
            f"{', '.join(regions)}{suggestion(region or '', regions)}"
        )
    return min(there, key=lambda machine: (machine.gpus, machine.cpus))


def _groups(spot: bool, machine: Machine) -> tuple[Group, ...]:
    """Return the groups, spot first: where a cloud has none left, Ray takes the next."""
    price = machine.price
    on_demand = Group(name="gpu-on-demand", spot=False, priority=0, usd_per_hour=price.on_demand)
    if not spot:
        return (on_demand,)
    return (Group(name="gpu-spot", spot=True, priority=1, usd_per_hour=price.spot), on_demand)


def _require_quota(cluster: Cluster) -> None:
    granted = cluster.description.quota
    name, needed, unit = cluster.quota_needed
    if granted is None or needed <= granted:
        return
    workers = cluster.description.max_workers
    raise ConfigError(
        f"max_workers: {workers} x {cluster.machine.name} need {needed} {unit} of quota {name} in "
        f"{cluster.region}, and {granted} are granted; use at most "
        f"{granted * workers // needed} workers, or ask the cloud for more"
    )
