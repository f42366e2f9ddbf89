"""A few real steps of every arm on this machine: how long one takes and what memory it needs."""

import resource
import tempfile
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from knet_core import Recipe, Report
from knet_platform.errors import UsageError
from knet_platform.forecast import Probe
from knet_platform.pace import PROCESS_GB
from knet_platform.staging import fingerprint, staged
from knet_platform.sweep import Sweep
from knet_platform.sweep_file import Resources

WARM_UP = 2
STEPS = 5


class _EnoughError(Exception):
    """Ends a probe from inside its training loop."""


class _Stopwatch:
    """Takes the time of steps, which end in reports."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_report(self, report: Report) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) > WARM_UP + STEPS:
            raise _EnoughError


def probe_arms(sweep: Sweep, arms: Collection[str]) -> dict[str, Probe]:
    """Train a few steps of one worker's share of each arm; leaves nothing behind.

    Raises:
        UsageError: The sweep wants GPUs and this machine has none.
        KNetError: An arm cannot train; it would not on the cluster either.
    """
    import torch

    if sweep.resources.gpus_per_worker and not torch.cuda.is_available():
        raise UsageError(
            "--probe: the sweep wants GPUs and this machine has none, so its figures would say "
            "nothing; run it on a node like those of the cluster, or plan without --probe"
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, int(sweep.resources.cpus_per_worker)))
    try:
        recipes = {trial.arm: trial.recipe for trial in reversed(sweep.trials)}
        return {arm: _probe(recipes[arm], sweep.resources) for arm in sweep.arms if arm in arms}
    finally:
        torch.set_num_threads(threads)


def _probe(recipe: Recipe, resources: Resources) -> Probe:
    import torch

    from knet_core import fit

    cuda = bool(resources.gpus_per_worker)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    watch = _Stopwatch()
    with (
        staged(recipe.data, expected=fingerprint(recipe.data)),
        tempfile.TemporaryDirectory(prefix="knet-probe-") as folder,
        suppress(_EnoughError),
    ):
        fit(
            _shortened(recipe, resources),
            callbacks=[watch],
            output_dir=Path(folder),
            device=torch.device("cuda" if cuda else "cpu"),
            report_every_seconds=0,
        )
    seconds = (watch.times[-1] - watch.times[WARM_UP]) / STEPS
    if cuda:
        memory = PROCESS_GB + torch.cuda.max_memory_allocated() / 1e9
    else:  # Linux counts in KiB; of this process so far, so later arms include earlier ones
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return Probe(seconds_per_step=seconds, peak_memory_gb=memory)


def _shortened(recipe: Recipe, resources: Resources) -> Recipe:
    """Return one worker's share, reported at every step, stopped before it evaluates."""
    share = recipe.train.batch_size // resources.least_workers
    backbone = replace(recipe.model.backbone, pretrained=False, checkpoint=None)
    return replace(
        recipe,
        model=replace(recipe.model, backbone=backbone),
        train=replace(
            recipe.train, batch_size=share, iterations=1000, eval_every=1000, log_every=1
        ),
    )
