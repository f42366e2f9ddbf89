import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from knet_core.config import DataConfig, SplitConfig

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


@pytest.fixture
def panoptic_folder(tmp_path: Path) -> Callable[..., DataConfig]:
    """Write a small correct panoptic set (3 images of 64 x 48), let a test spoil it, describe it.

    Every image has, from left to right: sky, a cat, a dog, a crowd of dogs, void.
    """

    def write(edit: Edit | None = None, **options: Any) -> DataConfig:
        root = tmp_path / "set"
        document: dict[str, Any] = {
            "images": [],
            "annotations": [],
            "categories": [
                {"id": 7, "name": "dog", "isthing": 1},
                {"id": 90, "name": "grass", "isthing": 0},
                {"id": 5, "name": "sky", "isthing": 0},
                {"id": 8, "name": "cat", "isthing": 1},
            ],
        }
        columns = [(5, 70000), (8, 300), (7, 255), (7, 65536)]
        rng = np.random.default_rng(0)
        for split in ("train", "val"):
            (root / split).mkdir(parents=True)
            (root / "annotations" / f"panoptic_{split}").mkdir(parents=True)
        for number in range(3):
            pixels = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
            ids = np.zeros((48, 64), dtype=np.int64)
            segments = []
            for place, (category, segment) in enumerate(columns):
                ids[:, 12 * place : 12 * place + 12] = segment
                crowd = int(segment == 65536)
                segments.append({"id": segment, "category_id": category, "iscrowd": crowd})
            rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1)
            for split in ("train", "val"):
                Image.fromarray(pixels).save(root / split / f"{number}.jpg")
                folder = root / "annotations" / f"panoptic_{split}"
                Image.fromarray(rgb.astype(np.uint8)).save(folder / f"{number}.png")
            document["images"].append(
                {"id": 10 + number, "file_name": f"{number}.jpg", "height": 48, "width": 64}
            )
            document["annotations"].append(
                {"image_id": 10 + number, "file_name": f"{number}.png", "segments_info": segments}
            )
        if edit:
            edit(document, root)
        for split in ("train", "val"):
            path = root / "annotations" / f"panoptic_{split}.json"
            path.write_text(json.dumps(document))
        sizes: dict[str, Any] = {"short_edge": (48, 48), "long_edge": 64, "flip": 0.0}
        splits = {
            split: SplitConfig(
                images=(split,), annotations=(f"annotations/panoptic_{split}.json",)
            )
            for split in ("train", "val")
        }
        return DataConfig(format="coco_panoptic", root=str(root), **splits, **{**sizes, **options})

    return write


@pytest.fixture
def semantic_folder(tmp_path: Path) -> Callable[..., DataConfig]:
    """Write a small correct set in ADE20K's layout (3 images of 64 x 48, 3 classes).

    Every map has, from left to right: unlabelled, classes 1, 2 and 3.
    """

    def write(**options: Any) -> DataConfig:
        root = tmp_path / "set"
        ids = np.repeat(np.arange(4, dtype=np.uint8), 16)[None].repeat(48, axis=0)
        rng = np.random.default_rng(0)
        for split in ("training", "validation"):
            for kind in ("images", "annotations"):
                (root / kind / split).mkdir(parents=True)
            for number in range(3):
                pixels = rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / "images" / split / f"{number}.jpg")
                Image.fromarray(ids).save(root / "annotations" / split / f"{number}.png")
        sizes: dict[str, Any] = {"short_edge": (48, 48), "long_edge": 64, "flip": 0.0}
        splits = {
            split: SplitConfig(images=(f"images/{name}",), annotations=(f"annotations/{name}",))
            for split, name in (("train", "training"), ("val", "validation"))
        }
        given = {"classes": ("wall", "floor", "door"), **sizes, **options}
        return DataConfig(format="ade20k", root=str(root), **splits, **given)

    return write


@pytest.fixture
def real_set(real_data: Path) -> Callable[..., DataConfig]:
    """Describe a real set as its file in `sweeps/data` does; `name` is also its folder."""

    def describe(file: str, name: str, **options: Any) -> DataConfig:
        text = (Path(__file__).parents[3] / "sweeps" / "data" / f"{file}.yaml").read_text()
        values = yaml.safe_load(text)
        for split in ("train", "val"):
            lists = values[split].items()
            values[split] = SplitConfig(**{key: tuple(names) for key, names in lists})
        classes = tuple(values.get("classes", ()))
        return DataConfig(
            **{**values, "root": str(real_data / name), "classes": classes, **options}
        )

    return describe
