"""A description of a cluster per provider."""

from collections.abc import Callable
from typing import Any

import pytest

from knet_platform.cluster.description import Description
from knet_platform.cluster.machines import Cluster, plan_cluster, read_machines

STATED: dict[str, dict[str, Any]] = {
    "aws": {"gpu": "a10g", "ami": "ami-0123456789abcdef0", "allow_ssh": "203.0.113.7/32"},
    "gcp": {"gpu": "l4", "project": "example-project", "zone": "us-central1-a"},
    "kuberay": {"gpu": "a10g", "sweep": "sweeps/stages.yaml"},
}


@pytest.fixture
def describe() -> Callable[..., Description]:
    """Return a function that describes a cluster at a provider, changed as asked."""

    def make(provider: str = "aws", **changes: Any) -> Description:
        common = {"max_workers": 8, "storage": "s3://bucket/knet", "image": "example/knet:1"}
        stated = STATED.get(provider, {"gpu": "l4"})
        return Description(**{"provider": provider, **common, **stated, **changes})

    return make


@pytest.fixture
def planned(describe: Callable[..., Description]) -> Callable[..., Cluster]:
    """Return a function that plans such a cluster by the table that comes along."""
    return lambda *args, **changes: plan_cluster(describe(*args, **changes), read_machines())
