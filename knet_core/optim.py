"""AdamW as the authors use it: the backbone learns slower, everything decays (also norms)."""

import torch
from torch import nn

from knet_core.config import OptimConfig
from knet_core.schedule import lr_factor


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over all parameters that train; `model.backbone` is a group of its own."""
    backbone, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (backbone if name.startswith("backbone.") else others).append(parameter)
    groups = [
        {"params": others, "lr": config.lr, "peak_lr": config.lr},
        {
            "params": backbone,
            "lr": config.lr * config.backbone_lr_factor,
            "peak_lr": config.lr * config.backbone_lr_factor,
        },
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        betas=config.betas,
        weight_decay=config.weight_decay,
    )


def set_learning_rate(
    optimizer: torch.optim.Optimizer, step: int, config: OptimConfig, num_iterations: int
) -> float:
    """Set every group's rate for a step (see `lr_factor`) and return that of `config.lr`."""
    factor = lr_factor(step, config, num_iterations)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return config.lr * factor
