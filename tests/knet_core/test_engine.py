import dataclasses
import math

import pytest
import torch
from safetensors.torch import load_file

from knet_core import (
    CheckpointError,
    ConfigError,
    EvaluationMemoryError,
    NonFiniteError,
    TrainingMemoryError,
    fit,
    load_model,
)
from knet_core import engine as engine_module
from knet_core.checkpoint_state import load_recipe, read_state
from knet_core.metrics.mask_ap import MaskAP
from knet_core.models.knet import KNet

TIMED = ("sys/images_per_s", "sys/data_wait", "sys/host_memory_gb", "bench/fps")


class Recorder:
    """Keeps reports; at a step, fails like a machine that is switched off."""

    def __init__(self, stop_at=None):
        self.reports = []
        self.stop_at = stop_at

    def on_report(self, report):
        self.reports.append(report)
        if report.step == self.stop_at:
            raise InterruptedError

    @property
    def points(self):
        return [point for report in self.reports for point in report.points]


def reproducible(metrics):
    return {name: value for name, value in metrics.items() if name not in TIMED}


def test_a_run_reports_evaluates_and_saves(tiny_recipe, tmp_path):
    recipe, recorder = tiny_recipe(iterations=5, eval_every=2), Recorder()
    result = fit(recipe, callbacks=[recorder], output_dir=tmp_path)

    assert [report.step for report in recorder.reports] == [2, 4, 5]
    assert [point.step for point in recorder.points] == [1, 2, 3, 4, 5]
    assert [report.epoch for report in recorder.reports] == [0.8, 1.6, 2.0]  # 4 of 10 images
    first = recorder.points[0].metrics
    terms = [value for name, value in first.items() if name.startswith("train/loss/")]
    assert first["train/loss"] == pytest.approx(sum(terms))
    assert len(terms) == 1 + 2 + 2 * 3
    assert first["train/lr"] == pytest.approx(1e-7)
    assert first["train/grad_norm"] > 0
    assert first["sys/images_per_s"] > 0
    assert 0 <= first["sys/data_wait"] <= 1
    assert 0.1 < first["sys/host_memory_gb"] < 20  # torch alone takes more than the one

    last = recorder.reports[-1]
    assert last.picture is not None
    assert last.picture.startswith(b"\x89PNG")
    assert last.stage_picture is not None
    assert last.stage_picture.startswith(b"\x89PNG")
    assert last.kernel_maps is not None
    assert last.kernel_maps.startswith(b"\x89PNG")
    for report in recorder.reports[:-1]:
        assert report.stage_picture is report.kernel_maps is None
    assert last.checkpoint == result.checkpoint == tmp_path / "checkpoint_5"
    assert "bench/fps" not in recorder.reports[0].evaluation
    assert {"val/AP", "bench/fps"} <= set(last.evaluation)
    assert result.metrics == {
        **last.evaluation,
        "train/loss": recorder.points[-1].metrics["train/loss"],
    }
    assert [point.step for point in result.evaluations] == [2, 4, 5]
    assert 0 < result.seconds < 300
    model = load_model(result.checkpoint)
    assert result.num_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)

    state = read_state(result.checkpoint)
    assert state.step == 5
    assert state.metrics == result.metrics
    assert state.evaluations == result.evaluations
    assert load_recipe(result.checkpoint) == recipe
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_4", "checkpoint_5"]


def test_training_learns(tiny_recipe, tmp_path):
    recorder = Recorder()
    recipe = tiny_recipe(iterations=30, log_every=10, optim={"lr": 1e-3, "decay_at": ()})
    fit(recipe, callbacks=[recorder], output_dir=tmp_path)
    losses = [p.metrics["train/loss"] for p in recorder.points]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, [1, 2, 3, 4, 5, 6]), (math.inf, [4, 6])])
def test_points_between_evaluations_are_reported_when_due(tiny_recipe, tmp_path, seconds, steps):
    recorder = Recorder()
    fit(
        tiny_recipe(iterations=6, eval_every=4),
        callbacks=[recorder],
        output_dir=tmp_path,
        report_every_seconds=seconds,
    )
    assert [report.step for report in recorder.reports] == steps
    assert [point.step for point in recorder.points] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_resumed_run_equals_one_that_was_never_interrupted(
    tiny_recipe, tmp_path, micro_batch, num_workers
):
    """Bit for bit: parameters, optimizer, random numbers, losses and metrics."""
    recipe = tiny_recipe(
        iterations=6, eval_every=4, checkpoint_every=3, log_every=2, micro_batch=micro_batch
    )
    recipe = dataclasses.replace(
        recipe, data=dataclasses.replace(recipe.data, num_workers=num_workers)
    )
    whole = Recorder()
    expected = fit(recipe, callbacks=[whole], output_dir=tmp_path / "whole")

    torch.rand(7)  # another process would start with other random numbers
    with pytest.raises(InterruptedError):
        fit(recipe, callbacks=[Recorder(stop_at=3)], output_dir=tmp_path / "first")
    rest = Recorder()
    result = fit(
        recipe,
        callbacks=[rest],
        output_dir=tmp_path / "second",
        resume_from=tmp_path / "first" / "checkpoint_3",
    )

    assert reproducible(result.metrics) == reproducible(expected.metrics)
    assert [p.step for p in result.evaluations] == [p.step for p in expected.evaluations]
    assert [(p.step, reproducible(p.metrics)) for p in rest.points] == [
        (p.step, reproducible(p.metrics)) for p in whole.points if p.step > 3
    ]
    weights, expected_weights = (
        load_file(r.checkpoint / "model.safetensors") for r in (result, expected)
    )
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)
    states = [
        torch.load(r.checkpoint / "trainer.pt", weights_only=True) for r in (result, expected)
    ]
    torch.testing.assert_close(*(s["optimizer"]["state"] for s in states), rtol=0, atol=0)
    assert states[0]["random"] == states[1]["random"]


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_as_if_nothing_had_been(
    tiny_recipe, tmp_path
):
    recipe = tiny_recipe(iterations=6, eval_every=6)
    whole = fit(recipe, output_dir=tmp_path / "whole")
    recorder = Recorder()
    stopped = fit(
        recipe,
        callbacks=[recorder],
        output_dir=tmp_path / "stopped",
        report_every_seconds=0,
        should_stop=lambda: len(recorder.reports) == 2,
    )
    assert whole.finished
    assert (stopped.finished, stopped.step) == (False, 3)
    assert recorder.reports[-1].checkpoint == stopped.checkpoint
    resumed = fit(recipe, output_dir=tmp_path / "on", resume_from=stopped.checkpoint)
    assert resumed.finished
    assert reproducible(resumed.metrics) == reproducible(whole.metrics)


def test_another_run_goes_on_from_a_checkpoint_with_another_rate_as_if_it_were_its_own(
    tiny_recipe, tmp_path
):
    """A member of a population that copies another is a run of the schedule it has followed."""

    def recipe(at, by):
        optim = {"warmup_iterations": 0, "rescale_at": at, "rescale_by": by}
        return tiny_recipe(iterations=6, eval_every=2, optim=optim)

    copied = recipe((2,), (3.0,))
    rested = fit(copied, output_dir=tmp_path / "copied", most_evaluations=2)
    assert (rested.finished, rested.step) == (False, 4)
    found = recipe((2, 4), (3.0, 0.5))
    member = fit(found, output_dir=tmp_path / "member", resume_from=rested.checkpoint)
    replayed = fit(found, output_dir=tmp_path / "replayed", most_evaluations=3)
    assert replayed.finished
    ours, theirs = (
        load_file(result.checkpoint / "model.safetensors") for result in (member, replayed)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert reproducible(member.metrics) == reproducible(replayed.metrics)
    with pytest.raises(CheckpointError, match=r"optim\.rescale_by is \[3\.0\] there"):
        fit(recipe((2,), (2.0,)), output_dir=tmp_path / "no", resume_from=rested.checkpoint)


def test_a_save_between_two_points_changes_nothing(tiny_recipe, tmp_path):
    """Bit for bit, and the point that it falls into is averaged over all its steps."""
    recipe = tiny_recipe(iterations=6, eval_every=6, log_every=4)
    whole, asked = Recorder(), iter([True])
    expected = fit(recipe, callbacks=[whole], output_dir=tmp_path / "whole")
    stopped = fit(
        recipe,
        output_dir=tmp_path / "stopped",
        should_save=lambda: next(asked, False),
        should_stop=lambda: True,
    )
    assert (stopped.finished, stopped.step) == (False, 1)
    rest = Recorder()
    result = fit(
        recipe, callbacks=[rest], output_dir=tmp_path / "on", resume_from=stopped.checkpoint
    )
    assert [(p.step, reproducible(p.metrics)) for p in rest.points] == [
        (p.step, reproducible(p.metrics)) for p in whole.points
    ]
    assert reproducible(result.metrics) == reproducible(expected.metrics)
    weights, expected_weights = (
        load_file(r.checkpoint / "model.safetensors") for r in (result, expected)
    )
    assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)


def test_a_checkpoint_is_written_when_the_last_is_some_minutes_old(tiny_recipe, tmp_path):
    recorder = Recorder()
    recipe = tiny_recipe(iterations=3, eval_every=3, log_every=3, checkpoint_minutes=1e-9)
    fit(recipe, callbacks=[recorder], output_dir=tmp_path)
    assert [r.step for r in recorder.reports if r.checkpoint] == [1, 3]


def test_the_seed_decides_the_run(tiny_recipe, tmp_path):
    recipe = tiny_recipe(iterations=2)
    runs = [
        fit(dataclasses.replace(recipe, seed=seed), output_dir=tmp_path / str(i))
        for i, seed in enumerate((0, 0, 1))
    ]
    losses = [run.metrics["train/loss"] for run in runs]
    assert losses[0] == losses[1] != losses[2]


def test_a_finished_run_is_reported_again_without_training(tiny_recipe, tmp_path, monkeypatch):
    recipe = tiny_recipe()
    done = fit(recipe, output_dir=tmp_path / "done")
    monkeypatch.setattr(engine_module, "build_model", None)  # would be needed to train
    recorder = Recorder()
    again = fit(
        recipe,
        callbacks=[recorder],
        output_dir=tmp_path / "again",
        resume_from=done.checkpoint,
    )
    [report] = recorder.reports
    assert report.step == report.num_iterations == 4
    assert report.evaluation == done.evaluations[-1].metrics
    assert report.checkpoint == again.checkpoint == tmp_path / "again" / "checkpoint_4"
    assert again.metrics == done.metrics
    assert again.evaluations == done.evaluations
    load_model(again.checkpoint)


def test_resuming_another_recipe_is_refused(tiny_recipe, tmp_path):
    done = fit(tiny_recipe(iterations=1), output_dir=tmp_path / "done")
    with pytest.raises(CheckpointError, match=r"train\.iterations is 1 there, 2 here"):
        fit(
            tiny_recipe(iterations=2),
            output_dir=tmp_path / "again",
            resume_from=done.checkpoint,
        )


def test_checkpoints_of_an_earlier_attempt_do_not_push_out_new_ones(tiny_recipe, tmp_path):
    for step in (90, 100):
        (tmp_path / f"checkpoint_{step}").mkdir()
    result = fit(tiny_recipe(iterations=3, eval_every=1), output_dir=tmp_path)
    load_model(result.checkpoint)
    assert (tmp_path / "checkpoint_2").is_dir()
    assert not (tmp_path / "checkpoint_1").exists()


def test_a_batch_that_does_not_divide_is_refused_before_anything_is_built(tiny_recipe, tmp_path):
    with pytest.raises(ConfigError, match=r"train\.micro_batch = 3; set it to a multiple of 3"):
        fit(tiny_recipe(batch_size=4, micro_batch=3), output_dir=tmp_path)


def test_a_run_that_explodes_stops_and_keeps_its_last_checkpoint(tiny_recipe, tmp_path):
    recipe = tiny_recipe(
        iterations=50,
        eval_every=50,
        checkpoint_every=1,
        optim={"lr": 1e30, "warmup_iterations": 0},
    )
    with pytest.raises(NonFiniteError, match=r"images with ids \[.*nonfinite_step"):
        fit(recipe, output_dir=tmp_path)
    assert list(tmp_path.glob("nonfinite_step*.pt"))


def test_an_evaluation_of_a_model_that_exploded_is_no_score(tiny_recipe, tmp_path):
    recipe = tiny_recipe(iterations=50, eval_every=1, optim={"lr": 1e30, "warmup_iterations": 0})
    with pytest.raises(NonFiniteError, match=r"scores of image 1 \(000000.png\) are not finite"):
        fit(recipe, output_dir=tmp_path)


def test_a_score_that_is_no_number_is_left_out_and_the_run_goes_on(
    tiny_recipe, tmp_path, monkeypatch
):
    scores = {"val/AP": math.nan, "val/AP50": math.inf, "val/AP75": 0.5}
    monkeypatch.setattr(MaskAP, "compute", lambda self: scores)
    recipe = tiny_recipe(iterations=4, eval_every=2)
    with pytest.raises(InterruptedError):
        fit(recipe, callbacks=[Recorder(stop_at=2)], output_dir=tmp_path)
    result = fit(recipe, output_dir=tmp_path, resume_from=tmp_path / "checkpoint_2")
    assert [point.metrics.get("val/AP75") for point in result.evaluations] == [0.5, 0.5]
    assert result.metrics.keys() & scores.keys() == {"val/AP75"}
    assert read_state(result.checkpoint).metrics == result.metrics


@pytest.fixture
def small_device(monkeypatch):
    """Let the network run out of memory beyond some images, in training or in evaluation."""

    def limit(images, *, training):
        forward = KNet.forward

        def run(self, batch):
            if self.training == training and len(batch) > images:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return forward(self, batch)

        monkeypatch.setattr(KNet, "forward", run)

    return limit


def test_training_without_memory_says_with_how_many_images_to_go_on(
    tiny_recipe, tmp_path, small_device
):
    recipe = tiny_recipe(iterations=2)
    wanted = fit(recipe, output_dir=tmp_path / "wanted")
    small_device(1, training=True)
    for images, fewer in ((None, 2), (2, 1)):
        with pytest.raises(TrainingMemoryError, match="step 1: no memory to train on") as error:
            fit(recipe, output_dir=tmp_path / "short", images_at_once=images)
        assert (error.value.fewer, str(error.value).count("\n")) == (fewer, 0)
    result = fit(recipe, output_dir=tmp_path / "short", images_at_once=1)
    assert result.metrics["train/loss"] == pytest.approx(wanted.metrics["train/loss"], rel=1e-5)


def test_training_that_fits_no_single_image_ends_with_advice(tiny_recipe, tmp_path, small_device):
    small_device(0, training=True)
    with pytest.raises(TrainingMemoryError, match=r"on 1 image.*lower data\.short_edge") as error:
        fit(tiny_recipe(), output_dir=tmp_path, images_at_once=1)
    assert error.value.fewer is None


def test_images_whose_statistics_train_together_are_never_parted(
    tiny_recipe, tmp_path, small_device
):
    recipe = tiny_recipe()
    backbone = dataclasses.replace(recipe.model.backbone, norm_eval=False)
    model = dataclasses.replace(recipe.model, backbone=backbone)
    small_device(1, training=True)
    with pytest.raises(TrainingMemoryError, match="batch normalisation") as error:
        fit(dataclasses.replace(recipe, model=model), output_dir=tmp_path)
    assert error.value.fewer is None


def test_an_evaluation_without_memory_goes_on_with_fewer_images(
    tiny_recipe, tmp_path, small_device
):
    recipe = tiny_recipe(eval_every=2)
    recipe = dataclasses.replace(recipe, eval=dataclasses.replace(recipe.eval, batch_size=3))
    wanted = fit(recipe, output_dir=tmp_path / "wanted")
    small_device(1, training=False)
    recorder = Recorder()
    result = fit(recipe, callbacks=[recorder], output_dir=tmp_path / "short")
    assert [report.eval_batch for report in recorder.reports] == [1, 1]
    assert reproducible(result.metrics) == pytest.approx(reproducible(wanted.metrics))


def test_an_image_too_large_to_evaluate_is_named(tiny_recipe, tmp_path, small_device):
    small_device(0, training=False)
    with pytest.raises(EvaluationMemoryError, match=r"one image at a time, of .*data\.short_edge"):
        fit(tiny_recipe(), output_dir=tmp_path)


def test_progress_is_heard_of_at_every_step_and_every_evaluated_batch(tiny_recipe, tmp_path):
    heard = []
    fit(tiny_recipe(), output_dir=tmp_path, on_progress=lambda: heard.append(None))
    # Steps, three images after two of them, and the same images for the maps of the kernels.
    assert len(heard) == 4 + 2 * 3 + 3
