"""`knet status`: the jobs of a cluster, and how they stand."""

import argparse
import json
from datetime import UTC, datetime

from knet_platform.cluster import prepare_environment

EXAMPLES = """\
examples:
  knet status
  RAY_ADDRESS=http://10.0.0.5:8265 RAY_AUTH_MODE=token knet status --json

The latest comes first. What a sweep has finished: knet plan SWEEP, knet report SWEEP."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("--json", action="store_true", help="print the jobs as JSON")


def run(args: argparse.Namespace) -> int:
    """Print one line a job."""
    prepare_environment()
    from knet_platform.cluster.jobs import SWEEP, Jobs

    jobs = Jobs()
    rows = [
        {
            "job": job.submission_id,
            "sweep": (job.metadata or {}).get(SWEEP),
            "status": str(job.status.value),
            "started": _time(job.start_time),
            "ended": _time(job.end_time),
            "exit_code": job.driver_exit_code,
        }
        for job in jobs.all()
    ]
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        print(f"{row['job']}  {row['status']:<9}  {row['sweep'] or '-':<20}  {row['started']}")
    if not rows:
        print(f"no jobs at {jobs.address}")
    return 0


def _time(milliseconds: int | None) -> str | None:
    if not milliseconds:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")
