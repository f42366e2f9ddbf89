"""The README's literal job on a real head with token authentication, killed half-way."""

import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient
from ray.job_submission import JobSubmissionClient

from knet_platform.planning import load_sweep
from knet_platform.storage import Store

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
SWEEP = "sweeps/stages.yaml"
SCALE = "tests/end_to_end/tiny.yaml"


@dataclass(frozen=True)
class Head:
    address: str
    token: str
    env: dict[str, str]
    home: Path

    def submit(self) -> subprocess.Popen[str]:
        command = ["ray", "job", "submit", "--working-dir", ".", "--", SWEEP, "--scale", SCALE]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=self.env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def driver_pid(self) -> int:
        headers = {"Authorization": f"Bearer {self.token}"}
        jobs = JobSubmissionClient(self.address, headers=headers).list_jobs()
        (running,) = [job for job in jobs if job.status == "RUNNING"]
        assert running.driver_info is not None
        return int(running.driver_info.pid)


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    sockets = [socket.socket() for _ in range(3)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    dashboard, agent, client = (str(each.getsockname()[1]) for each in sockets)
    for each in sockets:
        each.close()
    token = secrets.token_hex(32)
    home = tmp_path / "home"
    unset = {"RAY_ADDRESS", "MLFLOW_TRACKING_URI", "KNET_STORAGE", "KNET_DATA"}
    env = {name: value for name, value in os.environ.items() if name not in unset} | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "KNET_HOME": str(home),
        "OMP_NUM_THREADS": "1",
    }
    session = Path(f"/tmp/knet-test-{os.getpid()}")  # unix sockets need a short path
    command = ["ray", "start", "--head", "--block", "--num-cpus", "2", "--port", "0"]
    command += ["--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1"]
    command += ["--dashboard-port", dashboard, "--dashboard-agent-listen-port", agent]
    command += ["--ray-client-server-port", client, "--temp-dir", str(session)]
    with (tmp_path / "head.log").open("w") as log:
        process = subprocess.Popen(
            command, env=env, stdout=log, stderr=log, start_new_session=True
        )
    try:
        while subprocess.run(["ray", "job", "list"], env=env, capture_output=True).returncode:
            assert process.poll() is None, (tmp_path / "head.log").read_text()
        yield Head(address=env["RAY_API_SERVER_ADDRESS"], token=token, env=env, home=home)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_killed_sweep_is_finished_by_the_same_command(head: Head) -> None:
    with head.submit() as first:
        assert first.stdout is not None
        seen = []
        killed = False
        for line in first.stdout:
            seen.append(line)
            if "(1/5 trials)" in line and not killed:  # Ray repeats the log of a failed job
                os.kill(head.driver_pid(), signal.SIGKILL)
                killed = True
    assert killed, "".join(seen)
    assert first.returncode != 0

    sweep = load_sweep(ROOT / SWEEP, scale=str(ROOT / SCALE))
    store = Store(str(head.home / "storage"))
    before = {trial.hash: store.trial(trial.hash).result() for trial in sweep.trials}
    assert 1 <= sum(result is not None for result in before.values()) < 5

    second = head.submit()
    output, _ = second.communicate()
    assert second.returncode == 0, output
    assert "(baseline)" in output
    assert "knet ui" in output

    client = MlflowClient(f"sqlite:///{head.home}/mlflow.db")
    experiment = client.get_experiment_by_name("stages")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(str(run.info.run_name) for run in runs) == [
        "1/0",
        "2/0",
        "3/0",
        "4/0",
        "5/0",
        "stages",
    ]
    assert {run.info.status for run in runs} == {"FINISHED"}
    by_hash = {run.data.tags["trial_hash"]: run for run in runs if "trial_hash" in run.data.tags}
    for trial in sweep.trials:
        result = store.trial(trial.hash).result()
        assert result is not None
        history = client.get_metric_history(by_hash[trial.hash].info.run_id, "train/loss")
        assert [point.step for point in history] == list(range(1, 13))
        if before[trial.hash] is not None:
            assert result == before[trial.hash]
            assert f"{trial.name}  starting" not in output
