"""The commands of `ray up` that run on a machine: which disk becomes the cache, how Ray starts."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from knet_platform.cluster.machines import Cluster
from knet_platform.cluster.render import render


@pytest.fixture
def launcher(planned: Callable[..., Cluster]) -> dict[str, Any]:
    file: dict[str, Any] = yaml.safe_load(render(planned("gcp"))["cluster.yaml"])
    return file


def test_ray_starts_closed_and_nothing_trains_on_the_head(launcher: dict[str, Any]) -> None:
    (head,) = (line for line in launcher["head_start_ray_commands"] if "ray start" in line)
    assert "--dashboard-host=127.0.0.1" in head
    assert "--num-cpus=0 --num-gpus=0" in head
    assert "--env RAY_AUTH_MODE=token" in launcher["docker"]["run_options"]
    token = "--env RAY_AUTH_TOKEN_PATH=/home/knet/secrets/auth_token"
    assert token in launcher["docker"]["run_options"]
    pages = "--env RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR=/mnt/knet/metrics/ray"
    assert pages in launcher["docker"]["run_options"]
    assert launcher["file_mounts"] == {"/home/knet/secrets": "~/.knet/clusters/knet"}


@pytest.mark.parametrize(
    ("disks", "mounted", "done"),
    [
        ((), (), []),
        (
            ("nvme0",),
            (),
            ["mkfs.ext4 -q -m 0 {nvme0}", "mount -o noatime {nvme0} /mnt/knet/cache"],
        ),
        (
            ("nvme0", "nvme1"),
            (),
            [
                "mdadm --create /dev/md0 --run --level=0 --raid-devices=2 {nvme0} {nvme1}",
                "mkfs.ext4 -q -m 0 /dev/md0",
                "mount -o noatime /dev/md0 /mnt/knet/cache",
            ],
        ),
        (("nvme0",), ("/opt/dlami/nvme",), ["mount --bind /opt/dlami/nvme /mnt/knet/cache"]),
        (("nvme0",), ("/mnt/knet/cache",), []),  # `ray up` once more
    ],
)
def test_the_machines_own_disks_become_the_cache(
    launcher: dict[str, Any],
    tmp_path: Path,
    disks: tuple[str, ...],
    mounted: tuple[str, ...],
    done: list[str],
) -> None:
    """The commands are those of the file; what needs a machine's disks is only written down."""
    (script,) = launcher["initialization_commands"]
    log = tmp_path / "log"
    log.touch()
    programs = {
        "sudo": f'[ "$1" = blkid ] && exit 1; echo "$@" >> {log}',
        "mountpoint": f'case " {" ".join(mounted)} " in *" $2 "*) exit 0;; esac; exit 1',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    found = {}
    for name in disks:
        found[name] = tmp_path / f"{name}n1"
        found[name].touch()
        (tmp_path / f"google-local-nvme-ssd-{name}").symlink_to(found[name])
    script = script.replace("/dev/disk/by-id", str(tmp_path))
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", script], env=environment, check=True)
    first, *ran, last = log.read_text().splitlines()
    assert first == "mkdir -p /mnt/knet/cache"
    assert ran == [line.format(**found) for line in done]
    assert last == "chown 1000:1000 /mnt/knet /mnt/knet/cache"
