"""AWS: the file for `ray up`, and a CloudFormation stack with the rights that it needs."""

from typing import Any

from knet_platform.cluster.launcher import launcher
from knet_platform.cluster.machines import Cluster, Group

_DISKS = "/dev/disk/by-id/nvme-Amazon_EC2_NVMe_Instance_Storage_*"
_SYSTEM_DISK_GB = 150
"""Holds the images; the data set's cache lies on the machine's own disks."""
_OBJECT_ACTIONS = [
    "s3:GetObject",
    "s3:PutObject",
    "s3:DeleteObject",
    "s3:AbortMultipartUpload",
]
_READ_ACTIONS = [
    "ec2:DescribeInstances",
    "ec2:DescribeInstanceTypes",
    "ec2:DescribeImages",
    "ec2:DescribeSubnets",
    "ec2:DescribeSecurityGroups",
    "ec2:DescribeKeyPairs",
]


def aws_launcher(cluster: Cluster) -> dict[str, Any]:
    """Return the file for `ray up`; roles and network rules are those of `aws_access`."""
    name = cluster.description.name
    return launcher(
        cluster,
        provider={
            "type": "aws",
            "region": cluster.region,
            # Ray finds this group by its name, and leaves its rules alone.
            "security_group": {"GroupName": f"{name}-nodes"},
        },
        head_node=_node(cluster, cluster.head.machine, f"{name}-head"),
        worker_nodes={
            group.name: _node(cluster, cluster.machine.name, f"{name}-worker", group)
            for group in cluster.groups
        },
        disks=_DISKS,
    )


def _node(cluster: Cluster, machine: str, role: str, group: Group | None = None) -> dict[str, Any]:
    disk = {"VolumeSize": _SYSTEM_DISK_GB, "VolumeType": "gp3", "Encrypted": True}
    node: dict[str, Any] = {
        "InstanceType": machine,
        "ImageId": cluster.description.ami,
        "IamInstanceProfile": {"Name": role},
        # Only processes of the machine itself may ask for the role's credentials.
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 1},
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
    }
    if group and group.spot:
        node["InstanceMarketOptions"] = {"MarketType": "spot"}
    return node


def aws_access(cluster: Cluster) -> dict[str, Any]:
    """Return the CloudFormation template: two roles, and who may reach the machines.

    Workers may use the bucket's prefix. The head may also start and end machines of this cluster.
    """
    description, name = cluster.description, cluster.description.name
    return {
        "AWSTemplateFormatVersion": "2010-09-09",
        "Description": f"What the Ray cluster {name} may do, and who may reach it",
        "Resources": {
            "Worker": _role(f"{name}-worker", [_bucket_policy(cluster)]),
            "Head": _role(f"{name}-head", [_bucket_policy(cluster), _launch_policy(cluster)]),
            "WorkerProfile": _profile(f"{name}-worker", "Worker"),
            "HeadProfile": _profile(f"{name}-head", "Head"),
            "Nodes": {
                "Type": "AWS::EC2::SecurityGroup",
                "Properties": {
                    "GroupName": f"{name}-nodes",
                    "GroupDescription": f"Nodes of the Ray cluster {name}",
                    "SecurityGroupIngress": [
                        {
                            "IpProtocol": "tcp",
                            "FromPort": 22,
                            "ToPort": 22,
                            "CidrIp": description.allow_ssh,
                        }
                    ],
                },
            },
            "Among": {
                "Type": "AWS::EC2::SecurityGroupIngress",
                "Properties": {
                    "GroupId": {"Fn::GetAtt": ["Nodes", "GroupId"]},
                    "IpProtocol": "-1",
                    "SourceSecurityGroupId": {"Fn::GetAtt": ["Nodes", "GroupId"]},
                },
            },
        },
    }


def _role(name: str, policies: list[dict[str, Any]]) -> dict[str, Any]:
    trust = {
        "Effect": "Allow",
        "Principal": {"Service": "ec2.amazonaws.com"},
        "Action": "sts:AssumeRole",
    }
    return {
        "Type": "AWS::IAM::Role",
        "Properties": {
            "RoleName": name,
            "AssumeRolePolicyDocument": {"Version": "2012-10-17", "Statement": [trust]},
            "Policies": policies,
        },
    }


def _profile(name: str, role: str) -> dict[str, Any]:
    return {
        "Type": "AWS::IAM::InstanceProfile",
        "Properties": {"InstanceProfileName": name, "Roles": [{"Ref": role}]},
    }


def _bucket_policy(cluster: Cluster) -> dict[str, Any]:
    bucket, prefix = cluster.description.bucket, cluster.description.prefix
    below = f"{prefix}/*" if prefix else "*"
    seen = {"StringLike": {"s3:prefix": [prefix, below]}} if prefix else None
    listing = _allowed(["s3:ListBucket"], f"arn:aws:s3:::{bucket}", seen)
    objects = _allowed(_OBJECT_ACTIONS, f"arn:aws:s3:::{bucket}/{below}")
    return _policy("bucket", [listing, objects])


def _launch_policy(cluster: Cluster) -> dict[str, Any]:
    """Return the right to start the cluster's kind of machine, and to end and tag its own."""
    own = {"StringEquals": {"aws:ResourceTag/ray-cluster-name": cluster.description.name}}
    ec2 = f"arn:aws:ec2:{cluster.region}:*"
    parts = ("network-interface", "security-group", "key-pair", "subnet", "volume")
    return _policy(
        "machines",
        [
            _allowed(_READ_ACTIONS, "*"),
            _allowed(
                ["ec2:RunInstances"],
                f"{ec2}:instance/*",
                {"StringEquals": {"ec2:InstanceType": cluster.machine.name}},
            ),
            _allowed(
                ["ec2:RunInstances"],
                [*(f"{ec2}:{part}/*" for part in parts), f"arn:aws:ec2:{cluster.region}::image/*"],
            ),
            _allowed(
                ["ec2:CreateTags"],
                f"{ec2}:*/*",
                {"StringEquals": {"ec2:CreateAction": "RunInstances"}},
            ),
            _allowed(["ec2:CreateTags", "ec2:TerminateInstances"], f"{ec2}:instance/*", own),
            _allowed(["iam:PassRole"], {"Fn::GetAtt": ["Worker", "Arn"]}),
        ],
    )


def _allowed(
    actions: list[str], resource: Any, condition: dict[str, Any] | None = None
) -> dict[str, Any]:
    statement = {"Effect": "Allow", "Action": actions, "Resource": resource}
    return statement | ({"Condition": condition} if condition else {})


def _policy(name: str, statements: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "PolicyName": name,
        "PolicyDocument": {"Version": "2012-10-17", "Statement": statements},
    }
