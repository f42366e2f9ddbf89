"""Google Cloud: the file for `ray up`, and the role of its head."""

from typing import Any

from knet_platform.cluster.launcher import launcher
from knet_platform.cluster.machines import Cluster, Group

_DISKS = "/dev/disk/by-id/google-local-nvme-ssd-*"
_SYSTEM_DISK_GB = 150
_SCOPE = "https://www.googleapis.com/auth/cloud-platform"
"""The machine's account limits what may be done; scopes only could once more."""


def gcp_launcher(cluster: Cluster) -> dict[str, Any]:
    """Return the file for `ray up`; the accounts and the network are made beforehand."""
    return launcher(
        cluster,
        provider={
            "type": "gcp",
            "region": cluster.region,
            "availability_zone": cluster.description.zone,
            "project_id": cluster.description.project,
        },
        head_node=_node(cluster, cluster.head.machine, "head"),
        worker_nodes={
            group.name: _node(cluster, cluster.machine.name, "worker", group)
            for group in cluster.groups
        },
        disks=_DISKS,
    )


def _node(cluster: Cluster, machine: str, role: str, group: Group | None = None) -> dict[str, Any]:
    project, name = cluster.description.project, cluster.description.name
    node: dict[str, Any] = {
        "machineType": machine,
        "disks": [
            {
                "boot": True,
                "autoDelete": True,
                "type": "PERSISTENT",
                "initializeParams": {
                    "diskSizeGb": _SYSTEM_DISK_GB,
                    "sourceImage": cluster.head.system_image,
                },
            }
        ],
        "networkInterfaces": [
            {
                "subnetwork": (f"projects/{project}/regions/{cluster.region}/subnetworks/{name}"),
                "accessConfigs": [{"name": "External NAT", "type": "ONE_TO_ONE_NAT"}],
            }
        ],
        "serviceAccounts": [
            {"email": f"{name}-{role}@{project}.iam.gserviceaccount.com", "scopes": [_SCOPE]}
        ],
    }
    if group is None:
        return node
    ssd = f"zones/{cluster.description.zone}/diskTypes/local-ssd"
    node["disks"] += [
        {
            "type": "SCRATCH",
            "autoDelete": True,
            "interface": "NVME",
            "initializeParams": {"diskType": ssd},
        }
        for _ in range(cluster.machine.local_ssds)
    ]
    # Machines with GPUs cannot move to another host while that is serviced.
    scheduling: dict[str, Any] = {"onHostMaintenance": "TERMINATE"}
    if group.spot:
        scheduling |= {"provisioningModel": "SPOT", "instanceTerminationAction": "DELETE"}
    node["scheduling"] = scheduling
    return node


def gcp_head_role(cluster: Cluster) -> dict[str, Any]:
    """Return the role with which the head starts and ends machines, for `gcloud iam roles`."""
    return {
        "title": f"Head of the Ray cluster {cluster.description.name}",
        "stage": "GA",
        "includedPermissions": [
            "compute.disks.create",
            "compute.images.useReadOnly",
            "compute.instances.create",
            "compute.instances.delete",
            "compute.instances.get",
            "compute.instances.list",
            "compute.instances.setLabels",
            "compute.instances.setMetadata",
            "compute.instances.setServiceAccount",
            "compute.subnetworks.use",
            "compute.subnetworks.useExternalIp",
            "compute.zoneOperations.get",
        ],
    }
