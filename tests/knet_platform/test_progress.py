"""One plain line per event where nobody watches a terminal."""

from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress as Bars

from knet_platform.planning import load_sweep
from knet_platform.progress import BarProgress, Moment, PlainProgress
from knet_platform.sweep import Sweep

MOMENT = Moment(step=150, total=300, loss=1.23456, metric=0.1234)


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    (tmp_path / "recipe.yaml").write_text("data: {format: shapes}\n")
    path = tmp_path / "stages.yaml"
    path.write_text(
        "name: stages\nbase: recipe.yaml\nmetric: {name: val/AP, mode: max}\nbaseline: '3'\n"
        "arms: {'3': {}, '1': {model.stages: 1}}\n"
    )
    return load_sweep(path)


def test_plain_progress_names_the_trial_its_step_loss_and_metric(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = PlainProgress(sweep, finished=1)
    trial = sweep.trials[0]
    progress.begin(trial, 2)
    progress.update(trial, MOMENT)
    progress.update(trial, Moment(step=1, total=300, loss=None, metric=None))
    progress.end(trial, "finished  AP 12.3")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "  0:00  3/0  starting, attempt 2",
        "  0:00  3/0  step 150/300  loss 1.235  AP 12.3",
        "  0:00  3/0  step 1/300",
        "  0:00  3/0  finished  AP 12.3  (2/2 trials)",
    ]


def test_bars_come_and_go_with_their_trials(sweep: Sweep) -> None:
    console = Console(force_terminal=True, width=100, record=True)
    with Bars(console=console) as bars:
        progress = BarProgress(sweep, finished=0, bars=bars)
        progress.begin(sweep.trials[0], 1)
        progress.update(sweep.trials[0], MOMENT)
        assert [task.completed for task in bars.tasks] == [0, 150]
        progress.end(sweep.trials[0], "failed: [no] such image")
        assert [task.completed for task in bars.tasks] == [1]
