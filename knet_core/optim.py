"""AdamW as the authors use it: a slower backbone, weight decay on everything (also norms)."""

import math
from itertools import product

import torch
from torch import nn

from knet_core.config import OptimConfig

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
_POSITIONS = "relative_position_bias_table"


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over all parameters that train; `model.backbone` is a group of its own.

    With `decay_norms: false` normalisation layers and relative positions make up further groups.
    The published rule goes by names, and so misses batch normalisation and the layer normalisation
    of the mask branch (KNET_SPEC 7).
    """
    undecayed = set() if config.decay_norms else _norms_and_positions(model)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {
        key: [] for key in product((True, False), (False, True))
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter not in undecayed
            groups[decays, name.startswith("backbone.")].append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": lr,
                "peak_lr": lr,
                "weight_decay": config.weight_decay if decays else 0.0,
            }
            for (decays, in_backbone), parameters in groups.items()
            if parameters
            for lr in [config.lr * (config.backbone_lr_factor if in_backbone else 1.0)]
        ],
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,  # one pass over all parameters; a tenth of a small model's step otherwise
    )


def _norms_and_positions(model: nn.Module) -> set[nn.Parameter]:
    norms = {
        parameter
        for module in model.modules()
        if isinstance(module, _NORMS)
        for parameter in module.parameters(recurse=False)
    }
    named = model.named_parameters()
    return norms | {parameter for name, parameter in named if name.endswith(_POSITIONS)}


def lr_factor(step: int, config: OptimConfig, num_iterations: int) -> float:
    """Return the learning rate of a step as a fraction of its peak.

    Linear warm-up times step decay, as in mmcv (KNET_SPEC, section 7), times `rescale_by`.

    Args:
        step: Optimizer steps already done, 0 for the first.
        config: The recipe's `optim` section.
        num_iterations: Optimizer steps of the whole run.
    """
    decays = sum(step >= round(at * num_iterations) for at in config.decay_at)
    rescales = zip(config.rescale_at, config.rescale_by, strict=True)
    factor = config.decay_factor**decays * math.prod(by for at, by in rescales if step >= at)
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
