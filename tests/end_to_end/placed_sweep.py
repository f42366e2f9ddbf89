"""`knet run` whose trials take the places of their workers, and wait there where others train.

Usage: placed_sweep.py SWEEP, with RAY_ADDRESS. What a trial reserves is what its driver would ask
of Ray Train. It writes `<SWEEP's folder>/<sweep>_<trial>.json`: nodes, begin and end. A sweep's
first trial stays until one of the other sweep is there too.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path

import ray.cloudpickle

from knet_platform import attempts, tuner
from knet_platform.cli.main import main
from knet_platform.cluster import prepare_environment
from knet_platform.driver import run_trial, scaling
from knet_platform.storage import Group

SWEEPS = 2
"""That train at once."""
SECONDS = 3.0
"""Of a trial, from when each sweep has one."""
PATIENCE_SECONDS = 240.0
"""For the other sweep's first trial."""


def placed_group(folder, name, job, store, attempt, images_at_once):
    """Reserve what the workers need, stay there beside the other sweep, leave a checkpoint."""
    import ray
    from ray.util.placement_group import (
        placement_group,
        placement_group_table,
        remove_placement_group,
    )

    asked = scaling(job)
    worker = asked._resources_per_worker_not_none
    group = placement_group([worker] * asked.num_workers, strategy=asked.placement_strategy)
    ray.get(group.ready())
    begin = time.time()
    nodes = placement_group_table(group)["bundles_to_node_id"]
    attempts.verify(store, job.run_id)
    store.add_group(Group(workers=asked.num_workers, seconds=0.0))
    Path(folder, f"{name}.begun").touch()
    while len([*Path(folder).glob("*.begun")]) < SWEEPS:
        assert time.time() - begin < PATIENCE_SECONDS, "the other sweep got no place beside this"
        time.sleep(0.1)
    time.sleep(SECONDS)
    state = {
        "format": 1, "step": 10, "epoch": 1.0, "categories": [], "num_parameters": 1,
        "metrics": {"val/AP": 0.5}, "evaluations": [], "seconds": SECONDS,
    }  # fmt: skip
    for file in ("model.safetensors", "trainer.pt", "recipe.yaml", "state.json"):
        store.write_bytes(f"checkpoint_10/{file}", json.dumps(state).encode())
    remove_placement_group(group)
    seen = {"nodes": sorted(nodes.values()), "begin": begin, "end": time.time()}
    seen["driver"] = ray.get_runtime_context().get_node_id()
    Path(folder, f"{name}_{job.trial_hash}.json").write_text(json.dumps(seen))
    return "cpu", True


def placed_trial(config, folder, name):
    """Be the driver of a trial."""
    run_trial(config, train=partial(placed_group, folder, name))


if __name__ == "__main__":
    prepare_environment()
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    path = Path(sys.argv[1])
    trial = partial(placed_trial, folder=str(path.parent), name=path.stem)
    tuner.run_sweep = partial(tuner.run_sweep, trainable=trial)
    sys.exit(main(["run", str(path)]))
