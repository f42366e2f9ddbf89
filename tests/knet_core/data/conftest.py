import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from knet_core.config import DataConfig

Edit = Callable[[dict[str, Any], Path], None]


@pytest.fixture
def coco_folder(tmp_path: Path) -> Callable[..., DataConfig]:
    """Write a small correct data set (3 images of 64 x 48), let a test spoil it, describe it."""

    def write(edit: Edit | None = None, **options: Any) -> DataConfig:
        root = tmp_path / "set"
        document: dict[str, Any] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        }
        rng = np.random.default_rng(0)
        for folder in ("train", "val"):
            (root / folder).mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
            for folder in ("train", "val"):
                Image.fromarray(pixels).save(root / folder / f"{number}.jpg")
            document["images"].append(
                {"id": 10 + number, "file_name": f"{number}.jpg", "height": 48, "width": 64}
            )
            document["annotations"].append(
                {
                    "id": 100 + number,
                    "image_id": 10 + number,
                    "category_id": 7,
                    "iscrowd": 0,
                    "segmentation": [[8, 8, 40, 8, 40, 30, 8, 30]],
                }
            )
        if edit:
            edit(document, root)
        (root / "annotations").mkdir()
        for split in ("train", "val"):
            path = root / "annotations" / f"instances_{split}.json"
            path.write_text(json.dumps(document))
        sizes: dict[str, Any] = {"short_edge": (48, 48), "long_edge": 64, "flip": 0.0}
        return DataConfig(root=str(root), **{**sizes, **options})

    return write
