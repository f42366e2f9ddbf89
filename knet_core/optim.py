"""AdamW as the authors use it: a slower backbone, weight decay on everything (also norms)."""

import torch
from torch import nn

from knet_core.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over all parameters that train; `model.backbone` is a group of its own."""
    backbone: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
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
        fused=True,  # one pass over all parameters; a tenth of a small model's step otherwise
    )


def lr_factor(step: int, config: OptimConfig, num_iterations: int) -> float:
    """Return the learning rate of a step as a fraction of its peak.

    Linear warm-up times step decay, as in mmcv (KNET_SPEC, section 7).

    Args:
        step: Optimizer steps already done, 0 for the first.
        config: The recipe's `optim` section.
        num_iterations: Optimizer steps of the whole run.
    """
    decays = sum(step >= round(at * num_iterations) for at in config.decay_at)
    factor = config.decay_factor**decays
    if step < config.warmup_iterations:
        factor *= 1 - (1 - step / config.warmup_iterations) * (1 - config.warmup_factor)
    return factor


def set_learning_rate(
    optimizer: torch.optim.Optimizer, step: int, config: OptimConfig, num_iterations: int
) -> float:
    """Set every group's rate for a step (see `lr_factor`) and return that of `config.lr`."""
    factor = lr_factor(step, config, num_iterations)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return config.lr * factor
