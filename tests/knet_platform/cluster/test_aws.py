"""AWS's files on a mocked EC2: the stack is made, then Ray's own bootstrap starts machines."""

import ast
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws

from knet_platform.cluster.machines import Cluster
from knet_platform.cluster.render import render

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(botocore|moto|cfnlint)")


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An AWS account of moto's, by an image in it; Ray writes its key into a home of its own."""
    with pytest.MonkeyPatch.context() as patch, mock_aws():
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.delenv("AWS_ENDPOINT_URL", raising=False)
        yield boto3.client("ec2").describe_images()["Images"][0]["ImageId"]


@pytest.fixture
def launcher(cloud: str, planned: Callable[..., Cluster]) -> dict[str, Any]:
    """The file for `ray up`, whose stack is in place."""
    texts = render(planned("aws", spot=True, ami=cloud))
    formation = boto3.client("cloudformation")
    if not formation.list_stacks()["StackSummaries"]:
        formation.create_stack(
            StackName="knet",
            TemplateBody=texts["access.yaml"],
            Capabilities=["CAPABILITY_NAMED_IAM"],
        )
    file: dict[str, Any] = yaml.safe_load(texts["cluster.yaml"])
    return file


def test_rays_bootstrap_accepts_the_file_and_starts_what_it_says(launcher: dict[str, Any]) -> None:
    from ray.autoscaler._private.commands import _bootstrap_config
    from ray.autoscaler._private.providers import _get_node_provider

    # Ray's first steps are to fill in defaults and to check the file against its schema.
    made = _bootstrap_config(launcher, no_config_cache=True)
    provider = _get_node_provider(made["provider"], made["cluster_name"])
    for name, kind in made["available_node_types"].items():
        tags = {"ray-node-type": "worker", "ray-user-node-type": name, "ray-node-name": name}
        provider.create_node(kind["node_config"], tags, 1)

    ec2 = boto3.client("ec2")
    instances = {
        next(tag["Value"] for tag in each["Tags"] if tag["Key"] == "Name"): each
        for reservation in ec2.describe_instances()["Reservations"]
        for each in reservation["Instances"]
    }
    assert {
        name: (each["InstanceType"], each.get("InstanceLifecycle"), each["State"]["Name"])
        for name, each in instances.items()
    } == {
        "head": ("m6i.2xlarge", None, "running"),
        "gpu-spot": ("g5.2xlarge", "spot", "running"),
        "gpu-on-demand": ("g5.2xlarge", None, "running"),
    }
    for name, each in instances.items():
        role = "knet-head" if name == "head" else "knet-worker"
        assert each["IamInstanceProfile"]["Arn"].endswith(f":instance-profile/{role}")
        assert {group["GroupName"] for group in each["SecurityGroups"]} == {"knet-nodes"}
        assert each["MetadataOptions"]["HttpTokens"] == "required"

    # Ray would have opened SSH to everyone in a group of its own making.
    (group,) = ec2.describe_security_groups(GroupNames=["knet-nodes"])["SecurityGroups"]
    among, ssh = sorted(group["IpPermissions"], key=lambda rule: rule["IpProtocol"])
    assert among["UserIdGroupPairs"][0]["GroupId"] == group["GroupId"]
    assert among["IpRanges"] == []
    assert (ssh["FromPort"], ssh["ToPort"]) == (22, 22)
    assert [each["CidrIp"] for each in ssh["IpRanges"]] == ["203.0.113.7/32"]


def statements(role: str, policy: str) -> list[dict[str, Any]]:
    made = boto3.client("iam").get_role_policy(RoleName=role, PolicyName=policy)["PolicyDocument"]
    # Moto gives what a stack made back as Python wrote it.
    listed: list[dict[str, Any]] = ast.literal_eval(str(made))["Statement"]
    return listed


def test_workers_may_use_their_prefix_and_nothing_else(launcher: dict[str, Any]) -> None:
    iam = boto3.client("iam")
    assert iam.list_role_policies(RoleName="knet-worker")["PolicyNames"] == ["bucket"]
    assert iam.list_attached_role_policies(RoleName="knet-worker")["AttachedPolicies"] == []
    listing, objects = statements("knet-worker", "bucket")
    assert listing["Resource"] == "arn:aws:s3:::bucket"
    assert listing["Condition"] == {"StringLike": {"s3:prefix": ["knet", "knet/*"]}}
    assert objects["Resource"] == "arn:aws:s3:::bucket/knet/*"


def test_the_head_ends_only_its_own_machines_and_hands_on_one_role(
    launcher: dict[str, Any],
) -> None:
    by_action: dict[str, list[dict[str, Any]]] = {}
    for statement in statements("knet-head", "machines"):
        for action in statement["Action"]:
            assert "*" not in action
            by_action.setdefault(action, []).append(statement)
    (end,) = by_action["ec2:TerminateInstances"]
    own = {"StringEquals": {"aws:ResourceTag/ray-cluster-name": "knet"}}
    assert end["Condition"] == own
    # Who could tag any machine as the cluster's own could end it.
    assert all("Condition" in statement for statement in by_action["ec2:CreateTags"])
    kinds = [s.get("Condition") for s in by_action["ec2:RunInstances"]]
    assert {"StringEquals": {"ec2:InstanceType": "g5.2xlarge"}} in kinds
    (handed,) = by_action["iam:PassRole"]
    assert (
        handed["Resource"] == boto3.client("iam").get_role(RoleName="knet-worker")["Role"]["Arn"]
    )


def test_rays_checks_refuse_what_their_schema_does_not_know(
    planned: Callable[..., Cluster],
) -> None:
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    file = yaml.safe_load(render(planned("aws"))["cluster.yaml"])
    validate_config(prepare_config(file))
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate_config(prepare_config(file | {"idle_timeout": 10}))
