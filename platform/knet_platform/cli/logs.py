"""`knet logs`: what a job has printed; with -f until it ends, and ends as it ends."""

import argparse

from knet_platform.cluster import prepare_environment

EXAMPLES = """\
examples:
  knet logs
  knet logs -f stages
  knet logs -f raysubmit_Xe7cvjyGJCyuCvm2; echo $?

Without -f the exit code is 0 whatever became of the job."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "job", nargs="?", metavar="JOB", help="a job's id or sweep (default: the latest)"
    )
    parser.add_argument(
        "-f", "--follow", action="store_true", help="go on until the job ends, and end as it does"
    )


def run(args: argparse.Namespace) -> int:
    """Print the log; return the job's exit code if it is followed to its end."""
    prepare_environment()
    from knet_platform.cluster.jobs import Jobs

    jobs = Jobs()
    job = jobs.find(args.job)
    if not args.follow:
        print(jobs.log(job), end="")
        return 0
    for text in jobs.follow(job):
        print(text, end="", flush=True)
    return jobs.exit_code(job)
