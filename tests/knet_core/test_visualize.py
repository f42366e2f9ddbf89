import io

import numpy as np
import torch
from PIL import Image

from knet_core.config import ShapesConfig
from knet_core.data.shapes import STUFF_CATEGORIES, THING_CATEGORIES, ShapesSource
from knet_core.structures import Instances, PanopticMap, Segment, SemanticMap
from knet_core.visualize import contact_sheet, draw, draw_instances, draw_panoptic, draw_semantic


def instances(score: float) -> Instances:
    masks = torch.zeros(2, 40, 60, dtype=torch.bool)
    masks[0, 5:25, 5:25] = True
    return Instances(scores=torch.tensor([score, 0.1]), labels=torch.tensor([1, 0]), masks=masks)


def test_instances_below_the_threshold_leave_the_image_as_it_is() -> None:
    image = np.full((40, 60, 3), 90, dtype=np.uint8)
    drawn = draw_instances(image, instances(0.2), THING_CATEGORIES, 0.3)
    assert drawn.dtype == np.uint8
    assert (drawn == 90).all()
    assert drawn.shape[0] / drawn.shape[1] == 40 / 60


def test_masks_are_tinted_and_the_rest_is_kept() -> None:
    image = np.full((400, 600, 3), 90, dtype=np.uint8)
    masks = torch.zeros(1, 400, 600, dtype=torch.bool)
    masks[0, 100:300, 100:400] = True
    one = Instances(scores=torch.ones(1), labels=torch.zeros(1).long(), masks=masks)
    drawn = draw_instances(image, one, THING_CATEGORIES)
    changed = (drawn != 90).any(-1)
    assert drawn.shape == image.shape
    assert np.array_equal(changed, masks[0].numpy())


CATEGORIES = THING_CATEGORIES + STUFF_CATEGORIES


def panoptic_map(*ids: int) -> PanopticMap:
    """Two things of one class and a field, or those of them that are named."""
    pixels = torch.zeros(400, 600, dtype=torch.int32)
    pixels[:, :200], pixels[:200, 200:400], pixels[200:, 200:400] = 1000, 2000, 3007
    labels = {1000: 0, 2000: 0, 3007: 7}
    return PanopticMap(
        ids=pixels,
        segments=tuple(Segment(id=i, label=labels[i], score=1.0) for i in ids),
    )


def test_things_of_one_class_differ_and_void_is_kept() -> None:
    image = np.full((400, 600, 3), 90, dtype=np.uint8)
    drawn = draw_panoptic(image, panoptic_map(1000, 2000, 3007), CATEGORIES)
    assert drawn.shape == image.shape
    assert (drawn[:, 400:] == 90).all()
    colours = {tuple(drawn[y, x].tolist()) for y, x in ((20, 20), (20, 220), (380, 220))}
    assert len(colours) == 3
    assert (90, 90, 90) not in colours


def test_stuff_keeps_its_colour_whatever_else_is_there() -> None:
    image = np.full((400, 600, 3), 90, dtype=np.uint8)
    alone = draw_panoptic(image, panoptic_map(3007), CATEGORIES)
    together = draw_panoptic(image, panoptic_map(1000, 2000, 3007), CATEGORIES)
    assert np.array_equal(alone[200:, 200:400], together[200:, 200:400])
    assert (alone[:, :200] == 90).all()


def test_classes_have_colours_of_their_own_and_unlabelled_pixels_none() -> None:
    image = np.full((400, 600, 3), 90, dtype=np.uint8)
    labels = torch.full((400, 600), 255, dtype=torch.uint8)
    for number in range(10):
        labels[40 * number : 40 * number + 40, :500] = number
    drawn = draw_semantic(image, SemanticMap(labels=labels), CATEGORIES)
    assert (drawn[:, 500:] == 90).all()
    assert len({tuple(drawn[40 * number + 5, 5].tolist()) for number in range(10)}) == 10


def test_outlines_lie_on_the_edge_of_a_region() -> None:
    image = np.zeros((400, 600, 3), dtype=np.uint8)
    labels = torch.full((400, 600), 255, dtype=torch.uint8)
    labels[100:300, 100:400] = 3
    drawn = draw_semantic(image, SemanticMap(labels=labels), CATEGORIES).astype(int).sum(-1)
    assert (drawn[100:102, 100:400] == drawn[100, 100]).all()
    assert (drawn[100:300, 398:400] == drawn[100, 100]).all()
    assert drawn[105, 105] < drawn[100, 100]
    assert drawn[99, 100] == drawn[100, 99] == 0


def test_each_kind_of_prediction_is_drawn_by_its_own_rule() -> None:
    image = ShapesSource(ShapesConfig(size=64), "train").image(0)
    image = image.repeat(7, axis=0).repeat(10, axis=1)[:400, :600]
    semantic = SemanticMap(labels=torch.zeros(400, 600, dtype=torch.uint8))
    masks = torch.ones(1, 400, 600, dtype=torch.bool)
    one = Instances(scores=torch.ones(1), labels=torch.zeros(1).long(), masks=masks)
    for prediction, rule in (
        (semantic, draw_semantic),
        (panoptic_map(1000, 3007), draw_panoptic),
        (one, draw_instances),
    ):
        drawn = draw(image, prediction, CATEGORIES)
        assert np.array_equal(drawn, rule(image, prediction, CATEGORIES))


def test_an_image_without_instances_can_be_drawn() -> None:
    image = ShapesSource(ShapesConfig(size=64), "train").image(0)
    none = Instances(
        scores=torch.zeros(0), labels=torch.zeros(0).long(), masks=torch.zeros(0, 64, 64).bool()
    )
    assert draw_instances(image, none, THING_CATEGORIES).shape == (5 * 64, 5 * 64, 3)


def test_a_sheet_holds_every_image_in_rows() -> None:
    images = [np.full((h, w, 3), n, dtype=np.uint8) for n, (h, w) in
              enumerate([(10, 20), (30, 20), (10, 40)], start=1)]  # fmt: skip
    sheet = np.asarray(Image.open(io.BytesIO(contact_sheet(images, columns=2, gap=2))))
    assert sheet.shape == (30 + 10 + 3 * 2, 40 + 20 + 3 * 2, 3)
    for number, image in enumerate(images, start=1):
        assert (sheet == number).all(-1).sum() == image.shape[0] * image.shape[1]
