"""One worker of a run without Ray: gloo on one machine, from a checkpoint or the beginning.

Usage: run_group.py RANK WORLD_SIZE FOLDER FROM TO, the steps; FOLDER holds recipe.yaml.
"""

import contextlib
import sys
from pathlib import Path

import torch
from torch import distributed

from knet_core import fit
from knet_core.checkpoint_state import load_recipe


class Stop:
    """Ends the run after a report."""

    def __init__(self, step):
        self.step = step

    def on_report(self, report):
        if report.step == self.step:
            raise InterruptedError


def main(rank, world_size, folder, start, stop):
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
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), *map(int, sys.argv[4:]))
