import dataclasses
import errno
import math
from pathlib import Path

import pytest
import torch

from knet_core import NonFiniteError, build_dataset, build_model
from knet_core.data import Category, collate
from knet_core.trainer import Trainer

CPU = torch.device("cpu")
CATEGORIES = [Category(number, str(number)) for number in range(9)]


@pytest.fixture
def make(tmp_path):
    def build(recipe):
        torch.manual_seed(0)
        model = build_model(recipe, CATEGORIES)
        model.train()
        return Trainer(model, recipe, num_iterations=10, device=CPU, output_dir=tmp_path)

    return build


@pytest.fixture
def batches(tiny_recipe):
    dataset = build_dataset(tiny_recipe().data, "train", seed=0)
    assert dataset.num_classes <= 9
    return [collate([dataset.load(i, epoch=0) for i in (j, j + 1)]) for j in (0, 2)]


def parameters(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def test_a_step_changes_what_trains_and_nothing_else(make, batches, tiny_recipe):
    trainer = make(tiny_recipe())
    before = parameters(trainer)
    trainer.step(5, batches)
    trains = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    after = parameters(trainer)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed <= trains
    assert len(changed) > 0.9 * len(trains)  # some have no gradient at first, behind a zero weight


def test_accumulated_gradients_are_the_mean_over_micro_batches(make, batches, tiny_recipe):
    """Twice the same micro-batch is the same step as once, in losses, gradient and result."""
    once, twice = make(tiny_recipe()), make(tiny_recipe())
    first = once.step(0, batches[:1])
    second = twice.step(0, [batches[0], batches[0]])
    for name, value in first.losses.items():
        assert second.losses[name] == pytest.approx(value.item(), rel=1e-6)
    assert second.grad_norm == pytest.approx(first.grad_norm.item(), rel=1e-5)


def test_one_worker_trains_the_same_with_synchronised_normalisation(make, batches, tiny_recipe):
    backbone = dataclasses.replace(tiny_recipe().model.backbone, norm_eval=False)
    plain, synchronised = (
        make(tiny_recipe(model={"backbone": backbone}, sync_batch_norm=wanted))
        for wanted in (False, True)
    )
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in synchronised.model.modules())
    expected, found = plain.step(5, batches), synchronised.step(5, batches)
    assert {name: value.item() for name, value in found.losses.items()} == {
        name: value.item() for name, value in expected.losses.items()
    }
    before, after = parameters(plain), parameters(synchronised)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_gradients_are_clipped_to_the_stated_norm(make, batches, tiny_recipe, monkeypatch):
    trainer = make(tiny_recipe(optim={"clip_norm": 0.5}))
    norms = []

    def record(optimizer, *_):
        grads = [p.grad.norm() for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.stack(grads).norm().item())

    trainer._optimizer.register_step_pre_hook(record)
    result = trainer.step(0, batches)
    assert result.grad_norm > 0.5
    assert norms == [pytest.approx(0.5, rel=1e-4)]


def test_channels_last_gives_the_same_step(make, batches, tiny_recipe):
    results = [make(tiny_recipe(channels_last=value)).step(0, batches) for value in (False, True)]
    for name, value in results[0].losses.items():
        assert results[1].losses[name] == pytest.approx(value.item(), rel=1e-4)


def failed(trainer, batches, tmp_path):
    """Do step 8, which must fail, and return the message and the dump."""
    before = parameters(trainer)
    with pytest.raises(NonFiniteError) as error:
        trainer.step(7, batches)
    for name, value in parameters(trainer).items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("step 8: ")
    assert str(tmp_path / "nonfinite_step8.pt") in message
    return message, torch.load(tmp_path / "nonfinite_step8.pt", weights_only=True)


def test_a_nan_cost_stops_with_image_ids_and_a_dump(make, batches, tiny_recipe, tmp_path):
    trainer = make(tiny_recipe())
    batches[1].images[1, 0, 0, 0] = math.nan
    message, dump = failed(trainer, batches, tmp_path)
    ids = [info.image_id for info in batches[1].infos]
    assert "image 1 of the batch: matching cost is NaN" in message
    assert f"ids {ids} (in this order) are saved" in message
    assert dump["image_ids"] == ids
    assert [tuple(image.shape) for image in dump["images"]] == [(3, 64, 64)] * 2
    for target, masks, labels in zip(
        batches[1].targets, dump["masks"], dump["labels"], strict=True
    ):
        assert torch.equal(masks, target.masks)
        assert torch.equal(labels, target.labels)
    (costs,) = dump["costs"]
    assert [cost.shape for cost in costs] == [(10, len(t.labels)) for t in batches[1].targets]
    assert costs[0].isfinite().all()
    assert costs[1].isnan().any()


def test_a_full_disk_does_not_hide_a_nan(make, batches, tiny_recipe, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    batches[0].images[0] = math.nan
    with pytest.raises(NonFiniteError, match=r"matching cost is NaN.*not saved \(.*No space left"):
        make(tiny_recipe()).step(0, batches)


def test_an_infinite_loss_names_the_micro_batch_and_keeps_its_terms(
    make, batches, tiny_recipe, tmp_path
):
    trainer = make(tiny_recipe())
    criterion, factors = trainer.model.criterion, [1.0, math.inf]

    def second_explodes(output, targets):
        terms = criterion(output, targets)
        return dataclasses.replace(terms, seg=terms.seg * factors.pop(0))

    trainer.model.criterion = second_explodes
    message, dump = failed(trainer, batches, tmp_path)
    assert "the loss is not finite" in message
    assert dump["image_ids"] == [info.image_id for info in batches[1].infos]
    assert dump["losses"][0]["seg"] == math.inf
    assert math.isfinite(dump["losses"][0]["stage0/dice"])
    (costs,) = dump["costs"]
    assert len(costs) == 2 * 2  # images x stages that were matched
    assert all(cost.isfinite().all() for cost in costs)


def test_a_nan_gradient_stops_although_the_loss_is_finite(make, batches, tiny_recipe, tmp_path):
    trainer = make(tiny_recipe())
    weight = next(p for p in trainer.model.static.fpn.parameters() if p.requires_grad)
    weight.register_hook(lambda gradient: gradient * math.nan)
    message, dump = failed(trainer, batches, tmp_path)
    assert "a gradient is not finite, although every loss is" in message
    assert len(dump["image_ids"]) == 4
    assert len(dump["losses"]) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_on_a_gpu(tiny_recipe, batches, tmp_path, precision):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    recipe = tiny_recipe(precision=precision, channels_last=True)
    model = build_model(recipe, CATEGORIES).train()
    device = torch.device("cuda")
    trainer = Trainer(model, recipe, num_iterations=10, device=device, output_dir=tmp_path)
    losses = [sum(trainer.step(i, batches).losses.values()).item() for i in range(5)]
    assert all(map(math.isfinite, losses))
    other = Trainer(model, recipe, num_iterations=10, device=device, output_dir=tmp_path)
    other.load_state_dict(trainer.state_dict())
    assert other.state_dict()["scaler"] == trainer.state_dict()["scaler"]
