import pytest

from knet_core import ConfigError, TrainConfig
from knet_core.schedule import plan_schedule


def test_epochs_become_iterations_and_evaluations_once_an_epoch():
    schedule = plan_schedule(TrainConfig(epochs=12, batch_size=16), num_images=160, world_size=4)
    assert schedule.num_iterations == 120
    assert [step for step in range(1, 31) if schedule.evaluates(step)] == [10, 20, 30]
    assert schedule.epoch(5) == 0.5
    assert (schedule.micro_batch, schedule.num_micro_batches) == (4, 1)


def test_a_worker_accumulates_up_to_its_share():
    config = TrainConfig(batch_size=16, micro_batch=2)
    assert plan_schedule(config, num_images=99, world_size=2).num_micro_batches == 4


def test_the_last_step_always_logs_evaluates_and_saves():
    config = TrainConfig(iterations=7, log_every=5, eval_every=4, checkpoint_every=3)
    schedule = plan_schedule(config, num_images=99, world_size=1)
    steps = range(1, 8)
    assert [step for step in steps if schedule.evaluates(step)] == [4, 7]
    assert [step for step in steps if schedule.saves(step)] == [3, 6, 7]
    assert [step for step in steps if schedule.logs(step)] == [3, 4, 5, 6, 7]


def test_checkpoints_follow_evaluations_unless_told_otherwise():
    schedule = plan_schedule(TrainConfig(iterations=9, eval_every=2), num_images=9, world_size=1)
    assert all(schedule.saves(step) == schedule.evaluates(step) for step in range(1, 10))


def test_fewer_images_than_a_batch_evaluate_every_step():
    schedule = plan_schedule(TrainConfig(epochs=4), num_images=4, world_size=1)
    assert (schedule.num_iterations, schedule.eval_every) == (1, 1)


@pytest.mark.parametrize(
    ("config", "world_size", "multiple"),
    [
        (TrainConfig(batch_size=10), 4, 4),
        (TrainConfig(batch_size=16, micro_batch=3), 2, 6),
        (TrainConfig(batch_size=2), 4, 4),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(config, world_size, multiple):
    with pytest.raises(ConfigError, match=rf"train\.batch_size: .* a multiple of {multiple}$"):
        plan_schedule(config, num_images=99, world_size=world_size)
