"""Two sweeps at once on a head without room for their trials: nodes come, are shared, and go."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray._private import services
from ray._raylet import GcsClient
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from ray.core.generated.gcs_pb2 import GcsNodeInfo

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("placed_sweep.py")
CPUS = 2
"""Of a node that can be had, and of a trial's two workers; the head has one."""
MOST_NODES = 2
HEAD_TYPE = "ray.head.default"
"""As the fake provider calls it."""
RECIPE = """\
data: {format: shapes, shapes: {num_train: 8, num_val: 4, size: 64}, short_edge: [64, 64]}
train: {iterations: 10, batch_size: 4}
"""
SWEEP = """\
name: {name}
base: recipe.yaml
metric: {{name: val/AP, mode: max}}
baseline: base
resources: {{workers: 2, max_concurrent: 1}}
arms: {{base: {{optim.lr: {lr}}}, other: {{optim.lr: {lr}1}}}}
"""


def cluster_description(address: str) -> dict[str, Any]:
    """Return what `ray start --autoscaling-config` takes, of nodes that are processes here."""
    empty_lists = (
        "setup_commands", "head_setup_commands", "worker_setup_commands", "rsync_exclude",
        "initialization_commands", "head_start_ray_commands", "worker_start_ray_commands",
        "cluster_synced_files", "rsync_filter",
    )  # fmt: skip
    return {
        "cluster_name": "scaled",
        "max_workers": MOST_NODES,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider."
            "FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "gcs_address": address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
        },
        "available_node_types": {
            HEAD_TYPE: {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {"CPU": CPUS, "object_store_memory": 100 * 2**20},
                "node_config": {},
                "min_workers": 0,
                "max_workers": MOST_NODES,
            },
        },
        "head_node_type": HEAD_TYPE,
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "auth": {},
        "docker": {},
        **{name: [] for name in empty_lists},
    }


@pytest.fixture
def head(
    start_process: Callable[..., Any], reserve_port: Callable[[], int], tmp_path: Path
) -> Iterator[str]:
    """Address of a cluster that grows and shrinks by itself."""
    address = f"{services.get_node_ip_address()}:{(port := reserve_port())}"
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(cluster_description(address)))
    session = tempfile.mkdtemp(prefix="knet-", dir="/tmp")  # sockets allow few characters
    options = {
        "port": port,
        "dashboard-port": reserve_port(),
        "ray-client-server-port": reserve_port(),
        "dashboard-agent-listen-port": 0,
        "num-cpus": 1,
        "autoscaling-config": tmp_path / "cluster.yaml",
        "temp-dir": session,
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += ["--disable-usage-stats", *(f"--{name}={value}" for name, value in options.items())]
    log = tmp_path / "head.log"
    process = start_process(
        command,
        log,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "platform")]),
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        },
    )
    deadline = time.monotonic() + 120
    while "--block" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)  # it says so when it is ready
    yield address
    process.kill()
    shutil.rmtree(session, ignore_errors=True)


def test_nodes_come_for_two_sweeps_which_share_them_and_go_again(
    head: str, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    environment = {
        **os.environ,
        "RAY_ADDRESS": head,
        "KNET_GROWS_TO": f"CPU={CPUS * MOST_NODES}",
        "KNET_HOME": str(tmp_path / "home"),
        "MLFLOW_TRACKING_URI": "none",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "platform")]),
    }
    for name in ("KNET_STORAGE", "KNET_DATA", "KNET_TEST_FAULTS"):
        environment.pop(name, None)
    client = GcsClient(address=head)

    def alive() -> int:
        nodes = client.get_all_node_info().values()
        return sum(node.state == GcsNodeInfo.GcsNodeState.ALIVE for node in nodes)

    assert alive() == 1
    running = []
    for name, lr in (("first", "0.01"), ("second", "0.02")):
        (tmp_path / f"{name}.yaml").write_text(SWEEP.format(name=name, lr=lr))
        with (tmp_path / f"{name}.log").open("w") as log:
            command = [sys.executable, str(SCRIPT), str(tmp_path / f"{name}.yaml")]
            running.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    most = 1
    try:
        while any(process.poll() is None for process in running):
            most = max(most, alive())
            time.sleep(0.5)  # nodes come and go unannounced
    finally:
        for process in running:
            process.kill()
    logs = "\n".join((tmp_path / f"{name}.log").read_text() for name in ("first", "second"))
    assert [process.returncode for process in running] == [0, 0], logs
    assert most == 1 + MOST_NODES

    def trials(sweep: str) -> list[dict[str, Any]]:
        found = [json.loads(file.read_text()) for file in tmp_path.glob(f"{sweep}_*.json")]
        return sorted(found, key=lambda trial: trial["begin"])

    first, second = trials("first"), trials("second")
    assert (len(first), len(second)) == (2, 2)
    for trial in (*first, *second):  # both workers on one node, and none where the driver is
        assert len(trial["nodes"]) == 2
        assert len({*trial["nodes"]}) == 1
        assert trial["driver"] not in trial["nodes"]
    for sweep in (first, second):  # the quota
        assert sweep[0]["end"] < sweep[1]["begin"]
    for one, other in ((first, second), (second, first)):  # nobody waits for a whole sweep
        assert one[0]["begin"] < other[1]["end"]

    deadline = time.monotonic() + 120
    while alive() > 1:
        assert time.monotonic() < deadline, "nodes stay although nobody needs them"
        time.sleep(0.5)
