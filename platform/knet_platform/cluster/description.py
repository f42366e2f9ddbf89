"""What the owner of a cluster states; all files for clouds are made from this one description."""

import ipaddress
import re
from dataclasses import dataclass
from typing import Literal, get_args

from knet_core import ConfigError
from knet_platform.config import suggestion

Provider = Literal["aws", "gcp", "kuberay"]
PROVIDERS: tuple[str, ...] = get_args(Provider)

HOME = "/mnt/knet"
"""`KNET_HOME` on every node; its cache/ is the node's own NVMe where it has any."""
SECRETS = "/home/knet/secrets"
"""Where the containers find the token, and what else must not stand in files."""


def name_problems(name: str) -> list[str]:
    """Return what keeps a name from being a cluster's; clouds and folders are named by it."""
    if re.fullmatch(r"[a-z]([a-z0-9-]{0,28}[a-z0-9])?", name):
        return []
    return [
        f"name: got '{name}', expected at most 30 small letters, digits and hyphens, the first "
        f"one a letter"
    ]


_ONLY: dict[str, tuple[str, ...]] = {
    "ami": ("aws",),
    "allow_ssh": ("aws",),
    "project": ("gcp",),
    "zone": ("gcp",),
    "region": ("aws", "kuberay"),
    "sweep": ("kuberay",),
    "max_usd": ("kuberay",),
    "queue": ("kuberay",),
    "redis": ("kuberay",),
}
"""Fields that one provider alone has a use for."""
_NEEDED = {"aws": ("ami", "allow_ssh"), "gcp": ("project", "zone"), "kuberay": ("sweep",)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """A cluster: a head that trains nothing, and GPU machines that come and go.

    Raises:
        ConfigError: Everything that is wrong with it.
    """

    provider: str
    """One of `PROVIDERS`."""
    gpu: str
    """Such as A10G, in any case of letters."""
    max_workers: int
    """GPU machines at once."""
    storage: str
    """Where results go, s3://bucket/prefix."""
    image: str
    """Name and tag; with -cpu and -cuda behind it those of the head's and the workers' image."""
    name: str = "knet"
    spot: bool = False
    """Spot machines first, others where none are to be had; else only others."""
    gpus_per_machine: int | None = None
    """Unset: the smallest machine with that GPU."""
    region: str | None = None
    """Unset: the first that has the machine."""
    idle_minutes: int = 10
    """A machine without work goes after so long."""
    tracking_uri: str | None = None
    """MLflow's server; unset: a file on the head, which goes with it."""
    quota: int | None = None
    """What the account is granted, in the unit of `Quota`; unset: not checked."""
    ami: str | None = None
    """AWS: image of the machines, with NVIDIA's driver and docker."""
    allow_ssh: str | None = None
    """AWS: addresses that may use SSH, such as 203.0.113.7/32; nothing else is open."""
    project: str | None = None
    """Google Cloud: id of the project."""
    zone: str | None = None
    """Google Cloud: where in the region, such as us-central1-a."""
    sweep: str | None = None
    """KubeRay: what the RayJob runs, as the image has it."""
    max_usd: float | None = None
    """KubeRay: what one run of the RayJob may cost; ends it when a full cluster has cost that."""
    queue: str | None = None
    """KubeRay: Kueue's local queue that admits the RayJob."""
    redis: str | None = None
    """KubeRay: host:port of a Redis that keeps the head's state, so that a new head continues."""

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise ConfigError(problems)

    def _problems(self) -> list[str]:
        if self.provider not in PROVIDERS:
            near = suggestion(self.provider, PROVIDERS) or f"; expected {', '.join(PROVIDERS)}"
            return [f"provider: no files for '{self.provider}'{near}"]
        problems = [
            f"{name}: {self.provider} has no use for it; leave it out"
            for name, providers in _ONLY.items()
            if getattr(self, name) is not None and self.provider not in providers
        ]
        problems += [
            f"{name}: not set; {self.provider} needs it (see knet cluster render --help)"
            for name in _NEEDED[self.provider]
            if getattr(self, name) is None
        ]
        problems.extend(name_problems(self.name))
        for name in ("max_workers", "idle_minutes", "gpus_per_machine", "max_usd"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                problems.append(f"{name}: expected more than 0, got {value:g}")
        if not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[\w./-]+)?", self.storage):
            problems.append(f"storage: got '{self.storage}', expected s3://bucket/prefix")
        if not re.fullmatch(r"[a-z0-9][\w./:-]*[^/:]:[\w][\w.-]*", self.image):
            problems.append(
                f"image: got '{self.image}', expected registry/name:tag; a tag is needed so that "
                f"all nodes run the same"
            )
        if self.allow_ssh is not None:
            problems += _network_problems(self.allow_ssh)
        if self.redis is not None and not re.fullmatch(r"[\w.-]+:\d+", self.redis):
            problems.append(f"redis: got '{self.redis}', expected host:port")
        return problems

    @property
    def stated_region(self) -> str | None:
        """Return the region that was named, be it by a zone."""
        return self.zone.rpartition("-")[0] if self.zone else self.region

    @property
    def bucket(self) -> str:
        """Return the bucket of `storage`."""
        return self.storage.removeprefix("s3://").partition("/")[0]

    @property
    def prefix(self) -> str:
        """Return the prefix of `storage` in its bucket, without slashes at its ends."""
        return self.storage.removeprefix("s3://").partition("/")[2].strip("/")

    @property
    def head_image(self) -> str:
        """Return the image without CUDA."""
        return f"{self.image}-cpu"

    @property
    def worker_image(self) -> str:
        """Return the image with CUDA."""
        return f"{self.image}-cuda"


def _network_problems(network: str) -> list[str]:
    try:
        parsed = ipaddress.ip_network(network)
    except ValueError as error:
        return [f"allow_ssh: {error}; expected addresses such as 203.0.113.7/32"]
    if parsed.prefixlen == 0:
        return [
            f"allow_ssh: {network} is the whole world; name your own address, such as a.b.c.d/32"
        ]
    return []
