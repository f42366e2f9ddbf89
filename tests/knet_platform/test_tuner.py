"""A whole sweep on a real cluster: real workers, a real MLflow store, one broken arm."""

import io
import json
import math
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from knet_core import Recipe, load_model
from knet_platform import gauges
from knet_platform.cli.main import main
from knet_platform.errors import CapacityError, UsageError
from knet_platform.gauges import ToRay, TrialGauges
from knet_platform.identity import trial_hash
from knet_platform.links import read_links
from knet_platform.planning import load_sweep
from knet_platform.progress import PlainProgress
from knet_platform.storage import Evaluation, Store, TrialResult
from knet_platform.sweep import Sweep
from knet_platform.tracking import MemoryTracker

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TINY = Path(__file__).parents[1] / "tiny_recipe.yaml"
DASHBOARDS = Path(__file__).parents[2] / "dashboards"
DRIVER = Path(__file__).parents[1] / "nvml" / "libnvidia-ml.c"
RECIPE = f"""\
base: {TINY}
train: {{iterations: 6, batch_size: 4, log_every: 1, eval_every: 3}}
"""
SWEEP = """\
# Rounds of kernel update
name: tiny
base: recipe.yaml
metric: {name: val/AP, mode: max}
baseline: "2"
arms:
  "1": {model.stages: 1}
  "2": {model.stages: 2}
resources: {workers: 1}
"""
BUDGET = "budget: {usd: 1000, gpu_hours: 1000}\n"
BROKEN_ARM = "  broken: {model.backbone.checkpoint: FOLDER/damaged.safetensors}\n"


@dataclass(frozen=True)
class Done:
    """A sweep that was run once."""

    folder: Path
    sweep: Sweep
    code: int
    outcome: dict[str, object]
    cluster: str

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def store(self) -> Store:
        return Store(str(self.home / "storage"))

    def runs(self, sweep: str = "tiny") -> dict[str, Run]:
        """MLflow runs by name; fails if a name occurs twice."""
        client = MlflowClient(f"sqlite:///{self.home}/mlflow.db")
        experiment = client.get_experiment_by_name(sweep)
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id])
        named = {run.info.run_name: run for run in runs}
        assert len(named) == len(runs)
        return named


class Prometheus:
    """A real one, which scrapes the cluster and records by our rules."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._began = time.time()

    def ask(self, path: str, **values: object) -> Any:
        """Return an answer's data; fails on what does not parse."""
        address = f"{self._address}/api/v1/{path}?{urllib.parse.urlencode(values)}"
        with urllib.request.urlopen(address, timeout=10) as answer:
            return json.load(answer)["data"]

    def now(self, query: str) -> list[Any]:
        found: list[Any] = self.ask("query", query=query)["result"]
        return found

    def so_far(self, query: str) -> list[Any]:
        """Return what a curve since the beginning shows, as a panel does."""
        span = {"start": self._began, "end": time.time(), "step": 2}
        found: list[Any] = self.ask("query_range", query=query, **span)["result"]
        return found

    @property
    def seconds(self) -> int:
        return math.ceil(time.time() - self._began)

    def wait_for(self, query: str) -> list[Any]:
        """Return what a query finds, as soon as it does; reports and scrapes take seconds."""
        deadline = time.monotonic() + 60
        while not (found := self.now(query)):
            assert time.monotonic() < deadline, query
            time.sleep(0.2)  # Prometheus tells nobody when it has scraped
        return found


@pytest.fixture(scope="module")
def prometheus(
    ray_cluster: str,
    tmp_path_factory: pytest.TempPathFactory,
    start_process: Callable[..., Any],
    reserve_port: Callable[[], int],
) -> Iterator[Prometheus]:
    program = shutil.which("prometheus")
    assert program, "no prometheus: apt-get install prometheus"
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((DASHBOARDS / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "2s", "evaluation_interval": "2s"}
    config["rule_files"] = [str(DASHBOARDS / "prometheus" / "rules.yml")]
    (discovery,) = config["scrape_configs"][0]["http_sd_configs"]
    del discovery["authorization"]  # this cluster has no token
    discovery["refresh_interval"] = "1s"
    discovery["url"] = discovery["url"].replace("http://127.0.0.1:8265", ray_cluster)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{reserve_port()}"
    command = [program, f"--config.file={folder}/prometheus.yml"]
    command += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address={address}"]
    server = start_process(command, folder / "log", f"http://{address}/-/ready")
    yield Prometheus(f"http://{address}")
    server.kill()


@pytest.fixture(scope="module")
def done(
    ray_cluster: str,
    prometheus: Prometheus,
    faults: Path,
    make_home: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Done]:
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "tiny.yaml").write_text(SWEEP)
    (folder / "damaged.safetensors").write_bytes(b"no weights")
    broken = BROKEN_ARM.replace("FOLDER", str(folder))
    (folder / "broken.yaml").write_text(
        SWEEP.replace("resources:", broken + "resources:") + BUDGET
    )
    sweep = load_sweep(folder / "tiny.yaml")
    for trial in sweep.trials:  # Prometheus is to see them several times
        (faults / trial.hash).mkdir()
        (faults / trial.hash / "pause").write_text("1")
    with pytest.MonkeyPatch.context() as patch:
        make_home(folder, patch)
        patch.setattr(gauges, "REPEAT_SECONDS", 0.25)  # as the cluster's processes hurry, too
        with redirect_stdout(io.StringIO()) as output:
            code = main(["run", str(folder / "broken.yaml"), "--json"])
        outcome = json.loads(output.getvalue())
        yield Done(folder=folder, sweep=sweep, code=code, outcome=outcome, cluster=ray_cluster)


def panels() -> dict[str, dict[str, Any]]:
    """Every panel of every dashboard."""
    files = sorted((DASHBOARDS / "grafana" / "dashboards").glob("*.json"))
    boards = [json.loads(file.read_text()) for file in files]
    return {f"{board['title']}: {p['title']}": p for board in boards for p in board["panels"]}


def filled(query: str, variables: dict[str, str]) -> str:
    """Put in a dashboard's variables as Grafana does."""
    for name, value in variables.items():
        escaped = value.replace('"', '\\"')
        query = query.replace(f"${{{name}:doublequote}}", f'"{escaped}"').replace(
            f"${name}", value
        )
    assert "$" not in query
    return query


def test_every_panel_of_the_dashboards_shows_what_the_sweep_measured(
    done: Done, prometheus: Prometheus
) -> None:
    prometheus.wait_for('ray_knet_sweep_trials{sweep="tiny", state="finished"} == 2')
    prometheus.wait_for('ray_knet_sweep_trials{sweep="tiny", state="failed"} == 1')
    prometheus.wait_for("sweep_limit:knet_sweep_budget_used:ratio")
    values = {"sweep": "tiny", "arm": "1", "seed": "0", "__range": f"{prometheus.seconds}s"}
    found, needs_gpu = {}, set()
    for title, panel in panels().items():
        for target in panel["targets"]:
            ask = prometheus.now if target.get("instant") else prometheus.so_far
            found[f"{title} {target['refId']}"] = ask(filled(target["expr"], values))
            if panel["description"].startswith("Needs a GPU"):
                needs_gpu.add(f"{title} {target['refId']}")
    assert len(found) > 40
    assert {title for title, series in found.items() if not series} == needs_gpu

    # Not just anything: what the store has too.
    result = done.store.trial(done.sweep.trials[0].hash).result()
    assert result is not None
    (steps,) = found["K-Net: one trial: Steps A"]
    seen = {value for _, value in steps["values"]}
    assert {"3"} <= seen <= {"3", "6"}  # the last report may be gone before the next scrape
    (evaluated,) = found["K-Net: one trial: Evaluation A"]
    assert float(evaluated["values"][-1][1]) == pytest.approx(result.metrics["val/AP"])
    arms = {item["metric"]["arm"] for item in found["K-Net: sweep: Arms A"]}
    assert arms == {"1", "2"}


def test_every_rule_finds_the_series_that_it_is_made_from(
    done: Done, prometheus: Prometheus
) -> None:
    """No alert fires here, so of alerts it is the series in them that must be there."""
    known = set(prometheus.ask("label/__name__/values"))
    groups = yaml.safe_load((DASHBOARDS / "prometheus" / "rules.yml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    loaded = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
    assert [rule["name"] for rule in loaded] == [r.get("record") or r["alert"] for r in rules]
    assert {rule["health"] for rule in loaded} == {"ok"}, "evaluated without an error"
    empty = {r["record"] for r in rules if "record" in r and not prometheus.so_far(r["record"])}
    # There is no GPU, and only other tests preempt trials, if they had this cluster before.
    without_gpu = {"node:knet_gpus_idle:count"}
    preempted = {"sweep:knet_preemptions:increase6h", "sweep:knet_preemptions:rate6h"}
    assert without_gpu <= empty <= without_gpu | preempted
    used = {
        name for rule in rules for name in re.findall(r"\bray_\w+|\b\w+:\w+:\w+", rule["expr"])
    }
    missing = {"ray_knet_sweep_retries_total", "ray_node_gpus_utilization"} | empty
    assert used - known <= missing


def test_what_needs_a_gpu_is_shown_where_there_is_one(
    done: Done,
    prometheus: Prometheus,
    add_nodes: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    """Of a node whose driver is a stand-in, and of a trial that reports as on a GPU.

    After the tests above, which find that there is none.
    """
    library = ["cc", "-shared", "-fPIC", "-o", str(tmp_path / "libnvidia-ml.so.1"), str(DRIVER)]
    subprocess.run(library, check=True)
    add_nodes(1, num_cpus=0, num_gpus=1, env_vars={"LD_LIBRARY_PATH": str(tmp_path)})
    trial = replace(done.sweep.trials[0], sweep="on_gpu")
    measured = {"sys/gpu_memory_gb": 2.5, "sys/gpu_utilization": 0.75}
    report = {"step": 1, "total": 6, "points": [{"metrics": measured}]}
    values = {"sweep": trial.sweep, "arm": trial.arm, "seed": str(trial.seed), "__range": "60s"}
    with closing(ToRay()) as record:
        TrialGauges(trial, 1, record).reported(report, saved=False)
        found = {
            f"{title} {target['refId']}": prometheus.wait_for(filled(target["expr"], values))
            for title, panel in panels().items()
            for target in panel["targets"]
            if panel["description"].startswith("Needs a GPU")
        }
    shown = {
        title: [float(item["value"][1]) for item in series] for title, series in found.items()
    }
    assert shown == {
        "K-Net: one trial: GPU memory A": [2.5e9],
        "K-Net: one trial: GPU busy A": [0.75],
        "K-Net: cluster and cost: GPUs held by trials A": [0],
        "K-Net: cluster and cost: GPUs held by trials B": [1],
        "K-Net: cluster and cost: GPUs busy A": [37],
        "K-Net: cluster and cost: GPUs held and idle A": [0],
        "K-Net: cluster and cost: GPU memory in use A": [3 * 2**30],
        "K-Net: data pipeline: GPU busy A": [0.75],
    }


def test_a_label_with_quotes_and_html_arrives_as_it_is(done: Done, prometheus: Prometheus) -> None:
    odd = {"sweep": 'a "b" <c>', "arm": "x\\y\n", "seed": "0", "metric": "val/AP"}
    with closing(ToRay()) as record:
        record("knet_trial_evaluation", 0.25, odd)
        query = filled("ray_knet_trial_evaluation{sweep=${sweep:doublequote}}", odd)
        (found,) = prometheus.wait_for(query)
    assert {name: found["metric"][name] for name in odd} == odd
    assert found["value"][1] == "0.25"


def test_every_trial_records_what_it_was_made_from(done: Done) -> None:
    for trial in done.sweep.trials:
        provenance = done.store.trial(trial.hash).provenance()
        assert provenance is not None
        recipe = Recipe.from_dict(provenance.recipe)
        assert trial_hash(recipe, provenance.data_fingerprint) == trial.hash
        assert (provenance.workers, provenance.threads) == (1, 1)
        assert provenance.accelerator is None  # this cluster has CPUs only
        run_id = done.runs()[trial.name].info.run_id
        client = MlflowClient(f"sqlite:///{done.home}/mlflow.db")
        files = {item.path for item in client.list_artifacts(run_id)}
        assert "provenance.json" in files
        assert ("patch.diff" in files) == provenance.patch


def test_a_failed_trial_does_not_stop_the_others(done: Done) -> None:
    assert done.code == 3
    assert [trial["arm"] for trial in done.outcome["finished"]] == ["1", "2"]
    (failed,) = done.outcome["failed"]
    assert failed["arm"] == "broken"
    assert "damaged.safetensors" in failed["reason"]
    failure = done.store.trial(failed["trial_hash"]).failure()
    assert failure is not None
    assert failure.message == failed["reason"]
    assert (failure.cause, failure.action) == ("configuration", "stopped the arm")
    assert failure.attempt == 1  # what explains itself is not tried again
    run = done.runs()["broken/0"]
    assert run.info.status == "FAILED"
    assert run.data.tags["status_reason"] == failed["reason"]


def test_every_finished_trial_has_one_finished_run_with_its_curves(done: Done) -> None:
    runs = done.runs()
    assert set(runs) == {"tiny", "1/0", "2/0", "broken/0"}
    for trial in done.sweep.trials:
        run = runs[trial.name]
        assert run.info.status == "FINISHED"
        assert run.data.tags["trial_hash"] == trial.hash
        assert run.data.tags["attempt"] == "1"
        client = MlflowClient(f"sqlite:///{done.home}/mlflow.db")
        history = client.get_metric_history(run.info.run_id, "train/loss")
        assert [item.step for item in history] == [1, 2, 3, 4, 5, 6]
        assert all(math.isfinite(item.value) for item in history)
        steps = [item.step for item in client.get_metric_history(run.info.run_id, "val/AP")]
        assert steps == [3, 6]
        assert {"bench/fps", "sys/gpu_hours"} <= set(run.data.metrics)


def test_results_checkpoints_and_pictures_are_in_the_store(done: Done) -> None:
    for trial in done.sweep.trials:
        store = done.store.trial(trial.hash)
        result = store.result()
        assert result is not None
        assert (result.step, result.workers, result.device) == (6, 1, "cpu")
        assert result.metrics["sys/host_memory_gb"] > 0.1  # what a plan counts with
        assert [point.step for point in result.evaluations] == [3, 6]
        model = load_model(done.home / "storage" / "trials" / trial.hash / result.checkpoint)
        assert model.num_classes == 6
        assert store.list("pictures") == [
            *("kernels_000006.png", "kernels_000006.webp"),
            *("stages_000006.png", "stages_000006.webp"),
            *("step_000003.png", "step_000003.webp", "step_000006.png", "step_000006.webp"),
        ]
    assert (done.home / "reports" / "tiny" / "table.md").is_file()


def test_a_finished_sweep_is_not_run_again(done: Done, capsys: pytest.CaptureFixture[str]) -> None:
    before = {trial.hash: done.store.trial(trial.hash).result() for trial in done.sweep.trials}
    assert main(["run", str(done.folder / "tiny.yaml")]) == 0
    captured = capsys.readouterr()
    assert "starting" not in captured.err
    assert "2 (baseline)" in captured.out
    assert "knet ui" in captured.out
    parent, compared = read_links(done.store, "tiny")
    runs = done.runs()
    assert parent.url.endswith(f"/runs/{runs['tiny'].info.run_id}")
    assert runs["1/0"].info.run_id in compared.url
    for link in (parent, compared):
        assert f"MLflow, {link.name}: {link.url}" in captured.out
    after = {trial.hash: done.store.trial(trial.hash).result() for trial in done.sweep.trials}
    assert before == after
    assert set(done.runs()) == {"tiny", "1/0", "2/0", "broken/0"}


def test_a_lost_tracking_store_is_brought_up_to_date(done: Done) -> None:
    from knet_platform.tuner import run_sweep

    tracker = MemoryTracker()
    progress = PlainProgress(done.sweep, finished=2)
    run_sweep(done.sweep, done.store, tracker, progress, home=done.home)
    for trial in done.sweep.trials:
        assert tracker.status(trial.hash) == "FINISHED"
        assert set(tracker.runs[trial.hash].curves["val/AP"]) == {3, 6}


def test_submit_runs_the_sweep_as_a_job_and_ends_as_it_ends(
    done: Done, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(done.folder)
    monkeypatch.setenv("RAY_ADDRESS", done.cluster)
    assert main(["submit", "tiny.yaml"]) == 0
    captured = capsys.readouterr()
    assert "2 (baseline)" in captured.out
    job = captured.err.splitlines()[0].removeprefix("job ")
    assert main(["status", "--json"]) == 0
    latest = json.loads(capsys.readouterr().out)[0]
    assert (latest["job"], latest["sweep"], latest["exit_code"]) == (job, "tiny", 0)
    # The log of a job that has ended ends, too, and so does who follows it.
    assert main(["logs", "-f", "tiny"]) == 0
    assert "2 (baseline)" in capsys.readouterr().out
    assert main(["cancel", job]) == 0
    assert capsys.readouterr().out == f"job {job}: had ended already\n"


def test_series_go_with_the_attempt_and_the_sweep(done: Done, prometheus: Prometheus) -> None:
    """So Prometheus sees the trials that run, however many have ended."""
    for name in ("ray_knet_trial_step", "ray_knet_trial_evaluation", "ray_knet_sweep_trials"):
        assert prometheus.so_far(f'{name}{{sweep="tiny"}}')
        prometheus.wait_for(f'absent({name}{{sweep="tiny"}})')


def test_the_cluster_is_examined_node_by_node(
    done: Done, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a job, which asks on the head; gloo adds up in two processes of the one node."""
    monkeypatch.chdir(done.folder)
    monkeypatch.setenv("RAY_ADDRESS", done.cluster)
    assert main(["doctor", "--cluster", "--json"]) == 0
    printed = capsys.readouterr().out
    listed, _ = json.JSONDecoder().raw_decode(printed, printed.index("[\n"))
    checks = {check["name"]: check for check in listed}
    expected = ("nodes", "versions", "GPUs", "store", "clocks", "all-reduce (gloo)")
    assert {name: checks[name]["status"] for name in expected} == dict.fromkeys(expected, "ok")
    assert "GiB free" in checks["caches"]["found"]
    assert "2 ranks on 1 nodes" in checks["all-reduce (gloo)"]["found"]
    assert not list((done.home / "storage" / "doctor").iterdir())


def test_only_failed_trials_are_retried(
    done: Done, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A trial that was never run stays so; the failed one is run, and fails again."""
    broken = done.folder / "broken.yaml"
    text = broken.read_text().replace("resources:", "  new: {model.stages: 3}\nresources:")
    (done.folder / "retried.yaml").write_text(text)
    assert main(["retry", "--failed", str(done.folder / "retried.yaml"), "--json"]) == 3
    captured = capsys.readouterr()
    outcome = json.loads(captured.out)
    assert [trial["arm"] for trial in outcome["failed"]] == ["broken"]
    assert "broken/0  starting, attempt 2" in captured.err
    assert "2 of 4 trials were finished before and are not run again" in captured.err
    assert "new/0" not in captured.err


def test_a_trial_that_is_told_to_stop_saves_and_goes_on_later(
    done: Done, faults: Path, finished: Callable[..., TrialResult]
) -> None:
    """The screen compares it with a run that was good at once, so it is pruned.

    It is slow enough to hear of that before its end.
    """
    path = done.folder / "told.yaml"
    screen = "scheduler: {name: asha, grace: 0.2, reduction_factor: 2}\n"
    arms = 'arms:\n  "2": {}\n  hopeless: {model.stages: 1, optim.lr: 1.0e-12}\n'
    head = SWEEP.partition("arms:")[0].replace("name: tiny", "name: told")
    path.write_text(head + arms + screen)
    long = ["train.iterations=40", "train.eval_every=10", "train.log_every=5"]
    good, hopeless = (trial.hash for trial in load_sweep(path, overrides=long).trials)
    best = Evaluation(step=10, time=0.0, metrics={"val/AP": 1.0})
    done.store.trial(good).write_result(finished(good, step=40, evaluations=(best,)))
    store = done.store.trial(hopeless)
    pause = faults / hopeless / "pause"
    pause.parent.mkdir()
    pause.write_text("0.5")

    assert main(["run", str(path), *long]) == 0
    pruned, state = store.pruned(), store.state()
    assert pruned is not None
    assert pruned.step == 10
    assert state is not None  # it saved when it was stopped
    assert 10 <= state.step < 40
    assert store.result() is None

    pause.write_text("0")
    path.write_text(head + arms)
    assert main(["run", str(path), *long]) == 0
    result = store.result()
    assert result is not None
    assert result.step == 40
    run = done.runs("told")["hopeless/0"]
    assert run.data.tags["attempt"] == "2"
    client = MlflowClient(f"sqlite:///{done.home}/mlflow.db")
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [point.step for point in history] == list(range(5, 41, 5))


def test_a_cluster_too_small_for_one_trial_is_refused(done: Done) -> None:
    from knet_platform.cluster import trial_slots

    resources = replace(done.sweep.resources, workers=2)
    assert trial_slots(resources) == 2
    with pytest.raises(CapacityError, match=r"needs 2 workers of 1 CPU \+ 1 GPU.*4 CPU"):
        trial_slots(replace(resources, gpus_per_worker=1))


def test_a_second_run_of_the_same_sweep_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    from knet_platform.locks import sweep_lock

    with (
        sweep_lock("tiny", tmp_path),
        pytest.raises(UsageError, match=f"process {os.getpid()} on {socket.gethostname()}"),
        sweep_lock("tiny", tmp_path),
    ):
        pass
    with sweep_lock("other", tmp_path), sweep_lock("tiny", tmp_path):
        pass
