"""`knet train`: one recipe, in this process, without Ray; resumes where it stopped."""

import argparse
import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from types import FrameType
from typing import TYPE_CHECKING

from knet_core import KNetError
from knet_platform.config import load_recipe
from knet_platform.errors import InterruptedSweepError
from knet_platform.home import knet_home, require_writable, tracking_uri
from knet_platform.identity import trial_hash
from knet_platform.locks import output_lock
from knet_platform.metrics import MAIN_METRIC
from knet_platform.planning import find_scale
from knet_platform.staging import fingerprint, staged
from knet_platform.storage import Store, TrialStore
from knet_platform.sweep import Sweep, Trial
from knet_platform.sweep_file import Budget, Metric, Resources

if TYPE_CHECKING:
    from knet_core import Recipe, Report
    from knet_platform.cli.output import Advance
    from knet_platform.tracking import Status, Tracker

EXAMPLES = """\
examples:
  knet train sweeps/recipes/knet_r50_instance_1x.yaml --scale laptop data=sweeps/data/shapes.yaml
  knet train sweeps/recipes/knet_r50_instance_1x.yaml data.root=/data/coco train.batch_size=8
  knet train my_recipe.yaml seed=1 --output runs/mine --json"""

ARM = "train"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument(
        "recipe", type=Path, metavar="RECIPE", help="a file such as those of sweeps/recipes"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="k=v", help="recipe values that win over all files"
    )
    parser.add_argument(
        "--scale",
        metavar="NAME",
        help="a file of sweeps/scales, or its path; its seeds and resources are for sweeps alone",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder of the checkpoints (default: KNET_HOME/runs/<hash>)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Train to the end, or from the newest checkpoint in the output folder to the end."""
    scale = None
    if args.scale is not None:  # as in this project: `scales` beside the folder of recipes
        scale = find_scale(args.recipe.absolute().parent.parent / "scales", args.scale)
    recipe = load_recipe(args.recipe, scale=scale, overrides=args.overrides)
    from knet_core import fit
    from knet_platform.cli.output import progress_bar, show_metrics
    from knet_platform.tracking import open_tracker

    identity = fingerprint(recipe.data)
    sweep = _as_sweep(args.recipe, recipe, trial_hash(recipe, identity))
    (trial,) = sweep.trials
    output = args.output or knet_home() / "runs" / trial.hash
    require_writable(knet_home())
    require_writable(output, "--output" if args.output else "KNET_HOME")
    tracker = open_tracker(
        f"{sweep.name}-{trial.hash}",  # several may train one recipe at a time, with other seeds
        tracking_uri(),
        knet_home(),
        warn=lambda text: print(f"warning: {text}", file=sys.stderr),
    )
    terminated = Event()
    with (
        output_lock(output, knet_home()),
        staged(recipe.data, expected=identity),
        _tracked(tracker, sweep),
        _termination_noted(terminated),
        progress_bar(sweep.name) as advance,
        _recorded(output, recipe) as checkpoint,
    ):
        for name, content in Store(str(output)).run_folder().provenance_files().items():
            tracker.log_file(trial.hash, name, content)
        result = fit(
            recipe,
            callbacks=[_Reporter(tracker, trial, advance)],
            output_dir=output,
            resume_from=checkpoint,
            should_stop=terminated.is_set,
            should_save=terminated.is_set,
        )
        if not result.finished:
            raise InterruptedSweepError(
                f"{sweep.name}: terminated at step {result.step}; {result.checkpoint} is written, "
                f"and the same command goes on from it"
            )
    if left := tracker.left():
        print(f"warning: tracking: {left}", file=sys.stderr)
    if args.json:
        values = {
            "trial_hash": trial.hash,
            "step": result.step,
            "seconds": result.seconds,
            "checkpoint": str(result.checkpoint),
            "metrics": result.metrics,
        }
        print(json.dumps(values, indent=2))
    else:
        show_metrics(f"{sweep.name}, step {result.step}", result.metrics)
        print(f"checkpoint: {result.checkpoint}")
    return 0


@contextmanager
def _recorded(output: Path, recipe: "Recipe") -> Iterator[Path | None]:
    """Give the checkpoint to go on from; without one record what the run is made from.

    A run that leaves nothing else, as on unusable data, leaves no record either.
    """
    folder = Store(str(output)).run_folder()
    checkpoint = _starting_point(output)
    if checkpoint is None:
        _record_provenance(folder, recipe)
    try:
        yield checkpoint
    finally:
        record = folder.provenance_files()
        if set(folder.list()) == set(record):
            for name in record:
                folder.delete(name)


def _record_provenance(folder: TrialStore, recipe: "Recipe") -> None:
    import torch

    from knet_platform.provenance import accelerator, capture
    from knet_platform.source import read_source

    source = read_source()
    folder.write_provenance(capture(recipe, workers=1, source=source), source.patch)
    folder.write_machine(threads=torch.get_num_threads(), accelerator=accelerator())


class _Reporter:
    """Hands what training reports to the tracker and the progress bar."""

    def __init__(self, tracker: "Tracker", trial: Trial, advance: "Advance") -> None:
        self._tracker = tracker
        self._trial = trial
        self._advance = advance

    def on_report(self, report: "Report") -> None:
        """Take a report."""
        from knet_core import Point

        points = list(report.points)
        if report.evaluation:
            points.append(Point(step=report.step, time=time.time(), metrics=report.evaluation))
        self._tracker.log_points(self._trial.hash, points)
        if report.picture:
            self._tracker.log_picture(self._trial.hash, report.step, report.picture)
        self._advance(report.step, report.num_iterations)


@contextmanager
def _tracked(tracker: "Tracker", sweep: Sweep) -> Iterator[None]:
    """Record one attempt, however it ends."""
    from knet_platform.tracking import SweepRun, TrialRun

    (trial,) = sweep.trials
    tracker.start_sweep(SweepRun.of(sweep))
    tracker.start_trial(TrialRun.of(trial), 1)
    status: Status = "FAILED"
    reason = "stopped by an error"
    try:
        yield
        status, reason = "FINISHED", ""
    except InterruptedSweepError as error:
        status, reason = "KILLED", str(error)
        raise
    except KNetError as error:
        reason = f"{type(error).__name__}: {error}"
        raise
    except KeyboardInterrupt:
        status, reason = "KILLED", "interrupted by the user"
        raise
    finally:
        tracker.finish_trial(trial.hash, status, reason)
        tracker.finish_sweep(status)


@contextmanager
def _termination_noted(terminated: Event) -> Iterator[None]:
    """Let SIGTERM, which schedulers send before they take a machine away, only be noted."""

    def note(_signal: int, _frame: FrameType | None) -> None:
        terminated.set()

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _as_sweep(path: Path, recipe: "Recipe", identity: str) -> Sweep:
    """Return the run as a sweep of one trial, which is what a tracker records."""
    name = path.stem
    trial = Trial(
        sweep=name, arm=ARM, seed=recipe.seed, overrides={}, recipe=recipe, hash=identity
    )
    return Sweep(
        name=name,
        path=path,
        title="",
        metric=Metric(name=MAIN_METRIC[recipe.model.task], mode="max"),
        baseline=ARM,
        seeds=(recipe.seed,),
        arms=(ARM,),
        paper=None,
        resources=Resources(),
        budget=Budget(),
        trials=(trial,),
    )


def _starting_point(output: Path) -> Path | None:
    """Return the newest checkpoint that is as it was written."""
    name, problems = Store(str(output)).run_folder().checkpoints.newest_undamaged()
    for problem in problems:
        print(f"warning: {problem}; going on from {name or 'the start'}", file=sys.stderr)
    return output / name if name else None
