"""Which code made a result."""

import os
import subprocess
from pathlib import Path


def git_sha() -> str:
    """Return the commit of this code, or "unknown".

    A job runs an unpacked copy without history; `knet submit` tells it `KNET_GIT_SHA`.
    """
    stated = os.environ.get("KNET_GIT_SHA")
    if stated:
        return stated
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() if found.returncode == 0 else "unknown"
