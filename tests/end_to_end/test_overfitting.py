"""Each task learns a few real photographs by heart: data, losses, results and metrics agree."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from knet_core import fit
from knet_platform.config import load_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SWEEPS = Path(__file__).parents[2] / "sweeps"
COCO_IMAGES = {72, 370, 387, 394}
"""Four of the COCO photographs with 3 to 7 segments each."""
PHOTOGRAPH_EDGE, STREET_EDGE = 128, 64
"""Short edges in pixels that the images are shrunk to."""
SMALL = [
    "data.flip=0",
    "data.num_workers=0",
    "model.backbone={name: test_resnet, pretrained: false, frozen_stages: 0, norm_eval: false}",
    "model.channels=64",
    "model.num_heads=4",
    "model.ffn_channels=128",
    "optim.lr=2e-3",
    "optim.betas=[0.9,0.95]",
    "optim.decay_at=[0.8]",
    "optim.backbone_lr_factor=1",
    "optim.weight_decay=0",
    "optim.warmup_iterations=20",
    "train.channels_last=true",
    "eval.fps_iterations=0",
    "eval.probe_images=0",
]


def steps(count: int, images: int) -> tuple[str, ...]:
    return (f"train.iterations={count}", f"train.eval_every={count}", f"train.batch_size={images}")


def learn(recipe: str, data: str, root: Path, edge: int, *settings: str) -> dict[str, float]:
    size = [f"data.short_edge=[{edge},{edge}]", f"data.long_edge={2 * edge}"]
    overrides = [f"data={SWEEPS / 'data' / data}", f"data.root={root}", *SMALL, *size, *settings]
    return fit(
        load_recipe(SWEEPS / "recipes" / recipe, overrides=overrides), output_dir=root / "out"
    ).metrics


def shrink(source: Path, target: Path, edge: int) -> None:
    """Write a picture with a short edge of that many pixels; decoding it is quick."""
    with Image.open(source) as picture:
        scale = edge / min(picture.size)
        size = (round(picture.width * scale), round(picture.height * scale))
        # What pixels of a PNG mean must stay as it is.
        how = Image.Resampling.NEAREST if source.suffix == ".png" else Image.Resampling.BOX
        picture.resize(size, how).save(target)


def shrunk(image: dict[str, Any], label: dict[str, Any], labels: Path) -> dict[str, Any]:
    """Return an annotation of the label as it is now, and give the image the label's size."""
    pixels = np.array(Image.open(labels / label["file_name"])).astype(int)
    ids = pixels @ [1, 256, 256**2]
    image["height"], image["width"] = ids.shape
    segments = []
    for segment in label["segments_info"]:
        rows, columns = np.nonzero(ids == segment["id"])
        if rows.size:
            corner = int(columns.min()), int(rows.min())
            extent = int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1
            segments.append({**segment, "area": rows.size, "bbox": [*corner, *extent]})
    return {**label, "segments_info": segments}


@pytest.fixture
def four_photographs(real_data: Path, tmp_path: Path) -> Path:
    """The same four images as training and as validation split, small."""
    coco = real_data / "coco_panoptic"
    truth = json.loads((coco / "annotations" / "panoptic_train2017.json").read_text())
    truth["images"] = [i for i in truth["images"] if i["id"] in COCO_IMAGES]
    images = {image["id"]: image for image in truth["images"]}
    labels = tmp_path / "annotations" / "panoptic_train2017"
    labels.mkdir(parents=True)
    (tmp_path / "train2017").mkdir()
    kept = []
    for label in truth["annotations"]:
        if image := images.get(label["image_id"]):
            photograph, drawn = image["file_name"], label["file_name"]
            shrink(
                coco / "train2017" / photograph,
                tmp_path / "train2017" / photograph,
                PHOTOGRAPH_EDGE,
            )
            shrink(
                coco / "annotations" / "panoptic_train2017" / drawn,
                labels / drawn,
                PHOTOGRAPH_EDGE,
            )
            kept.append(shrunk(image, label, labels))
    truth["annotations"] = kept
    (tmp_path / "val2017").symlink_to("train2017")
    labels.with_name("panoptic_val2017").symlink_to(labels.name)
    for split in ("train2017", "val2017"):
        labels.with_name(f"panoptic_{split}.json").write_text(json.dumps(truth))
    return tmp_path


@pytest.fixture
def eight_streets(real_data: Path, tmp_path: Path) -> Path:
    """Eight CamVid frames, as training and as validation split, small."""
    camvid = real_data / "camvid"
    frames = sorted((camvid / "images" / "training").iterdir())[::40][:8]
    for kind in ("images", "annotations"):
        (tmp_path / kind / "training").mkdir(parents=True)
        (tmp_path / kind / "validation").symlink_to("training")
    for frame in frames:
        label = camvid / "annotations" / "training" / f"{frame.stem}.png"
        shrink(frame, tmp_path / "images" / "training" / frame.name, STREET_EDGE)
        shrink(label, tmp_path / "annotations" / "training" / label.name, STREET_EDGE)
    return tmp_path


def test_panoptic_segmentation_learns_four_photographs(four_photographs: Path) -> None:
    metrics = learn(
        "knet_r50_panoptic_1x.yaml",
        "coco_panoptic.yaml",
        four_photographs,
        PHOTOGRAPH_EDGE,
        "model.num_kernels=20",
        "optim.lr=1e-3",
        *steps(100, 4),
    )
    assert metrics["val/PQ"] >= 0.6


def test_instance_segmentation_learns_four_photographs(four_photographs: Path) -> None:
    metrics = learn(
        "knet_r50_instance_1x.yaml",
        "coco_panoptic.yaml",
        four_photographs,
        PHOTOGRAPH_EDGE,
        "model.num_kernels=20",
        *steps(50, 4),
    )
    assert metrics["val/AP"] >= 0.6


def test_semantic_segmentation_learns_eight_streets(eight_streets: Path) -> None:
    metrics = learn(
        "knet_upernet_r50_ade20k.yaml",
        "camvid.yaml",
        eight_streets,
        STREET_EDGE,
        "model.update_channels=null",
        "optim.lr=4e-3",
        "data.crop=null",
        "data.scale_range=[1,1]",
        "data.photometric=false",
        *steps(170, 8),
    )
    assert metrics["val/mIoU"] >= 0.7
