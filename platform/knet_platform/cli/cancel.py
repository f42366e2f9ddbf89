"""`knet cancel`: end a job; the same `knet submit` continues its sweep."""

import argparse

from knet_platform.cluster import prepare_environment

EXAMPLES = """\
examples:
  knet cancel stages
  knet cancel raysubmit_Xe7cvjyGJCyuCvm2

Trials under way go on from their last checkpoints when the sweep is submitted again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("job", metavar="JOB", help="a job's id or sweep")


def run(args: argparse.Namespace) -> int:
    """Ask the job to end."""
    prepare_environment()
    from knet_platform.cluster.jobs import Jobs

    jobs = Jobs()
    job = jobs.find(args.job)
    if jobs.stop(job):
        print(f"job {job}: is being stopped; submit the sweep again to continue it")
    else:
        print(f"job {job}: had ended already")
    return 0
