"""How a sweep stands, read from what trials leave while they run."""

from collections.abc import Callable
from pathlib import Path

import pytest

from knet_platform import attempts
from knet_platform.planning import Sweep, Trial, load_sweep
from knet_platform.prices import price_of, read_prices
from knet_platform.standing import QUIET_SECONDS, Standing, TrialStanding, Watch
from knet_platform.storage import Evaluation, Failure, Store, TrialResult

NOW = 1e9
SWEEP = """\
name: width
base: recipe.yaml
metric: {name: val/AP, mode: max}
seeds: [0, 1]
baseline: "narrow"
arms:
  narrow: {}
  wide: {model.channels: 64}
resources: {workers: 2, gpus_per_worker: 1, price_per_gpu_hour: 3}
"""


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    recipe = "data: {format: shapes}\ntrain: {iterations: 100, batch_size: 8}\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    (tmp_path / "width.yaml").write_text(SWEEP)
    return load_sweep(tmp_path / "width.yaml")


@pytest.fixture
def watch(sweep: Sweep, tmp_path: Path) -> Watch:
    price = price_of(sweep.resources, read_prices(None))
    return Watch(sweep, Store(str(tmp_path / "storage")), price)


def trial(watch: Watch, name: str) -> Trial:
    return next(trial for trial in watch.sweep.trials if trial.name == name)


def standing(found: Standing, name: str) -> TrialStanding:
    return next(trial for trial in found.trials if trial.trial.name == name)


def run(watch: Watch, name: str, steps: int, *, ago: float = 0.0) -> None:
    """Let a trial come to a step, two seconds each, the last one `ago` seconds before `NOW`."""
    folder = watch.store.trial(trial(watch, name).hash)
    attempts.claim(folder, "run")
    attempts.begin(folder, "run")
    points = [
        Evaluation(
            step=step,
            time=NOW - ago - 2.0 * (steps - step),
            metrics={
                "train/loss": 5 / step,
                "sys/images_per_s": 40.0,
                "sys/data_wait": 0.25,
                "sys/gpu_memory_gb": 11.5,
                **({"val/AP": step / 100 + 0.1 * (name[0] == "w")} if step % 20 == 0 else {}),
            },
        )
        for step in range(10, steps + 1, 10)
    ]
    folder.write_points(0, points)


def test_a_running_trial_is_compared_with_the_baseline_at_the_same_step(watch: Watch) -> None:
    run(watch, "narrow/0", 60)
    run(watch, "wide/0", 50)
    found = watch.look(NOW)
    wide = standing(found, "wide/0")
    assert (wide.state, wide.step, wide.total, wide.attempt) == ("running", 50, 100, 1)
    assert wide.metric == pytest.approx(0.5)  # of step 40
    assert wide.difference == pytest.approx(0.1)
    assert (wide.loss, wide.images_per_s, wide.data_wait) == (0.1, 40.0, 0.25)
    assert wide.memory_gb == 11.5
    assert wide.seconds_left == pytest.approx(100.0)
    assert standing(found, "narrow/0").difference is None
    assert standing(found, "narrow/1").state == "waiting"
    assert (found.gpus, found.count("running"), found.is_over) == (4, 2, False)
    # The waiting two are estimated, and two run at once.
    waiting = [standing(found, name).seconds_left for name in ("narrow/1", "wide/1")]
    assert found.seconds_left is not None
    assert found.seconds_left >= (sum(seconds or 0 for seconds in waiting) + 180) / 2


def test_one_that_says_nothing_for_long_is_quiet_and_not_running(watch: Watch) -> None:
    run(watch, "wide/0", 50, ago=QUIET_SECONDS + 60)
    found = watch.look(NOW)
    wide = standing(found, "wide/0")
    assert (wide.state, wide.silent) == ("quiet", QUIET_SECONDS + 60)
    assert (found.gpus, found.seconds_left) == (0, None)


def test_one_that_has_only_begun_is_running(watch: Watch) -> None:
    folder = watch.store.trial(trial(watch, "wide/0").hash)
    attempts.claim(folder, "run")
    assert standing(watch.look(NOW), "wide/0").state == "waiting"
    attempts.begin(folder, "run")
    found = standing(watch.look(NOW), "wide/0")
    assert (found.state, found.step, found.metric, found.loss) == ("running", 0, None, None)


def test_what_is_finished_is_read_once(
    watch: Watch, finished: Callable[..., TrialResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in watch.sweep.trials:
        metrics = {"val/AP": 0.3 + 0.02 * (each.arm == "wide"), "sys/gpu_hours": 1.0}
        watch.store.trial(each.hash).write_result(
            finished(each.hash, metrics=metrics, seconds=1800.0)
        )
    found = watch.look(NOW)
    assert found.is_over
    assert standing(found, "wide/1").difference == pytest.approx(0.02)
    assert (found.gpu_hours, found.usd) == (pytest.approx(4.0), pytest.approx(12.0))
    monkeypatch.setattr(attempts, "count", lambda folder: pytest.fail("read again"))
    assert watch.look(NOW) == found


def test_a_failure_is_told_with_its_reason(watch: Watch) -> None:
    failure = Failure(
        cause="crash", kind="Died", message="no", action="stopped", attempt=1, step=0
    )
    watch.store.trial(trial(watch, "wide/1").hash).write_failure(failure)
    found = standing(watch.look(NOW), "wide/1")
    assert (found.state, found.reason, found.seconds_left) == ("failed", "Died: no", None)
