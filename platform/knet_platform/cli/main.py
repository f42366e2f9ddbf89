"""The `knet` command: finds the verb, hands over, and turns errors into lines and exit codes."""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from knet_core import KNetError

VERBS = {
    "data": "make, convert and check data sets",
    "train": "train one recipe on this machine",
    "plan": "show what a sweep would run, what is done, and how long the rest takes",
    "run": "start or continue a sweep",
    "retry": "run the trials of a sweep that failed",
    "cluster": "write the files and the token of a cluster",
    "submit": "send a sweep to a Ray cluster as a job",
    "status": "list the jobs of a Ray cluster",
    "logs": "print or follow what a job prints",
    "cancel": "end a job of a Ray cluster",
    "top": "watch a running sweep: arms, progress, metric so far, time left, cost",
    "report": "write a sweep's table beside the paper's numbers, and its page",
    "diff": "show what differs between two runs",
    "repro": "run a recorded run again and say how far the result is from the recorded one",
    "eval": "evaluate a checkpoint on a data set",
    "score": "score result files of any origin against ground truth",
    "predict": "draw a checkpoint's masks over images and write them as files",
    "import-official": "turn a published K-Net checkpoint into one of this project",
    "bench": "time a network as papers do",
    "doctor": "find what on this machine or cluster would stop a run",
    "store": "show what runs take in the store, and delete what need not stay",
    "sync": "send the tracking store what did not reach it while sweeps ran",
    "ui": "open MLflow's pages on the runs",
}

_EXIT_CODES = """\
exit codes: 0 all done; 1 internal error; 2 usage or configuration; 3 some trials failed;
4 budget reached; 5 data invalid; 75 interrupted, resumable; 130 interrupted by the user"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except KNetError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) went away. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if argv else 2
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"knet {version('knet-platform')}")
        return 0
    verb, *rest = argv
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "see knet --help"
        print(f"error: knet: no verb '{verb}'; {hint}", file=sys.stderr)
        return 2
    module = import_module(f"knet_platform.cli.{verb.replace('-', '_')}")
    parser = argparse.ArgumentParser(
        prog=f"knet {verb}",
        description=VERBS[verb][0].upper() + VERBS[verb][1:] + ".",
        epilog=module.EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    try:
        args = _parse(parser, rest)
    except SystemExit as stop:  # argparse has printed help or a usage error
        return int(stop.code or 0)
    code: int = module.run(args)
    return code


def _parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse, accepting `key=value` after options too, which argparse alone would not."""
    args, rest = parser.parse_known_args(argv)
    unknown = [item for item in rest if item.startswith("-") or "=" not in item]
    if unknown or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _overview() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:{width}}  {text}" for verb, text in VERBS.items())
    return (
        "usage: knet VERB ...\n\n"
        "Ablation sweeps for image segmentation.\n\n"
        f"verbs:\n{verbs}\n\n"
        "examples:\n"
        "  knet plan sweeps/stages.yaml --scale laptop\n"
        "  knet run sweeps/stages.yaml --scale laptop\n"
        "  knet run --help\n\n"
        f"{_EXIT_CODES}"
    )


if __name__ == "__main__":
    sys.exit(main())
