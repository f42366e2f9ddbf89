"""The README's job on real heads with token authentication; its driver dies, then a head.

Faults are ordered as in `test_faults`: what hangs in the middle of an epoch can be killed there.
"""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from mlflow import MlflowClient
from ray.job_submission import JobDetails, JobSubmissionClient

from knet_platform.planning import load_sweep
from knet_platform.storage import Store, TrialStore

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
SCALE = "tests/end_to_end/tiny.yaml"
SWEEP = f"""\
#!/usr/bin/env -S knet run
name: killed
base: {ROOT}/sweeps/recipes/knet_r50_instance_1x.yaml
metric: {{name: val/AP, mode: max}}
baseline: before
arms:
  first: {{model.stages: 1, eval.max_detections: 99}}
  before: {{model.stages: 1}}
"""
"""More detections than pairs of kernels and classes: a trial of its own, trained alike."""


@dataclass(frozen=True)
class Head:
    address: str
    token: str
    env: dict[str, str]

    def submit(self, log: Path, sweep: Path) -> subprocess.Popen[bytes]:
        job = [str(sweep), "--scale", SCALE]
        command = ["ray", "job", "submit", "--working-dir", ".", "--", *job]
        with log.open("w") as output:
            return subprocess.Popen(
                command, cwd=ROOT, env=self.env, stdout=output, stderr=subprocess.STDOUT
            )

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def jobs(self) -> list[JobDetails]:
        return JobSubmissionClient(self.address, headers=self.headers).list_jobs()

    def answers(self) -> bool:
        try:
            self.jobs()
        except (ConnectionError, RuntimeError):  # nobody listens, or its parts are not yet there
            return False
        return True

    def driver_pid(self) -> int:
        (running,) = [job for job in self.jobs() if job.status == "RUNNING"]
        assert running.driver_info is not None
        return int(running.driver_info.pid)


@contextmanager
def started_head(folder: Path, reserve_port: Callable[[], int]) -> Iterator[Head]:
    """Start a head; in the end it is killed with everything but the jobs' drivers."""
    dashboard, agent, client = (str(reserve_port()) for _ in range(3))
    token = secrets.token_hex(32)
    unset = {"RAY_ADDRESS", "MLFLOW_TRACKING_URI", "KNET_STORAGE", "KNET_DATA"}
    searched = [str(ROOT / "tests" / "faults"), os.environ.get("PYTHONPATH", "")]
    env = {name: value for name, value in os.environ.items() if name not in unset} | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, searched)),
        "KNET_TEST_FAULTS": str(folder / "faults"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "KNET_HOME": str(folder / "home"),
        "OMP_NUM_THREADS": "1",
        "RAY_prestart_worker_first_driver": "0",  # sweeps' processes are forked
    }
    session = Path(f"/tmp/knet-{token[:8]}")  # unix sockets need a short path
    command = ["ray", "start", "--head", "--block", "--num-cpus", "2", "--port", "0"]
    command += ["--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1"]
    command += ["--dashboard-port", dashboard, "--dashboard-agent-listen-port", agent]
    command += ["--ray-client-server-port", client, "--temp-dir", str(session)]
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(
            command, env=env, stdout=log, stderr=log, start_new_session=True
        )
    head = Head(address=env["RAY_API_SERVER_ADDRESS"], token=token, env=env)
    try:
        while not head.answers():
            assert process.poll() is None, (folder / "head.log").read_text()
            sleep(0.1)
        yield head
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def hung_in_mid_epoch(head: Head, log: Path, sweep: Path, fault: Path, step: int) -> Iterator[int]:
    """Submit the sweep, and give its driver's process once the trial hangs; kill it in the end."""
    fault.parent.mkdir(parents=True, exist_ok=True)
    fault.write_text(str(step))
    process = head.submit(log, sweep)
    while fault.exists():
        assert process.poll() is None, log.read_text()
        sleep(0.1)
    driver = head.driver_pid()
    yield driver
    os.kill(driver, signal.SIGKILL)
    process.kill()
    process.wait()


def refuse_strangers(head: Head) -> None:
    """Submit without a token and with another one: one line each, and no job; nor metrics."""
    command = ["knet", "submit", "sweeps/stages.yaml", "--scale", SCALE]
    strangers = ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": secrets.token_hex(32)})
    started = [
        subprocess.Popen(command, cwd=ROOT, env=head.env | each, stderr=subprocess.PIPE, text=True)
        for each in strangers
    ]
    for process in started:
        (line,) = process.communicate()[1].splitlines()
        assert process.returncode == 2
        assert line.startswith(f"error: RAY_AUTH_TOKEN: {head.address} refuses the token (")
        assert head.token not in line
    assert head.jobs() == []

    discovery = f"{head.address}/api/prometheus/sd"
    with pytest.raises(HTTPError, match="401"):
        urlopen(discovery)
    with urlopen(Request(discovery, headers=head.headers)) as answer:  # as Prometheus asks
        assert json.load(answer)[0]["labels"] == {"job": "ray"}


def learnt(store: TrialStore) -> dict[str, float]:
    """Return what a finished trial measured of its model, to the last bit."""
    result = store.result()
    assert result is not None
    timed = ("sys/", "bench/")
    return {name: value for name, value in result.metrics.items() if not name.startswith(timed)}


def test_a_killed_sweep_is_finished_by_the_same_command(
    tmp_path: Path, reserve_port: Callable[[], int]
) -> None:
    home, log = tmp_path / "home", tmp_path / "job.log"
    path = tmp_path / "killed.yaml"
    path.write_text(SWEEP)
    path.chmod(0o755)  # as the project's own sweeps are
    sweep = load_sweep(path, scale=str(ROOT / SCALE))
    store = Store(str(home / "storage"))
    hashes = {trial.arm: trial.hash for trial in sweep.trials}
    before, first = (store.trial(hashes[arm]) for arm in ("before", "first"))
    fault = tmp_path / "faults" / hashes["first"] / "hang"

    # The baseline comes first. An epoch has 4 steps, and the checkpoint is that of step 6.
    with ExitStack() as job, started_head(tmp_path, reserve_port) as head:
        with hung_in_mid_epoch(head, log, path, fault, 7):
            finished = before.result()
            assert finished is not None
            while first.status() != "partial":  # uploads are beside the training
                sleep(0.1)
        # A job has a session of its own and outlives its head; a machine would take it along.
        job.enter_context(hung_in_mid_epoch(head, log, path, fault, 9))
    assert first.status() == "partial"

    with started_head(tmp_path, reserve_port) as head:
        refuse_strangers(head)
        assert head.submit(log, path).wait() == 0, log.read_text()
        output = log.read_text()
    assert "(baseline)" in output
    assert "knet ui" in output
    assert not re.search(r"^Trial |Last result", output, re.MULTILINE)  # Tune's own progress

    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    experiment = client.get_experiment_by_name("killed")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(str(run.info.run_name) for run in runs) == ["before/0", "first/0", "killed"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    by_hash = {run.data.tags["trial_hash"]: run for run in runs if "trial_hash" in run.data.tags}
    for arm, trial_hash in hashes.items():
        history = client.get_metric_history(by_hash[trial_hash].info.run_id, "train/loss")
        steps = [point.step for point in history]
        # What a killed process was told and had not passed on dies with it; nothing comes twice.
        lost = set(range(1, 7)) if arm == "first" else set()
        assert len(steps) == len(set(steps))
        assert set(range(1, 13)) - lost <= set(steps) <= set(range(1, 13))
        evaluated = client.get_metric_history(by_hash[trial_hash].info.run_id, "val/AP")
        assert [point.step for point in evaluated] == [6, 12]

    # What was finished is not run again, and what was killed ends as if it had not been.
    assert before.result() == finished
    assert "before/0  starting" not in output
    assert learnt(first) == learnt(before)
