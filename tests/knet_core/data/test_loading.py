from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from knet_core.config import DataConfig, ShapesConfig
from knet_core.data import TrainStream, build_dataset, collate, eval_loader, train_loader
from knet_core.data.dataset import SegmentationDataset
from knet_core.errors import ConfigError, DataError
from knet_core.structures import Batch

SHAPES = DataConfig(
    format="shapes",
    shapes=ShapesConfig(num_train=7, num_val=5, size=32),
    short_edge=(32, 48),
    long_edge=48,
)


@pytest.fixture(scope="module")
def dataset() -> SegmentationDataset:
    return build_dataset(SHAPES, "train", seed=1)


def batches(dataset: SegmentationDataset, **options: Any) -> list[Batch]:
    defaults: dict[str, Any] = {
        "seed": 1,
        "batch_size": 4,
        "micro_batch": None,
        "rank": 0,
        "world_size": 1,
        "start_step": 0,
        "num_steps": 5,
        "num_workers": 0,
    }
    return list(train_loader(dataset, **{**defaults, **options}))


def same(one: Batch, two: Batch) -> bool:
    return one.images.equal(two.images) and one.infos == two.infos and same_targets(one, two)


def same_targets(one: Batch, two: Batch) -> bool:
    return all(
        a.labels.equal(b.labels) and a.masks.equal(b.masks)
        for a, b in zip(one.targets, two.targets, strict=True)
    )


def ids(loaded: Sequence[Batch]) -> list[int]:
    return [info.image_id for batch in loaded for info in batch.infos]


def test_every_epoch_is_another_permutation_of_all_images() -> None:
    stream = TrainStream(50, seed=3)
    epochs = [[stream.at(50 * epoch + i) for i in range(50)] for epoch in range(3)]
    for epoch, places in enumerate(epochs):
        assert {e for e, _ in places} == {epoch}
        assert sorted(index for _, index in places) == list(range(50))
    assert [i for _, i in epochs[0]] != [i for _, i in epochs[1]]
    assert TrainStream(50, seed=3).at(120) == stream.at(120)
    assert [TrainStream(50, seed=4).at(i) for i in range(50)] != epochs[0]


def test_batches_do_not_depend_on_loader_processes(dataset: SegmentationDataset) -> None:
    alone, helped = batches(dataset), batches(dataset, num_workers=2)
    assert len(alone) == len(helped) == 5
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))


def test_a_resumed_run_sees_what_it_would_have_seen(dataset: SegmentationDataset) -> None:
    whole = batches(dataset)
    resumed = batches(dataset, start_step=3)
    assert all(same(a, b) for a, b in zip(whole[3:], resumed, strict=True))


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 1), (2, None), (2, 1), (4, 1)])
def test_workers_and_micro_batches_share_each_step_exactly(
    dataset: SegmentationDataset, world_size: int, micro_batch: int | None
) -> None:
    whole = batches(dataset)
    ranks = [
        batches(dataset, rank=rank, world_size=world_size, micro_batch=micro_batch)
        for rank in range(world_size)
    ]
    per_step = len(ranks[0]) // 5
    for step, batch in enumerate(whole):
        parts = [b for rank in ranks for b in rank[step * per_step : (step + 1) * per_step]]
        assert ids(parts) == ids([batch])
        targets = [target for part in parts for target in part.targets]
        for mine, theirs in zip(targets, batch.targets, strict=True):
            assert mine.masks.equal(theirs.masks)


def test_augmentation_changes_with_the_epoch_and_nothing_else(
    dataset: SegmentationDataset,
) -> None:
    views = [dataset.load(2, epoch=epoch) for epoch in range(8)]
    assert len({(v.info.input_size, tuple(v.image[0, 0, :3].tolist())) for v in views}) > 3
    assert dataset.load(2, epoch=5).image.equal(views[5].image)
    other = build_dataset(SHAPES, "train", seed=2)
    assert any(not other.load(2, epoch=e).image.equal(v.image) for e, v in enumerate(views))


def test_loading_leaves_the_global_generator_alone(dataset: SegmentationDataset) -> None:
    before = torch.get_rng_state()
    batches(dataset, num_steps=1)
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 5, "world_size": 2}, r"train\.batch_size: 5 images .* 2 workers"),
        ({"batch_size": 8, "world_size": 2, "micro_batch": 3}, r"train\.micro_batch: 3 does not"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused(
    dataset: SegmentationDataset, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        batches(dataset, **options)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_every_image_once(world_size: int, num_workers: int) -> None:
    dataset = build_dataset(SHAPES, "val", seed=0)
    seen = [
        ids(
            list(
                eval_loader(
                    dataset,
                    batch_size=2,
                    rank=rank,
                    world_size=world_size,
                    num_workers=num_workers,
                )
            )
        )
        for rank in range(world_size)
    ]
    assert seen[0] == list(range(1, 6))[::world_size]
    assert sorted(number for part in seen for number in part) == [1, 2, 3, 4, 5]


def test_evaluation_never_flips_and_uses_the_upper_edge() -> None:
    dataset = build_dataset(SHAPES, "val", seed=0)
    one, two = dataset.load(0, epoch=0), dataset.load(0, epoch=9)
    assert one.image.equal(two.image)
    assert one.info.input_size == (48, 48)


def test_batches_are_padded_with_zeros_to_multiples_of_32() -> None:
    dataset = build_dataset(SHAPES, "train", seed=1)
    samples = [dataset.load(i, epoch=0) for i in range(4)]
    batch = collate(samples)
    assert batch.images.shape == (4, 3, 64, 64)
    for image, sample, target in zip(batch.images, samples, batch.targets, strict=True):
        height, width = sample.info.input_size
        assert image[:, :height, :width].equal(sample.image)
        assert image[:, height:].abs().sum() == image[:, :, width:].abs().sum() == 0
        assert target.masks.shape[1:] == (height, width)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_image_stays_one_line_out_of_a_loader_process(
    coco_folder: Callable[..., DataConfig], num_workers: int
) -> None:
    config = coco_folder()
    path = Path(config.root) / "val" / "1.jpg"
    path.write_bytes(path.read_bytes()[:700])
    loader = eval_loader(
        build_dataset(config, "val", seed=0),
        batch_size=1,
        rank=0,
        world_size=1,
        num_workers=num_workers,
    )
    with pytest.raises(DataError, match=r"1\.jpg: cannot be decoded") as caught:
        list(loader)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "classes", "images"),
    [("coco_mini", 80, (80, 78)), ("nuclei", 1, (55, 20)), ("balloon", 1, (46, 10))],
)
def test_real_sets_load(real_data: Path, name: str, classes: int, images: tuple[int, int]) -> None:
    config = DataConfig(root=str(real_data / name), short_edge=(96, 128), long_edge=160)
    train, val = (build_dataset(config, split, seed=0) for split in ("train", "val"))
    assert train.num_classes == val.num_classes == classes
    assert len(train) <= images[0]
    assert len(val) == images[1]
    for batch in batches(train, num_steps=2):
        assert batch.images.isfinite().all()
        assert all(len(target.labels) for target in batch.targets)
        assert all(target.masks.flatten(1).any(1).all() for target in batch.targets)
    assert val.raw_image(0).shape[:2] == val.load(0, epoch=0).info.original_size


# Wide images before tall ones.

TALL = np.array([False, True, True, False, True, False, False, True, False, True, True])


@pytest.fixture
def mixed(coco_folder: Callable[..., DataConfig]) -> Callable[..., SegmentationDataset]:
    """Describe 11 images, some wide and some tall."""

    def edit(document: dict[str, Any], root: Path) -> None:
        document["images"].clear()
        document["annotations"].clear()
        for number, tall in enumerate(TALL.tolist()):
            height, width = (64, 48) if tall else (48, 64)
            for split in ("train", "val"):
                Image.new("RGB", (width, height)).save(root / split / f"{number}.png")
            document["images"].append(
                {"id": number, "file_name": f"{number}.png", "height": height, "width": width}
            )
            document["annotations"].append(
                {"image_id": number, "category_id": 7, "segmentation": [[8, 8, 40, 8, 40, 30]]}
            )

    return lambda **options: build_dataset(coco_folder(edit, **options), "train", seed=1)


def test_a_step_trains_on_the_same_images_with_and_without_grouping() -> None:
    plain, grouped = TrainStream(11, seed=3), TrainStream(11, seed=3, tall=TALL)
    for step in range(20):  # over many epochs, whose ends fall into steps
        one, two = plain.step(step, 4), grouped.step(step, 4)
        assert one == [plain.at(position) for position in range(4 * step, 4 * step + 4)]
        assert sorted(one) == sorted(two)
        assert two == [p for p in one if not TALL[p[1]]] + [p for p in one if TALL[p[1]]]


def test_at_most_one_micro_batch_of_a_step_mixes_wide_and_tall(
    mixed: Callable[..., SegmentationDataset],
) -> None:
    loaded = batches(mixed(), batch_size=8, micro_batch=2, num_steps=6)
    shapes = [{info.input_size for info in batch.infos} for batch in loaded]
    for step in range(6):
        assert sum(len(sizes) > 1 for sizes in shapes[4 * step : 4 * step + 4]) <= 1
    assert {size for sizes in shapes for size in sizes} == {(64, 48), (48, 64)}


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 2), (2, 0), (4, 1)])
def test_grouped_steps_depend_neither_on_workers_nor_on_a_restart(
    mixed: Callable[..., SegmentationDataset], world_size: int, num_workers: int
) -> None:
    dataset = mixed()
    whole = batches(dataset)
    for start in (0, 3):
        ranks = [
            batches(
                dataset,
                rank=rank,
                world_size=world_size,
                num_workers=num_workers,
                start_step=start,
            )
            for rank in range(world_size)
        ]
        for step, batch in enumerate(whole[start:]):
            assert ids([rank[step] for rank in ranks]) == ids([batch])


@pytest.mark.parametrize("options", [{"group_by_aspect": False}, {"crop": 32}])
def test_grouping_is_left_out_where_nobody_asks_for_it(
    mixed: Callable[..., SegmentationDataset], options: dict[str, Any]
) -> None:
    stream = TrainStream(11, seed=1)
    found = ids(batches(mixed(**options)))
    assert found == [stream.at(position)[1] for position in range(20)]
