"""One line of a diagnosis, as `knet doctor` prints it."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]

LITTLE_DISK, NO_DISK = 10.0, 1.0
"""GiB free below which a checkpointed sweep may, or will, run out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What was looked at, how it stands, and what to do about it."""

    name: str
    status: Status
    found: str
    mend: str = ""


def disk_status(free: float) -> Status:
    """Return how `free` GiB stand."""
    return "ok" if free >= LITTLE_DISK else "warn" if free >= NO_DISK else "fail"
