"""What the verbs that run a checkpoint have in common."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from knet_platform.errors import UsageError

if TYPE_CHECKING:
    import torch


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Declare the checkpoint."""
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="folder checkpoint_<step>")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Declare where the model runs."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")


def chosen_device(name: str | None) -> "torch.device":
    """Return the device of a name, or a GPU if there is one.

    Raises:
        UsageError: There is no such device here.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    if name not in there and not (name == "cuda" and len(there) > 1):
        raise UsageError(f"--device: {name}; expected one of this machine's: {', '.join(there)}")
    return torch.device(name)


def refused_overrides(overrides: Iterable[str]) -> list[str]:
    """Return one line for each setting that would change what a checkpoint holds."""
    return [
        f"{item}: a checkpoint's recipe is fixed; expected data.<key>=... or eval.<key>=..."
        for item in overrides
        if not item.startswith(("data.", "eval."))
    ]
