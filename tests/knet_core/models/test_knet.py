import dataclasses
import math

import pytest
import torch

from knet_core import BackboneConfig, ConfigError, ImageSize, ModelConfig, Recipe, build_model
from knet_core.config import SemanticConfig
from knet_core.data import Category
from knet_core.models.fpn import FPN
from knet_core.models.positional import coordinate_channels, sine_encoding

R50 = BackboneConfig(name="resnet50", pretrained=False)
TINY = BackboneConfig(name="test_resnet", pretrained=False, frozen_stages=0)


def build(config, num_classes=80):
    return build_model(Recipe(model=config), [Category(i, str(i)) for i in range(num_classes)])


@pytest.mark.parametrize(
    ("backbone", "num_kernels", "total", "trainable"),
    [  # KNET_SPEC 9.5
        ("resnet50", 100, 37_482_368, 37_257_024),
        ("resnet50", 256, 37_522_304, 37_296_960),
        ("resnet101", 100, 56_474_496, 56_249_152),
    ],
)
def test_parameters_are_as_many_as_published(backbone, num_kernels, total, trainable):
    config = ModelConfig(
        backbone=BackboneConfig(name=backbone, pretrained=False), num_kernels=num_kernels
    )
    with torch.device("meta"):
        model = build(config)
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable


@pytest.mark.parametrize("stages", [1, 2, 5])
def test_one_prediction_per_stage_and_one_of_the_static_kernels(stages):
    model = build(ModelConfig(backbone=TINY, channels=32, num_kernels=7, stages=stages), 4)
    output = model(torch.randn(2, 3, 64, 96))
    assert len(output.stages) == stages + 1
    assert output.stages[0].class_logits is None
    for stage in output.stages:
        assert stage.masks.shape == (2, 7, 8, 12)
        assert stage.kernels.shape == (2, 7, 32)
    assert output.stages[-1].class_logits.shape == (2, 7, 4)
    assert output.semantic.shape == (2, 4, 8, 12)


def semantic(head, **values):
    config = SemanticConfig(head=head)
    return ModelConfig(
        task="semantic", semantic=config, backbone=TINY, channels=32, grouping="soft", **values
    )


@pytest.mark.parametrize("stages", [0, 2])
@pytest.mark.parametrize(("head", "stride"), [("fcn", 8), ("upernet", 4)])
def test_a_semantic_model_has_one_kernel_per_class_and_predicts_at_its_heads_stride(
    head, stride, stages
):
    backbone = dataclasses.replace(TINY, output_stride=8 if head == "fcn" else 32)
    config = dataclasses.replace(semantic(head, stages=stages), backbone=backbone)
    output = build(config, 5)(torch.randn(2, 3, 64, 96))
    assert len(output.stages) == stages + 1
    for stage in output.stages:
        assert stage.masks.shape == (2, 5, 64 // stride, 96 // stride)
        assert stage.kernels.shape == (2, 5, 32)
        assert stage.class_logits is None
    assert output.semantic.shape[:2] == (2, 5)


def test_panoptic_rows_are_instances_first_and_then_stuff_by_class():
    config = ModelConfig(task="panoptic", backbone=TINY, channels=32, num_kernels=7)
    classes = [Category(i, str(i), isthing=i < 3) for i in range(5)]
    output = build_model(Recipe(model=config), classes)(torch.randn(2, 3, 64, 96))
    for stage in output.stages:
        assert stage.masks.shape == (2, 7 + 2, 8, 12)
    assert torch.equal(output.stages[0].masks[:, 7:], output.semantic[:, 3:])
    assert output.stages[-1].class_logits.shape == (2, 9, 5)


def test_stuff_is_no_matter_of_instance_segmentation():
    classes = [Category(0, "a"), Category(1, "b", isthing=False)]
    with pytest.raises(ConfigError, match=r"model\.task: .* 1 of the data set's 2"):
        build_model(Recipe(model=ModelConfig(backbone=TINY, channels=32)), classes)


@pytest.mark.parametrize("switch", ["adaptive_update", "interaction", "positional_encoding"])
def test_every_switch_changes_the_prediction(switch):
    outputs = []
    for value in (True, False):
        torch.manual_seed(0)
        model = build(ModelConfig(backbone=TINY, channels=32, **{switch: value}), 4).eval()
        outputs.append(model(torch.ones(1, 3, 64, 64)).stages[-1].masks)
    assert not torch.allclose(*outputs)


@pytest.mark.parametrize("kind", ["instance", "fcn", "upernet"])
def test_batched_images_predict_as_alone(kind):
    torch.manual_seed(0)
    config = ModelConfig(backbone=TINY, channels=32, num_kernels=7)
    model = build(config if kind == "instance" else semantic(kind), 4).eval().double()
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    together = model(images).stages[-1]
    for index in range(3):
        alone = model(images[index : index + 1]).stages[-1]
        torch.testing.assert_close(together.masks[index], alone.masks[0], rtol=1e-8, atol=1e-8)


def test_frozen_stages_stay_frozen_and_normalisation_in_evaluation_mode():
    model = build(ModelConfig(backbone=R50)).train()
    trunk = model.backbone.trunk
    assert not any(
        p.requires_grad for p in (*trunk.conv1.parameters(), *trunk.layer1.parameters())
    )
    assert all(p.requires_grad for p in trunk.layer2.parameters())
    assert not trunk.layer3[0].bn1.training
    assert model.static.semantic_fpn.training


def test_every_trainable_parameter_gets_a_gradient():
    from knet_core import Targets

    model = build(ModelConfig(backbone=TINY, channels=32, num_kernels=7), 4)
    target = Targets(labels=torch.tensor([1]), masks=torch.ones(1, 64, 64, dtype=torch.uint8))
    model.criterion(model(torch.randn(1, 3, 64, 64)), [target]).total().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_sine_encoding_follows_the_formula():
    height, width, channels = 3, 5, 16
    encoding = sine_encoding(height, width, channels, torch.zeros(1, dtype=torch.float64))
    half = channels // 2
    for c in range(channels):
        k = c % half
        for i in range(height):
            for j in range(width):
                place = (i + 1) / (height + 1e-6) if c < half else (j + 1) / (width + 1e-6)
                angle = place * 2 * math.pi / 10000 ** (2 * (k // 2) / half)
                expected = math.sin(angle) if k % 2 == 0 else math.cos(angle)
                assert encoding[c, i, j].item() == pytest.approx(expected, abs=2e-6)


def test_coordinates_are_x_then_y_from_minus_one_to_one():
    x, y = coordinate_channels(2, 3, torch.zeros(1))
    assert x.tolist() == [[-1, 0, 1], [-1, 0, 1]]
    assert y.tolist() == [[-1, -1, -1], [1, 1, 1]]


def test_pyramid_adds_nearest_neighbours_from_above():
    torch.manual_seed(0)
    fpn = FPN([4, 6], 8)
    fine, coarse = torch.randn(1, 4, 5, 7), torch.randn(1, 6, 3, 4)
    top = fpn.laterals[1](coarse)
    rows = [math.floor(i * 3 / 5) for i in range(5)]
    columns = [math.floor(j * 4 / 7) for j in range(7)]
    finest, coarser = fpn([fine, coarse])
    expected = fpn.laterals[0](fine) + top[:, :, rows][:, :, :, columns]
    torch.testing.assert_close(finest, expected)
    torch.testing.assert_close(coarser, [fpn.outputs[1](top)])


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (BackboneConfig(name="resnet500", pretrained=False), "timm cannot build 'resnet500'"),
        (BackboneConfig(name="vit_tiny_patch16_224", pretrained=False), "strides"),
    ],
)
def test_an_impossible_backbone_is_one_line(backbone, message):
    with pytest.raises(ConfigError, match=message) as error:
        build(ModelConfig(backbone=backbone))
    assert "\n" not in str(error.value)


def test_no_class_is_refused():
    with pytest.raises(ConfigError, match="0 categories"):
        build(ModelConfig(backbone=TINY, channels=32), num_classes=0)


def test_a_bare_size_stands_for_an_image_without_padding():
    torch.manual_seed(0)
    model = build(ModelConfig(backbone=TINY, channels=32, num_kernels=7), 4).eval()
    output = model(torch.randn(1, 3, 64, 96))
    (bare,) = model.postprocess(output, [(50, 70)])
    (full,) = model.postprocess(output, [ImageSize(input_size=(64, 96), original_size=(50, 70))])
    assert torch.equal(bare.masks, full.masks)
    assert bare.masks.shape[1:] == (50, 70)
