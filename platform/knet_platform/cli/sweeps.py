"""What `knet plan`, `knet run` and `knet retry` share: which sweep is meant, and what it costs."""

import argparse
import dataclasses
import sys
from pathlib import Path

from knet_platform.errors import UsageError
from knet_platform.pace import Pace
from knet_platform.planning import LargeSweepError, load_sweep
from knet_platform.prices import Price, price_of, read_prices
from knet_platform.sweep import Sweep

MOST_TRIALS = 5000
"""Larger sweeps are asked about: a grid of six axes is quickly written."""


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("sweep", type=Path, help="sweep file, such as sweeps/stages.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="recipe values that win over all files"
    )
    parser.add_argument("--scale", metavar="NAME", help="a file in scales/ beside the sweep")
    parser.add_argument("--seeds", type=int, metavar="N", help="run seeds 0 to N-1")
    parser.add_argument(
        "--max-usd", type=float, metavar="USD", help="what all its trials may cost (budget.usd)"
    )
    parser.add_argument(
        "--instance", metavar="NAME", help="what it runs on, as the price list calls it"
    )
    parser.add_argument("--spot", action="store_true", help="count with spot prices")
    parser.add_argument(
        "--prices", type=Path, metavar="FILE", help="a price list like cluster/prices.yaml"
    )
    parser.add_argument("--yes", action="store_true", help=f"run more than {MOST_TRIALS} trials")


def load_priced_sweep(args: argparse.Namespace) -> tuple[Sweep, Price]:
    """Return the sweep of the arguments, and what an hour of one of its trials costs.

    Raises:
        ConfigError: Everything that is wrong with the sweep or with the price list.
        DataError: The data set is not there.
        UsageError: The sweep is very large and nobody agreed to that.
    """
    if args.max_usd is not None and not args.max_usd >= 0:
        raise UsageError(f"--max-usd: expected an amount >= 0, got {args.max_usd:g}")
    try:
        sweep = _load(args, None if args.yes else MOST_TRIALS)
    except LargeSweepError as large:
        _confirm(args, large)
        args.yes = True  # a job that is submitted asks nobody
        sweep = _load(args, None)
    return sweep, price_of(sweep.resources, read_prices(args.prices))


def _load(args: argparse.Namespace, most_trials: int | None) -> Sweep:
    sweep = load_sweep(
        args.sweep,
        scale=args.scale,
        overrides=args.overrides,
        seeds=args.seeds,
        most_trials=most_trials,
    )
    return _with_arguments(sweep, args)


def _with_arguments(sweep: Sweep, args: argparse.Namespace) -> Sweep:
    resources, budget = sweep.resources, sweep.budget
    if args.instance is not None:
        resources = dataclasses.replace(
            resources, instance=args.instance, spot=False, price_per_gpu_hour=None
        )
    if args.spot:
        resources = dataclasses.replace(resources, spot=True)
    if args.max_usd is not None:
        budget = dataclasses.replace(budget, usd=args.max_usd)
    return dataclasses.replace(sweep, resources=resources, budget=budget)


def _confirm(args: argparse.Namespace, large: LargeSweepError) -> None:
    """Ask whether a sweep of that size and price is meant.

    Raises:
        UsageError: It is not, or there is nobody to ask.
    """
    sweep = _with_arguments(large.sample, args)
    price = price_of(sweep.resources, read_prices(args.prices))
    estimate = Pace(sweep.trials, sweep.resources, {}, gpu=price.gpu).estimate(sweep.trials[0])
    usd = estimate.seconds / 3600 * price.usd_per_hour * large.count
    what = (
        f"{args.sweep}: {large.count:,} trials for about {usd:,.0f} USD "
        f"({usd / estimate.band:,.0f} to {usd * estimate.band:,.0f}; {price.basis})"
    )
    if not sys.stdin.isatty():
        raise UsageError(f"{what}; expected at most {MOST_TRIALS}, or --yes to confirm")
    print(f"{what}. Go on? [y/N] ", end="", file=sys.stderr, flush=True)
    if input().strip().lower() not in ("y", "yes"):
        raise UsageError(f"{what}: not confirmed")
