"""Fixtures that every test may use."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports Ray, which reads them once.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # one process less per trial

# Workers of the Ray tests share few cores with the tests themselves; read when torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_DEFAULT = Path(__file__).parents[1] / ".." / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real images with true annotations; never part of the project (licences)."""
    folder = Path(os.environ.get("KNET_TEST_DATA", _DEFAULT)).resolve()
    if not folder.is_dir():
        pytest.skip(f"no real test data at {folder}; set KNET_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """A Ray cluster on this machine, connected to; gives its dashboard's address."""
    from knet_platform.cluster import prepare_environment

    prepare_environment()
    # A job's command finds its python there, as on a cluster made from an image.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    import ray
    from ray.cluster_utils import Cluster

    # `ray.init` alone would take fixed ports, which another cluster on the machine may have.
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 4,
            "num_gpus": 0,
            "include_dashboard": True,
            "dashboard_port": 0,
            "dashboard_agent_listen_port": 0,
            "object_store_memory": 200 * 2**20,
        },
    )
    context = ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    yield f"http://{context.dashboard_url}"
    ray.shutdown()
    cluster.shutdown()
