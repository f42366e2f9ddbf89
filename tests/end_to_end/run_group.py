"""A run without Ray: gloo on one machine, in parts with different numbers of workers.

Usage: run_group.py FOLDER WORKERS:FROM:TO..., the steps; FOLDER holds recipe.yaml.
"""

import contextlib
import sys
from pathlib import Path

import torch
from torch import distributed, multiprocessing

from knet_core import fit
from knet_core.checkpoint_state import load_recipe


class Stop:
    """Ends the run after a report."""

    def __init__(self, step):
        self.step = step

    def on_report(self, report):
        if report.step == self.step:
            raise InterruptedError


def work(rank, world_size, folder, start, stop):
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous{start}", rank=rank, world_size=world_size
    )
    with contextlib.suppress(InterruptedError):
        fit(
            load_recipe(folder),
            callbacks=[Stop(stop)],
            output_dir=folder,
            resume_from=folder / f"checkpoint_{start}" if start else None,
            report_every_seconds=0,
        )


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for part in sys.argv[2:]:
        workers, start, stop = map(int, part.split(":"))
        # Forked, so that what takes seconds to import is imported once.
        arguments = (workers, folder, start, stop)
        multiprocessing.start_processes(work, arguments, nprocs=workers, start_method="fork")
