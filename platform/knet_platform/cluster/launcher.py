"""What `ray up` is told in either cloud: containers, commands, closed doors."""

from collections.abc import Mapping
from typing import Any

from knet_platform.cluster.description import HOME, SECRETS
from knet_platform.cluster.machines import Cluster

_SSH_USER = "ubuntu"
_USER_ID = 1000
"""Of that user and of the image's, so that files of one are the other's."""
_HEAD = "head"

# The machine's own disks become the cache: of several one fast volume; AWS's images have done that
# already. Without any, the cache is a folder of the system's disk.
_MOUNT_CACHE = """\
set -eu
cache={home}/cache
sudo mkdir -p $cache
set -- $(ls {disks} 2>/dev/null | xargs -r readlink -f | sort -u | grep -v 'p[0-9]*$' || true)
if mountpoint -q $cache; then :
elif mountpoint -q /opt/dlami/nvme; then sudo mount --bind /opt/dlami/nvme $cache
elif [ $# -gt 0 ]; then
  disk=$1
  if [ $# -gt 1 ]; then
    disk=/dev/md0
    [ -e $disk ] || sudo mdadm --create $disk --run --level=0 --raid-devices=$# "$@"
  fi
  sudo blkid $disk >/dev/null || sudo mkfs.ext4 -q -m 0 $disk
  sudo mount -o noatime $disk $cache
fi
sudo chown {user}:{user} {home} $cache
"""


def launcher(
    cluster: Cluster,
    *,
    provider: Mapping[str, Any],
    head_node: Mapping[str, Any],
    worker_nodes: Mapping[str, Mapping[str, Any]],
    disks: str,
) -> dict[str, Any]:
    """Return the file for `ray up`.

    Args:
        cluster: What is to be started.
        provider: Section of that name.
        head_node: The cloud's request for the head.
        worker_nodes: Its requests for each group's machines.
        disks: Pattern of the machine's own NVMe disks.
    """
    description, machine = cluster.description, cluster.machine
    settings = cluster.environment() | {
        "RAY_AUTH_TOKEN_PATH": f"{SECRETS}/auth_token",
        # Where a Grafana beside the container finds them (dashboards/compose.yaml).
        "RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR": f"{HOME}/metrics/ray",
    }
    groups = {
        group.name: {
            "min_workers": 0,
            "max_workers": description.max_workers,
            "priority": group.priority,
            "resources": {"CPU": machine.cpus, "GPU": machine.gpus},
            "node_config": dict(worker_nodes[group.name]),
        }
        for group in cluster.groups
    }
    # The dashboard takes jobs: it is reached through SSH alone (`ray dashboard`).
    head_start = (
        "ulimit -n 65536; ray start --head --port=6379 --num-cpus=0 --num-gpus=0 "
        "--dashboard-host=127.0.0.1 --autoscaling-config=~/ray_bootstrap_config.yaml"
    )
    mount = _MOUNT_CACHE.format(home=HOME, disks=disks, user=_USER_ID)
    return {
        "cluster_name": description.name,
        "max_workers": description.max_workers,
        "idle_timeout_minutes": description.idle_minutes,
        "provider": {**provider, "cache_stopped_nodes": False},
        "auth": {"ssh_user": _SSH_USER},
        "docker": {
            "container_name": "knet",
            "head_image": description.head_image,
            "worker_image": description.worker_image,
            "pull_before_run": True,
            "run_options": [
                "--ulimit nofile=65536:65536",
                f"--volume {HOME}:{HOME}",
                *(f"--env {name}={value}" for name, value in settings.items()),
            ],
        },
        "head_node_type": _HEAD,
        "available_node_types": {
            _HEAD: {
                "min_workers": 0,
                "max_workers": 0,
                "resources": {"CPU": 0, "GPU": 0},
                "node_config": dict(head_node),
            },
            **groups,
        },
        "file_mounts": {SECRETS: f"~/.knet/clusters/{description.name}"},
        "initialization_commands": [mount],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": ["ray stop", head_start],
        "worker_start_ray_commands": [
            "ray stop",
            "ulimit -n 65536; ray start --address=$RAY_HEAD_IP:6379",
        ],
    }
