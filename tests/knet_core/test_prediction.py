"""From images to results, against loops over views, windows and pixels."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from knet_core.config import EvalConfig, Recipe
from knet_core.errors import ConfigError, DataError, NonFiniteError
from knet_core.prediction import predict
from knet_core.structures import ImageInfo, ImageSize, KNetOutput, StageOutput
from knet_core.tasks import build_task

CLASSES, STRIDE = 18, 4


class Patches(nn.Module):
    """A semantic model of one convolution: logits at stride 4, of a fixed random filter."""

    def __init__(self, task="semantic"):
        super().__init__()
        recipe = Recipe.from_dict({"model": {"task": task}})
        self.task = build_task(recipe, num_things=CLASSES)
        generator = torch.Generator().manual_seed(0)
        self.filter = torch.randn(CLASSES, 3, 7, 7, generator=generator)
        self.seen = []

    def forward(self, images):
        self.seen.append(tuple(images.shape))
        assert images.shape[-1] % 32 == images.shape[-2] % 32 == 0
        logits = F.conv2d(images, self.filter, stride=STRIDE, padding=3)
        kernels = torch.zeros(len(images), CLASSES, 1)
        stages = tuple(
            StageOutput(masks=sign * logits, class_logits=None, kernels=kernels)
            for sign in (-1.0, 1.0)
        )
        return KNetOutput(stages=stages, semantic=None, padded_size=tuple(images.shape[-2:]))

    def postprocess(self, output, sizes, *, stage=-1):
        return self.task.postprocess(output, sizes, stage)


def smooth_images(*sizes, seed=0):
    """A padded batch of smooth pictures of the sizes given, and each without padding."""
    generator = torch.Generator().manual_seed(seed)
    alone = [
        F.interpolate(torch.randn(1, 3, 6, 7, generator=generator), size=size, mode="bicubic")[0]
        for size in sizes
    ]
    height, width = (32 * math.ceil(max(side) / 32) for side in zip(*sizes, strict=True))
    batch = torch.stack([F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in alone])
    return batch, alone


def naive_logits(model, image, original_size, *, stage=-1):
    """Logits of one picture (3, h, w) at another size, by definition: pad, predict, 2 resizes."""
    height, width = image.shape[-2:]
    padded = F.pad(image, (0, -width % 32, 0, -height % 32))
    logits = model(padded[None]).stages[stage].masks
    logits = F.interpolate(logits, size=tuple(padded.shape[-2:]), mode="bilinear")
    return F.interpolate(logits[..., :height, :width], size=original_size, mode="bilinear")[0]


SIZES = [
    ImageSize(input_size=(64, 96), original_size=(80, 120)),
    ImageSize(input_size=(61, 77), original_size=(61, 77)),
]


def test_a_whole_image_gets_the_likeliest_class_of_its_resized_logits():
    model = Patches()
    batch, alone = smooth_images((64, 96), (61, 77))
    for stage in (0, 1, -1):
        found = predict(model, batch, SIZES, EvalConfig(), stage=stage)
        for result, image, size in zip(found, alone, SIZES, strict=True):
            logits = naive_logits(model, image, size.original_size, stage=stage)
            assert result.labels.dtype == torch.uint8
            # The shared padding of the batch reaches the last row and column of a map.
            inner = slice(0, -16)
            expected = logits.argmax(dim=0)[inner, inner]
            assert (result.labels[inner, inner] == expected).float().mean() > 0.999


def test_a_batch_gives_what_its_images_give_alone():
    model = Patches()
    batch, _ = smooth_images((64, 96), (64, 90), (60, 96))
    sizes = [
        ImageSize(input_size=(64, 96), original_size=(200, 300)),
        ImageSize(input_size=(64, 90), original_size=(64, 90)),
        ImageSize(input_size=(60, 96), original_size=(133, 50)),
    ]
    for evaluation in (EvalConfig(), EvalConfig(flip=True)):
        together = predict(model, batch, sizes, evaluation)
        for place, size in enumerate(sizes):
            (alone,) = predict(model, batch[place : place + 1], [size], evaluation)
            assert torch.equal(alone.labels, together[place].labels)


def test_views_average_the_probabilities_of_scales_and_flips():
    model = Patches()
    batch, alone = smooth_images((64, 96), (61, 77))
    evaluation = EvalConfig(scales=(0.5, 1.0, 1.75), flip=True)
    found = predict(model, batch, SIZES, evaluation)
    for result, image, size in zip(found, alone, SIZES, strict=True):
        mean = torch.zeros(CLASSES, *size.original_size, dtype=torch.float64)
        for scale in (0.5, 1.0, 1.75):
            scaled_size = [int(side * scale + 0.5) for side in size.input_size]
            scaled = F.interpolate(image[None], size=scaled_size, mode="bilinear")[0]
            straight = naive_logits(model, scaled, size.original_size)
            mirrored = naive_logits(model, scaled.flip(-1), size.original_size).flip(-1)
            mean += (straight.double().softmax(dim=0) + mirrored.double().softmax(dim=0)) / 6
        top = mean.topk(2, dim=0).values
        decided = top[0] - top[1] > 1e-5  # float32 sums may decide a tie otherwise
        assert decided.float().mean() > 0.999
        assert torch.equal(result.labels[decided].long(), mean.argmax(dim=0)[decided])


def test_a_flipped_image_gives_the_flipped_map_when_flips_are_averaged():
    batch, _ = smooth_images((64, 96))
    size = [ImageSize(input_size=(64, 96), original_size=(64, 96))]
    evaluation = EvalConfig(flip=True)
    (straight,) = predict(Patches(), batch, size, evaluation)
    (mirrored,) = predict(Patches(), batch.flip(-1), size, evaluation)
    assert torch.equal(straight.labels, mirrored.labels.flip(-1))


@pytest.mark.parametrize(("window", "stride"), [(48, 32), (64, 50), (32, None), (40, 7)])
def test_a_sliding_window_averages_logits_over_the_windows_on_a_pixel(window, stride):
    model = Patches()
    batch, alone = smooth_images((70, 110))
    size = ImageSize(input_size=(70, 110), original_size=(90, 100))
    evaluation = EvalConfig(window=window, window_stride=stride)
    (result,) = predict(model, batch, [size], evaluation)
    step = stride or window * 2 // 3

    def starts(length):
        found, start = [], 0
        while start + window < length:
            found.append(start)
            start += step
        return [*found, length - window] if length > window else [0]

    total = torch.zeros(CLASSES, 70, 110, dtype=torch.float64)
    cover = torch.zeros(70, 110)
    for top in starts(70):
        for left in starts(110):
            crop = alone[0][:, top : top + window, left : left + window]
            logits = naive_logits(model, crop, tuple(crop.shape[-2:]))
            total[:, top : top + window, left : left + window] += logits
            cover[top : top + window, left : left + window] += 1
    assert cover.min() >= 1
    mean = F.interpolate((total / cover)[None], size=(90, 100), mode="bilinear")[0]
    top = mean.topk(2, dim=0).values
    decided = top[0] - top[1] > 1e-4
    assert decided.float().mean() > 0.999
    assert torch.equal(result.labels[decided].long(), mean.argmax(dim=0)[decided])


@pytest.mark.parametrize("window", [96, 200])
def test_a_window_that_covers_the_image_changes_nothing(window):
    batch, _ = smooth_images((64, 96))
    size = [ImageSize(input_size=(64, 96), original_size=(150, 333))]
    (whole,) = predict(Patches(), batch, size, EvalConfig())
    (windowed,) = predict(Patches(), batch, size, EvalConfig(window=window))
    assert torch.equal(whole.labels, windowed.labels)


def test_an_input_that_is_padded_further_keeps_its_map_away_from_the_padding():
    """Padding reaches a map through filters and the resize alone, here 7 and 4 pixels broad."""
    model = Patches()
    batch, _ = smooth_images((64, 96))
    size = [ImageSize(input_size=(64, 96), original_size=(64, 96))]
    (near,) = predict(model, batch, size, EvalConfig())
    (far,) = predict(model, F.pad(batch, (0, 64, 0, 32)), size, EvalConfig())
    assert torch.equal(near.labels[:56, :88], far.labels[:56, :88])


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"scales": (1.0, 0.5)}, "eval.scales"),
        ({"flip": True}, "eval.flip"),
        ({"window": 64}, "eval.window"),
    ],
)
def test_views_of_other_tasks_are_refused_before_the_network_runs(options, key):
    model = Patches(task="panoptic")
    batch, _ = smooth_images((64, 96))
    with pytest.raises(ConfigError, match=f"^{key}: only semantic models"):
        predict(model, batch, SIZES[:1], EvalConfig(**options))
    assert model.seen == []


def test_an_image_with_a_side_under_32_is_named():
    batch, _ = smooth_images((64, 96), (31, 96))
    sizes = [
        SIZES[0],
        ImageInfo(image_id=5, file_name="thin.jpg", input_size=(31, 96), original_size=(5, 15)),
    ]
    message = r"image 1 of the batch \(thin.jpg\): .* 31 x 96 pixels .* at least 32"
    with pytest.raises(DataError, match=message):
        predict(Patches(), batch, sizes, EvalConfig())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_named_with_its_place(value):
    batch, _ = smooth_images((64, 96), (61, 77))
    batch[1, 2, 3, 4] = value
    batch[1, 2, 5, 6] = -value
    message = f"^image 1 of the batch: value {value} in channel 2 at row 3, column 4, and 1 more"
    with pytest.raises(NonFiniteError, match=message):
        predict(Patches(), batch, SIZES, EvalConfig())


def test_large_finite_values_are_no_error():
    batch, _ = smooth_images((64, 96))
    batch[:] = 1e38  # their sum is infinite
    predict(Patches(), batch, SIZES[:1], EvalConfig())
