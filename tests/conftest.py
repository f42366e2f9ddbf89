"""Fixtures that every test may use."""

import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

# Before anything imports Ray, which reads them once.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # one process less per trial

# Workers of the Ray tests share few cores with the tests themselves; read when torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_DEFAULT = Path(__file__).parents[1] / ".." / "shared" / "data"


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give all tests that share a Ray cluster to one process of pytest-xdist.

    Likewise those that share a server of MLflow alone. Whoever starts a cluster of its own may
    run beside them.
    """
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if "cluster" in fixtures:
            item.add_marker(pytest.mark.xdist_group("cluster"))
        elif {"server", "team_server"} & fixtures:
            item.add_marker(pytest.mark.xdist_group("server"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real images with true annotations; never part of the project (licences)."""
    folder = Path(os.environ.get("KNET_TEST_DATA", _DEFAULT)).resolve()
    if not folder.is_dir():
        pytest.skip(f"no real test data at {folder}; set KNET_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder where tests order faults of the cluster's workers (`faults/sitecustomize.py`)."""
    return tmp_path_factory.mktemp("ordered")


@pytest.fixture(scope="session")
def make_home(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Path, pytest.MonkeyPatch], Path]:
    """Return what makes `home` in a folder the state folder, with all else in its place.

    MLflow's tables are there: making them takes more than a second.
    """
    from mlflow import MlflowClient

    empty = tmp_path_factory.mktemp("tables") / "mlflow.db"
    MlflowClient(f"sqlite:///{empty}").search_experiments(max_results=1)

    def make(folder: Path, patch: pytest.MonkeyPatch) -> Path:
        home = folder / "home"
        home.mkdir()
        shutil.copy(empty, home)
        patch.setenv("KNET_HOME", str(home))
        for name in ("KNET_STORAGE", "KNET_DATA", "KNET_CACHE", "MLFLOW_TRACKING_URI"):
            patch.delenv(name, raising=False)
        return home

    return make


class Process:
    """A server in a process group of its own, which ends with this process, however that ends.

    Args:
        command: Becomes the server.
        log: Takes what it says.
        answers: Address that answers once it is ready; None: whoever needs it finds out.
        user: Account that it runs under.
        cwd: Its working folder.
    """

    def __init__(
        self,
        command: Sequence[object],
        log: Path,
        answers: str | None = None,
        *,
        env: Mapping[str, str] | None = None,
        user: str | None = None,
        cwd: Path | None = None,
    ) -> None:
        # Nobody writes into the pipe: it ends when this process does.
        guarded = 'exec 3<&0; (cat <&3; kill -9 0) & exec "$@" </dev/null 3<&-'
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                ["sh", "-c", guarded, "sh", *map(str, command)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=env,
                user=user,
                cwd=cwd,
                start_new_session=True,
            )
        if answers is not None:
            self._await_answer(answers, log)

    def _await_answer(self, address: str, log: Path) -> None:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(address, timeout=1):
                    return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.kill()
                    raise AssertionError(log.read_text()[-2000:]) from None
                time.sleep(0.05)  # nothing tells when a server of its own process listens

    def stop(self) -> None:
        """Let it end in its own way, at once."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(30)
        self.kill()

    def kill(self) -> None:
        """End it and its workers as a power cut would."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)
        assert self._process.stdin is not None
        self._process.stdin.close()


@pytest.fixture(scope="session")
def start_process() -> Callable[..., Process]:
    """Return what starts a server; see `Process`."""
    return Process


@pytest.fixture(scope="session")
def reserve_port() -> Iterator[Callable[[], int]]:
    """Return what chooses a port for a server that listens later, and perhaps again.

    A socket stays bound to it. So the system gives it to nobody who asks for any port, also while
    the server starts, and the server, which asks for this one, may listen beside it.
    """
    with ExitStack() as held:

        def reserve() -> int:
            place = held.enter_context(socket.socket())
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind(("", 0))
            return int(place.getsockname()[1])

        yield reserve


@pytest.fixture(scope="session")
def s3_environment(
    tmp_path_factory: pytest.TempPathFactory, reserve_port: Callable[[], int]
) -> Iterator[dict[str, str]]:
    """Variables that lead to an S3 endpoint: moto's, in a process of its own.

    None where `KNET_TEST_S3=s3://bucket/prefix` names another, with the credentials in use.
    """
    if "KNET_TEST_S3" in os.environ:
        yield {}
        return
    import boto3

    address = f"http://127.0.0.1:{(port := reserve_port())}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", port]
    server = Process(command, tmp_path_factory.mktemp("s3") / "log", f"{address}/moto-api/")
    account = {"id": "test", "secret": "test-secret", "region": "us-east-1"}
    boto3.client(
        "s3",
        endpoint_url=address,
        region_name=account["region"],
        aws_access_key_id=account["id"],
        aws_secret_access_key=account["secret"],
    ).create_bucket(Bucket="knet-test")
    yield {
        "AWS_ACCESS_KEY_ID": account["id"],
        "AWS_SECRET_ACCESS_KEY": account["secret"],
        "AWS_DEFAULT_REGION": account["region"],
        "AWS_ENDPOINT_URL": address,
    }
    server.kill()


@pytest.fixture(scope="session")
def bucket(s3_environment: dict[str, str]) -> str:
    """A prefix in a bucket there."""
    return os.environ.get("KNET_TEST_S3", "s3://knet-test/some/prefix")


@pytest.fixture
def s3_uri(bucket: str, s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The same, for this process."""
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    return bucket


@pytest.fixture(scope="session")
def cluster(faults: Path, s3_environment: dict[str, str]) -> Iterator["Cluster"]:
    """A Ray cluster on this machine, connected to; its processes know the S3 endpoint."""
    from knet_platform.cluster import prepare_environment, worker_environment

    prepare_environment()
    os.environ["KNET_TEST_FAULTS"] = str(faults)
    searched = [str(Path(__file__).parent / "faults"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, searched))
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
            "include_log_monitor": False,  # nobody reads it
            "env_vars": s3_environment,
            "_system_config": {
                "metrics_report_interval_ms": 2000,  # nobody wants to wait 10 s for a number
                "prestart_worker_first_driver": False,  # sweeps' processes are forked
            },
        },
    )
    ray.init(
        cluster.address,
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env=worker_environment(gpus=False),
    )
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="session")
def ray_cluster(cluster: "Cluster") -> str:
    """The same; gives its dashboard's address."""
    return f"http://{cluster.webui_url}"


@pytest.fixture
def add_nodes(cluster: "Cluster") -> Iterator[Callable[..., dict[str, Any]]]:
    """Return what adds nodes to the cluster and gives them by id; they go when the test ends."""
    added: list[Any] = []

    def add(count: int, **options: Any) -> dict[str, Any]:
        new = [cluster.add_node(include_log_monitor=False, **options) for _ in range(count)]
        added.extend(new)
        return {node.node_id: node for node in new}

    yield add
    for node in added:
        if node in cluster.worker_nodes:
            cluster.remove_node(node, allow_graceful=False)


@pytest.fixture(scope="session")
def store_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of one MLflow store for all tests: making its tables takes seconds."""
    return tmp_path_factory.mktemp("store")


class Server:
    """A real `mlflow server` over that store."""

    def __init__(self, folder: Path, port: int) -> None:
        # Another database and bucket may be given: what is tested is the same.
        self.store = os.environ.get("KNET_TEST_MLFLOW_STORE", f"sqlite:///{folder}/mlflow.db")
        self._artifacts = os.environ.get("KNET_TEST_MLFLOW_ARTIFACTS", f"{folder}/served")
        self._log = folder / "server.log"
        self._port = port
        self.uri = f"http://127.0.0.1:{port}"
        self.process: Process | None = None

    def start(self) -> None:
        from knet_platform.cli.ui import server_command

        command = server_command(self.store, self._port)
        self.process = Process(
            [*command, "--artifacts-destination", self._artifacts],
            self._log,
            f"{self.uri}/health",
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )

    def kill(self) -> None:
        """End it and its workers as a power cut would."""
        if self.process is not None:
            self.process.kill()
            self.process = None


@pytest.fixture(scope="session")
def server(store_folder: Path, reserve_port: Callable[[], int]) -> Iterator[Server]:
    """MLflow's server on that store."""
    server = Server(store_folder, reserve_port())
    server.start()
    yield server
    server.kill()


@pytest.fixture
def published_weights() -> dict[str, Any]:
    """Random weights of a tiny instance K-Net by their published names (KNET_SPEC 9.2).

    timm's test_resnet, 32 channels, 10 kernels, 2 updates with 64 hidden channels, 2 classes.
    """
    import timm
    import torch

    generator = torch.Generator().manual_seed(0)
    trunk = timm.create_model("test_resnet", features_only=True, out_indices=(-4, -3, -2, -1))
    weights = {}
    for name, value in trunk.state_dict().items():  # its stem is ResNet-C's
        name = re.sub(r"^conv1\.", "stem.", re.sub(r"^bn1\.", "stem.7.", name))
        weights[f"backbone.{name}"] = value

    def add(name: str, *shape: int, bias: bool = True) -> None:
        weights[f"{name}.weight"] = torch.randn(*shape, generator=generator) * 0.1
        if bias:
            weights[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.1

    def add_unit(name: str, kernel: int) -> None:
        add(f"{name}.conv", 32, 32, kernel, kernel, bias=False)
        add(f"{name}.gn", 32)

    for level, width in enumerate(trunk.feature_info.channels()):
        add(f"neck.lateral_convs.{level}.conv", 32, width, 1, 1)
        add(f"neck.fpn_convs.{level}.conv", 32, 32, 3, 3)
    head = "rpn_head.localization_fpn"
    for place in ("0.conv0", "1.conv0", "2.conv0", "2.conv1", "3.conv0", "3.conv1", "3.conv2"):
        add_unit(f"{head}.convs_all_levels.{place}", 3)
    for name in (f"{head}.conv_pred", f"{head}.aux_convs.0"):
        add_unit(name, 1)
    for name in ("rpn_head.loc_convs.0", "rpn_head.seg_convs.0"):
        add_unit(name, 1)
    add("rpn_head.init_kernels", 10, 32, 1, 1, bias=False)
    add("rpn_head.conv_seg", 2, 32, 1, 1)
    for stage in range(2):
        name = f"roi_head.mask_head.{stage}"
        update = f"{name}.kernel_update_conv"
        add(f"{name}.feat_transform.conv", 32, 32, 1, 1)
        for part in ("dynamic_layer", "input_layer"):
            add(f"{update}.{part}", 64, 32)
        for part in ("input_gate", "update_gate", "fc_layer"):
            add(f"{update}.{part}", 32, 32)
        for part in ("norm_in", "norm_out", "input_norm_in", "input_norm_out", "fc_norm"):
            add(f"{update}.{part}", 32)
        weights[f"{name}.attention.attn.in_proj_weight"] = torch.randn(96, 32) * 0.1
        weights[f"{name}.attention.attn.in_proj_bias"] = torch.zeros(96)
        add(f"{name}.attention.attn.out_proj", 32, 32)
        for part in ("attention_norm", "ffn_norm", "cls_fcs.1", "mask_fcs.1"):
            add(f"{name}.{part}", 32)
        add(f"{name}.ffn.layers.0.0", 64, 32)
        add(f"{name}.ffn.layers.1", 32, 64)
        for part in ("cls_fcs.0", "mask_fcs.0"):
            add(f"{name}.{part}", 32, 32, bias=False)
        add(f"{name}.fc_cls", 2, 32)
        add(f"{name}.fc_mask", 32, 32)
    return weights
