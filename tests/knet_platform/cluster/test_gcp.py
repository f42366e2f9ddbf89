"""Google Cloud's file against Ray's schema and one of the request that Ray makes of it."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from knet_platform.cluster.machines import Cluster
from knet_platform.cluster.render import render

SCHEMA = yaml.safe_load((Path(__file__).parent / "gce_instance.yaml").read_text())


@pytest.fixture
def launcher(planned: Callable[..., Cluster]) -> dict[str, Any]:
    file: dict[str, Any] = yaml.safe_load(render(planned("gcp", spot=True))["cluster.yaml"])
    return file


def test_rays_own_checks_accept_the_file(launcher: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(launcher))


def test_every_machine_is_a_request_that_the_cloud_knows(launcher: dict[str, Any]) -> None:
    for kind in launcher["available_node_types"].values():
        jsonschema.validate(kind["node_config"], SCHEMA)
        misspelt = copy.deepcopy(kind["node_config"])
        misspelt["machinetype"] = misspelt.pop("machineType")
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(misspelt, SCHEMA)


def test_only_workers_are_spot_machines_with_disks_of_their_own(launcher: dict[str, Any]) -> None:
    nodes = {name: kind["node_config"] for name, kind in launcher["available_node_types"].items()}
    assert "scheduling" not in nodes["head"]
    assert nodes["gpu-spot"]["scheduling"]["provisioningModel"] == "SPOT"
    assert "provisioningModel" not in nodes["gpu-on-demand"]["scheduling"]
    disks = {name: [disk["type"] for disk in node["disks"]] for name, node in nodes.items()}
    assert disks["head"] == ["PERSISTENT"]
    assert disks["gpu-spot"] == disks["gpu-on-demand"] == ["PERSISTENT", "SCRATCH"]


def test_heads_and_workers_act_as_accounts_of_their_own(launcher: dict[str, Any]) -> None:
    """Ray would make one for the head that may do anything with machines and buckets."""
    emails = {
        name: kind["node_config"]["serviceAccounts"][0]["email"].partition("@")[0]
        for name, kind in launcher["available_node_types"].items()
    }
    assert emails == {
        "head": "knet-head",
        "gpu-spot": "knet-worker",
        "gpu-on-demand": "knet-worker",
    }
