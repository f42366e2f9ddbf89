"""A sweep whose nodes die all the time: does all of it finish, as it does undisturbed?

python benchmarks/soak.py [--minutes 20] [--nodes 3] [--share 0.3] [--seed 0]

On one machine: a Ray cluster of a head and `--nodes` nodes, each with room for one trial of one
worker. `knet run` trains a sweep there whose steps take a second; meanwhile, every 20 to 50
seconds, `--share` of the nodes (at least one) are killed as by a power cut, and come back empty
after 5. When the time is over the sweep ends in peace. Afterwards the same recipes are trained in
this process without a cluster, and every metric and weight is compared. The last step before each
death is seen through the tests' fault orders (`tests/faults`), which also make a step last.
Exit code 1 where anything is missing, failed or different.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
STEPS, INTERVAL, STEP_SECONDS = 40, 8, 1.0
AWAY_SECONDS = 5.0
"""Until a node comes back."""
BETWEEN_SECONDS = (20.0, 50.0)
CPUS = 5
"""Of a worker, and of a node; more than the head has."""
TRIALS_PER_MINUTE = 2.5
"""That three nodes manage about, deaths included."""
RECIPE = f"""\
base: {ROOT}/tests/tiny_recipe.yaml
model: {{backbone: {{name: test_resnet}}, stages: 1}}
train: {{iterations: {STEPS}, batch_size: 4, eval_every: {STEPS}, checkpoint_every: {INTERVAL}}}
eval: {{fps_iterations: 0, probe_images: 0}}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """A node died under a trial."""

    seconds: float
    """Since the sweep began."""
    at: float
    """Unix time."""
    trial: str
    trial_hash: str
    last_step: int
    """Steps done when it died."""


class Machines:
    """The cluster, and who dies in it."""

    def __init__(self, nodes: int) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 1, "include_dashboard": True, "dashboard_port": 0}
        self.cluster = Cluster(
            initialize_head=True, head_node_args={**head, "dashboard_agent_listen_port": 0}
        )
        self.nodes = [self._add() for _ in range(nodes)]

    def kill(self, count: int, choice: random.Random) -> set[str]:
        """Kill that many nodes and return their ids."""
        dying = choice.sample(self.nodes, min(count, len(self.nodes)))
        for node in dying:
            # Not `remove_node`, which would need a connection to the cluster.
            node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
            self.cluster.worker_nodes.remove(node)
            self.nodes.remove(node)
        return {node.node_id for node in dying}

    def restore(self, nodes: int) -> None:
        """Bring nodes back, empty."""
        while len(self.nodes) < nodes:
            self.nodes.append(self._add())

    def _add(self) -> Any:
        return self.cluster.add_node(num_cpus=CPUS)


def main() -> int:
    """Run it and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20, help="of deaths (20)")
    parser.add_argument("--nodes", type=int, default=3, help="(3)")
    parser.add_argument("--share", type=float, default=0.3, help="of the nodes that die (0.3)")
    parser.add_argument("--seed", type=int, default=0, help="of when and who (0)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="knet-soak-") as folder:
        return soak(Path(folder), args)


def soak(folder: Path, args: argparse.Namespace) -> int:
    """Run the sweep under fire in `folder`, then compare."""
    count = max(2, round(args.minutes * TRIALS_PER_MINUTE * args.nodes / 3))
    (folder / "recipe.yaml").write_text(RECIPE)
    sweep_file = {
        "name": "soak",
        "base": "recipe.yaml",
        "metric": {"name": "val/AP", "mode": "max"},
        "baseline": "plain",
        "seeds": list(range(count)),
        "resources": {"cpus_per_worker": CPUS},
        "arms": {"plain": {}},
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep_file))
    orders = folder / "orders"
    searched = [ROOT, ROOT / "platform", ROOT / "tests" / "faults"]
    os.environ |= {
        "KNET_HOME": str(folder / "home"),
        "KNET_TEST_FAULTS": str(orders),
        "PYTHONPATH": os.pathsep.join(map(str, searched)),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    }
    for name in ("KNET_STORAGE", "KNET_DATA", "MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
        os.environ.pop(name, None)
    sys.path[:0] = map(str, searched[:2])
    from knet_platform.cluster import prepare_environment
    from knet_platform.planning import load_sweep
    from knet_platform.storage import Store

    prepare_environment()
    sweep = load_sweep(folder / "sweep.yaml")
    for trial in sweep.trials:
        (orders / trial.hash).mkdir(parents=True)
        (orders / trial.hash / "pause").write_text(str(STEP_SECONDS))
    store = Store(str(folder / "home" / "storage"))
    names = {trial.hash: trial.name for trial in sweep.trials}
    hits, deaths, code, seconds = under_fire(folder, orders, store, names, args)

    print(f"{'at':>6}  {'trial':10}  {'step':>4}  {'from':>4}  lost of {INTERVAL} steps")
    lost = []
    for hit in hits:
        failures = store.trial(hit.trial_hash).failures()
        later = (f for f in failures if datetime.fromisoformat(f.at).timestamp() >= hit.at - 1)
        failure = next(later, None)  # none: it died after its last checkpoint
        resumed = failure.step if failure else hit.last_step
        # What was seen last may be the step before the one that a checkpoint has.
        lost.append(max(0, hit.last_step - resumed))
        print(f"{hit.seconds:5.0f}s  {hit.trial:10}  {hit.last_step:4}  {resumed:4}  {lost[-1]:4}")
    attempts = [len(store.trial(h).failures()) + 1 for h in names]
    wrong = compare(sweep, store, folder)
    runs = tracked(folder)
    finished = sum(store.trial(h).result() is not None for h in names)
    print(
        f"{seconds:.0f} s; {deaths} nodes died, {len(hits)} of them under a trial in mid-run; "
        f"{finished} of {count} trials finished in {sum(attempts)} attempts "
        f"(at most {max(attempts)}); MLflow has {runs} runs of trials\n"
        f"lost: {sum(lost) / max(1, len(lost)):.1f} steps a death in the mean, at most "
        f"{max(lost, default=0)}; between two checkpoints lie {INTERVAL}\n"
        f"different from the undisturbed: {', '.join(wrong) or 'none'}"
    )
    good = code == 0 and not wrong and finished == runs == count
    return 0 if good and max(lost, default=0) <= INTERVAL else 1


def under_fire(
    folder: Path, orders: Path, store: Any, names: dict[str, str], args: argparse.Namespace
) -> tuple[list[Hit], int, int, float]:
    """Return which trials were hit, how many nodes died, and the sweep's exit code and seconds."""
    choice, machines = random.Random(args.seed), Machines(args.nodes)
    dying = max(1, round(args.share * args.nodes))
    hits: list[Hit] = []
    deaths = 0
    command = [sys.executable, "-m", "knet_platform.cli.main", "run", str(folder / "sweep.yaml")]
    environment = {**os.environ, "RAY_ADDRESS": machines.cluster.address}
    began = time.monotonic()
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as running,
    ):
        try:
            while time.monotonic() - began < args.minutes * 60 and running.poll() is None:
                pause(choice.uniform(*BETWEEN_SECONDS), running)
                if running.poll() is not None:
                    break
                seconds, at = time.monotonic() - began, time.time()
                dead = machines.kill(dying, choice)
                deaths += len(dead)
                for trial_hash, name in names.items():
                    file = orders / trial_hash / "place"
                    place = file.read_text().split() if file.exists() else []
                    in_mid_run = place and place[0] in dead
                    if in_mid_run and store.trial(trial_hash).result() is None:
                        hits.append(
                            Hit(
                                seconds=seconds,
                                at=at,
                                trial=name,
                                trial_hash=trial_hash,
                                last_step=int(place[1]),
                            )
                        )
                pause(AWAY_SECONDS, running)
                machines.restore(args.nodes)
            code = running.wait()
        finally:
            running.kill()
            machines.cluster.shutdown()
    seconds = time.monotonic() - began
    print("\n".join((folder / "log").read_text().splitlines()[-3:]))
    return hits, deaths, code, seconds


def pause(seconds: float, running: subprocess.Popen[bytes]) -> None:
    """Wait, unless the sweep ends before."""
    try:
        running.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def compare(sweep: Any, store: Any, folder: Path) -> list[str]:
    """Return the trials whose metrics or weights differ from a run in this process."""
    import torch

    from knet_core import fit

    torch.set_num_threads(1)
    wrong = []
    weights = f"checkpoint_{STEPS}/model.safetensors"
    for trial in sweep.trials:
        place = folder / "alone" / trial.hash
        alone = fit(trial.recipe, output_dir=place)
        result = store.trial(trial.hash).result()
        same = (
            result is not None
            and all(
                result.metrics[name] == value
                for name, value in alone.metrics.items()
                if name.startswith("val/")
            )
            and store.trial(trial.hash).read_bytes(weights) == (place / weights).read_bytes()
        )
        wrong += [] if same else [trial.name]
    return wrong


def tracked(folder: Path) -> int:
    """Return how many runs of trials MLflow has; several of one trial, or one not ended: -1."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/home/mlflow.db")
    experiment = client.get_experiment_by_name("soak")
    assert experiment is not None
    runs = [
        run
        for run in client.search_runs([experiment.experiment_id], max_results=1000)
        if "trial_hash" in run.data.tags
    ]
    once = len({run.data.tags["trial_hash"] for run in runs}) == len(runs)
    return len(runs) if once and all(r.info.status == "FINISHED" for r in runs) else -1


if __name__ == "__main__":
    sys.exit(main())
