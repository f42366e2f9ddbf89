import dataclasses

import pytest
import torch

from knet_core import (
    BackboneConfig,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    ShapesConfig,
    TrainConfig,
)


@pytest.fixture
def one_thread():
    """Few cores are shared by many tests; sums are also the same on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_recipe(one_thread):
    """Build a recipe of the real model and data that trains a step in milliseconds."""

    def build(loss=None, model=None, optim=None, **train):
        base = ModelConfig(
            backbone=BackboneConfig(name="test_resnet", pretrained=False),
            channels=32,
            num_kernels=10,
            num_heads=4,
            ffn_channels=32,
            stages=2,
        )
        return Recipe(
            model=dataclasses.replace(base, **(model or {})),
            loss=LossConfig(**(loss or {})),
            data=DataConfig(
                format="shapes",
                shapes=ShapesConfig(num_train=10, num_val=3, size=64),
                short_edge=(64, 64),
                num_workers=0,
            ),
            optim=OptimConfig(**{"warmup_iterations": 2, **(optim or {})}),
            train=TrainConfig(**{"iterations": 4, "batch_size": 4, "log_every": 1, **train}),
            eval=EvalConfig(probe_images=1, fps_iterations=2),
        )

    return build
