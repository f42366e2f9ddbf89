"""KubeRay's resources against a schema of their level, and their pods against Kubernetes' own."""

import argparse
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from knet_platform.cli import run
from knet_platform.cluster.machines import Cluster
from knet_platform.cluster.render import render
from knet_platform.prices import read_prices

ROOT = Path(__file__).parents[3]
SWEEP = Path("sweeps/stages.yaml")
SCHEMA = yaml.safe_load((Path(__file__).parent / "ray_io_v1.yaml").read_text())
VERSION = "1.32"
"""Of Kubernetes: the oldest that is still maintained somewhere."""
CLOUDS = {"aws": {"gpu": "a10g"}, "gcp": {"gpu": "l4", "region": "us-central1"}}


@pytest.fixture(params=CLOUDS)
def documents(
    request: pytest.FixtureRequest, planned: Callable[..., Cluster]
) -> dict[str, dict[str, Any]]:
    """Every document by its kind and name."""
    stated = {"spot": True, "max_usd": 200.0, "queue": "gpus", "redis": "redis:6379"}
    cluster = planned("kuberay", **stated, **CLOUDS[request.param])
    assert cluster.machine.cloud == request.param
    loaded = [each for text in render(cluster).values() for each in yaml.safe_load_all(text)]
    return {f"{each['kind']} {each['metadata']['name']}": each for each in loaded}


def pods(documents: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    job = documents["RayJob knet-sweep"]["spec"]
    yield job["submitterPodTemplate"]
    for spec in (documents["RayCluster knet"]["spec"], job["rayClusterSpec"]):
        yield spec["headGroupSpec"]["template"]
        for group in spec["workerGroupSpecs"]:
            yield group["template"]


def as_pod(template: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(template)}


def test_resources_are_of_the_form_that_the_operator_reads(
    documents: dict[str, dict[str, Any]],
) -> None:
    for name in ("RayCluster knet", "RayJob knet-sweep"):
        jsonschema.validate(documents[name], SCHEMA)
    misplaced = copy.deepcopy(documents["RayJob knet-sweep"])
    misplaced["spec"]["enableInTreeAutoscaling"] = True
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(misplaced, SCHEMA)


def test_everything_else_is_of_kubernetes_own_form(documents: dict[str, dict[str, Any]]) -> None:
    for document in documents.values():
        if not document["apiVersion"].startswith(("ray.io/", "monitoring.coreos.com/")):
            kubernetes_validate.validate(document, VERSION, strict=True)
    for template in pods(documents):
        kubernetes_validate.validate(as_pod(template), VERSION, strict=True)
        wrong = as_pod(template)
        wrong["spec"]["containers"][0]["volumemounts"] = []
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(wrong, VERSION, strict=True)


def test_a_lost_cluster_is_followed_by_another_that_continues(
    documents: dict[str, dict[str, Any]],
) -> None:
    job = documents["RayJob knet-sweep"]
    spec = job["spec"]
    assert spec["entrypoint"].startswith("knet run sweeps/stages.yaml --yes --instance ")
    assert spec["entrypoint"].endswith(" --spot --max-usd 200")
    assert spec["backoffLimit"] >= 1
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["suspend"] is True  # until Kueue admits it
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"


def test_the_entrypoint_is_a_command_of_this_project(
    documents: dict[str, dict[str, Any]],
) -> None:
    program, verb, *words = documents["RayJob knet-sweep"]["spec"]["entrypoint"].split()
    assert (program, verb) == ("knet", "run")
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    args = parser.parse_args(words)
    assert (args.sweep, args.spot, args.yes, args.max_usd) == (SWEEP, True, True, 200.0)
    assert args.instance in read_prices().instances
    assert (ROOT / SWEEP).is_file()


def test_the_deadline_is_when_a_full_cluster_has_spent_the_budget(
    planned: Callable[..., Cluster],
) -> None:
    def deadline(**changes: Any) -> int | None:
        job = yaml.safe_load(render(planned("kuberay", **changes))["rayjob.yaml"])
        found: int | None = job["spec"].get("activeDeadlineSeconds")
        return found

    full = 0.384 + 8 * 1.212
    assert deadline(max_usd=100.0) == int(100 / full * 3600)
    assert deadline(max_usd=100.0, spot=True) == int(100 / full * 3600)
    assert deadline() is None


def test_pods_are_closed_and_take_their_token_from_a_secret(
    documents: dict[str, dict[str, Any]],
) -> None:
    spec = documents["RayCluster knet"]["spec"]
    assert spec["authOptions"] == {"mode": "token", "secretName": "knet-token"}
    assert spec == documents["RayJob knet-sweep"]["spec"]["rayClusterSpec"]
    policy = documents["NetworkPolicy knet-closed"]["spec"]
    chosen = policy["podSelector"]["matchLabels"]
    for template in pods(documents):
        assert chosen.items() <= template["metadata"]["labels"].items()
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        (container,) = template["spec"]["containers"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]
    among, operator = policy["ingress"]
    assert among == {"from": [{"podSelector": {"matchLabels": chosen}}]}
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]
    assert documents["ServiceAccount knet-worker"]["automountServiceAccountToken"] is False


def test_prometheus_may_scrape_every_pod_and_nothing_else(
    documents: dict[str, dict[str, Any]],
) -> None:
    monitor, policy = documents["PodMonitor knet"]["spec"], documents["NetworkPolicy knet-scraped"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    (rule,) = policy["spec"]["ingress"]
    assert policy["spec"]["podSelector"] == monitor["selector"]
    spec = documents["RayCluster knet"]["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        labels = group["template"]["metadata"]["labels"]
        assert monitor["selector"]["matchLabels"].items() <= labels.items()
        (container,) = group["template"]["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        port = ports[endpoint["port"]]
        assert group["rayStartParams"]["metrics-export-port"] == str(port)
        assert rule["ports"] == [{"protocol": "TCP", "port": port}]


def test_the_head_is_kept_off_spot_machines_and_from_training(
    documents: dict[str, dict[str, Any]],
) -> None:
    spec = documents["RayCluster knet"]["spec"]
    head = spec["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    rules = head["template"]["spec"]["affinity"]["nodeAffinity"]
    ((rule,),) = (
        term["matchExpressions"]
        for term in rules["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    )
    spot, on_demand = (group["template"]["spec"] for group in spec["workerGroupSpecs"])
    assert spot["nodeSelector"].items() >= {rule["key"]: rule["values"][0]}.items()
    assert rule["operator"] == "NotIn"
    assert any(each["key"] == rule["key"] for each in spot["tolerations"])
    assert on_demand["affinity"] == head["template"]["spec"]["affinity"]
    assert [group["minReplicas"] for group in spec["workerGroupSpecs"]] == [0, 0]
