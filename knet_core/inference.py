"""A trained network made ready to predict: the same function of the image in less time.

Every rewrite here is exact algebra on weights; results differ by rounding alone (below 1e-5 of a
map's largest value in float32).
"""

import copy
import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from knet_core.models.kernel_head import PyramidKernels
from knet_core.models.knet import KNet
from knet_core.models.semantic_heads import DenseKernels

_PROBE_SIDE = 64
"""Side in pixels of the image that shows which modules follow each other."""

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_NEVER = -1


def prepare_for_inference(model: KNet, *, channels_last: bool = True) -> KNet:
    """Return a copy of a model for prediction only; the original stays as it is.

    Batch normalisation is folded into the convolutions before it, the product of the pyramid's
    finest convolutions is kept (`PyramidKernels`), and the auxiliary classifier of semantic models
    is left out (`KNetOutput.semantic` is then None).

    Args:
        model: In any mode; the copy is in evaluation mode and wants no gradients.
        channels_last: Memory layout of the weights; maps follow it whatever the image's layout.
    """
    ready = copy.deepcopy(model).eval().requires_grad_(requires_grad=False)
    _fold_batch_norms(ready)
    static = ready.static
    if isinstance(static, DenseKernels):
        static.auxiliary = None
    elif isinstance(static, PyramidKernels):
        static.freeze_product()
    layout = torch.channels_last if channels_last else torch.preserve_format
    prepared: KNet = ready.to(memory_format=layout)
    return prepared


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, where the C library is glibc.

    By default every large map is returned to the system when freed and fetched again, page by
    page, for the next one. Affects allocations from now on; call it once, before training or
    predicting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library: nothing to gain
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, _NEVER)


@torch.no_grad()
def _fold_batch_norms(model: KNet) -> None:
    """Give each convolution the scale and shift of the normalisation that it feeds."""
    names = {module: name for name, module in model.named_modules()}
    for conv, norm in _find_pairs(model):
        _replace(model, names[conv], fuse_conv_bn_eval(conv, norm))
        # timm's BatchNormAct2d is a normalisation that ends in its activation.
        _replace(model, names[norm], getattr(norm, "act", nn.Identity()))


def _find_pairs(model: KNet) -> Iterator[tuple[nn.Conv2d, _BatchNorm]]:
    """Find by a trial run which normalisation takes which convolution's output, and no other's.

    Modules do not tell their order of execution, so names and registration prove nothing. Only
    plain convolutions count: a subclass may change its weight on the way.
    """
    outputs: list[tuple[nn.Module, Tensor]] = []
    inputs: list[tuple[nn.Module, Tensor]] = []
    handles = []
    for module in model.modules():
        if type(module) is nn.Conv2d:
            handles.append(
                module.register_forward_hook(lambda m, _, result: outputs.append((m, result)))
            )
        elif isinstance(module, _BatchNorm):
            handles.append(
                module.register_forward_pre_hook(lambda m, given: inputs.append((m, given[0])))
            )
    weight = next(model.parameters())
    model(torch.zeros(1, 3, _PROBE_SIDE, _PROBE_SIDE, device=weight.device, dtype=weight.dtype))
    for handle in handles:
        handle.remove()
    ran = [module for module, _ in (*outputs, *inputs)]
    for conv, made in outputs:
        takers = [norm for norm, given in inputs if given is made]
        if len(takers) == 1 and ran.count(conv) == ran.count(takers[0]) == 1:
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(takers[0], _BatchNorm)
            yield conv, takers[0]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
