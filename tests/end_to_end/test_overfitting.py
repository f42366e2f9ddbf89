"""Each task learns a few real photographs by heart: data, losses, results and metrics agree."""

import json
import shutil
from pathlib import Path

import pytest

from knet_core import fit
from knet_platform.config import load_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SWEEPS = Path(__file__).parents[2] / "sweeps"
COCO_IMAGES = {72, 370, 387, 394}
"""Four of the COCO photographs with 3 to 7 segments each."""
SMALL = [
    "data.short_edge=[128,128]",
    "data.long_edge=256",
    "data.flip=0",
    "data.num_workers=0",
    "model.backbone={name: test_resnet, pretrained: false, frozen_stages: 0, norm_eval: false}",
    "model.channels=64",
    "model.num_kernels=20",
    "model.num_heads=4",
    "model.ffn_channels=128",
    "optim.lr=2e-3",
    "optim.backbone_lr_factor=1",
    "optim.weight_decay=0",
    "optim.warmup_iterations=20",
    "train.channels_last=true",
    "eval.fps_iterations=0",
    "eval.probe_images=0",
]


def steps(count: int, images: int) -> tuple[str, ...]:
    return (f"train.iterations={count}", f"train.eval_every={count}", f"train.batch_size={images}")


def learn(recipe: str, data: str, root: Path, *settings: str) -> dict[str, float]:
    overrides = [f"data={SWEEPS / 'data' / data}", f"data.root={root}", *SMALL, *settings]
    return fit(
        load_recipe(SWEEPS / "recipes" / recipe, overrides=overrides), output_dir=root / "out"
    ).metrics


@pytest.fixture
def four_photographs(real_data: Path, tmp_path: Path) -> Path:
    """The same four images as training and as validation split."""
    coco = real_data / "coco_panoptic"
    truth = json.loads((coco / "annotations" / "panoptic_train2017.json").read_text())
    truth["images"] = [i for i in truth["images"] if i["id"] in COCO_IMAGES]
    truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] in COCO_IMAGES]
    annotations = tmp_path / "annotations"
    annotations.mkdir()
    for split in ("train2017", "val2017"):
        (tmp_path / split).symlink_to(coco / "train2017")
        (annotations / f"panoptic_{split}.json").write_text(json.dumps(truth))
        (annotations / f"panoptic_{split}").symlink_to(coco / "annotations" / "panoptic_train2017")
    return tmp_path


@pytest.fixture
def eight_streets(real_data: Path, tmp_path: Path) -> Path:
    """Eight CamVid frames, as training and as validation split."""
    camvid = real_data / "camvid"
    frames = sorted((camvid / "images" / "training").iterdir())[::40][:8]
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (tmp_path / kind / split).mkdir(parents=True)
        for frame in frames:
            shutil.copy(frame, tmp_path / "images" / split)
            label = camvid / "annotations" / "training" / f"{frame.stem}.png"
            shutil.copy(label, tmp_path / "annotations" / split)
    return tmp_path


def test_panoptic_segmentation_learns_four_photographs(four_photographs: Path) -> None:
    metrics = learn(
        "knet_r50_panoptic_1x.yaml", "coco_panoptic.yaml", four_photographs, *steps(120, 4)
    )
    assert metrics["val/PQ"] >= 0.6


def test_instance_segmentation_learns_four_photographs(four_photographs: Path) -> None:
    metrics = learn(
        "knet_r50_instance_1x.yaml", "coco_panoptic.yaml", four_photographs, *steps(70, 4)
    )
    assert metrics["val/AP"] >= 0.6


def test_semantic_segmentation_learns_eight_streets(eight_streets: Path) -> None:
    metrics = learn(
        "knet_upernet_r50_ade20k.yaml",
        "camvid.yaml",
        eight_streets,
        "model.update_channels=null",
        "data.short_edge=[96,96]",
        "data.long_edge=192",
        "data.crop=null",
        "data.scale_range=[1,1]",
        "data.photometric=false",
        *steps(150, 8),
    )
    assert metrics["val/mIoU"] >= 0.7
