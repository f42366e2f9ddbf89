import io

import numpy as np
import torch
from PIL import Image

from knet_core.config import ShapesConfig
from knet_core.data.shapes import THING_CATEGORIES, ShapesSource
from knet_core.structures import Instances
from knet_core.visualize import contact_sheet, draw_instances


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
