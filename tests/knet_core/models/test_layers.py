import pytest
import torch
from torch import nn

from knet_core.models.layers import convolve_merged, merge_convolutions


@pytest.mark.parametrize("size", [(4, 4), (8, 6), (16, 24)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_merged_convolutions_equal_one_after_the_other_gradients_included(size, memory_format):
    torch.manual_seed(0)
    first = nn.Conv2d(5, 7, 3, padding=1).double()
    second = nn.Conv2d(7, 4, 3, stride=2, padding=1, bias=False).double()
    maps = torch.randn(2, 5, *size, dtype=torch.float64).to(memory_format=memory_format)
    maps.requires_grad_()
    expected = second(first(maps))
    found = convolve_merged(maps, first, second, merge_convolutions(first, second))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    inputs = [maps, first.weight, first.bias, second.weight]
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, inputs, upstream)
    gradients = torch.autograd.grad(found, inputs, upstream)
    torch.testing.assert_close(gradients, wanted, rtol=1e-12, atol=1e-12)


def test_merged_convolutions_in_bf16_are_as_exact_at_the_border_as_within():
    """Where oneDNN uses AMX, convolutions of stride 2 are wrong on maps two pixels wide."""
    torch.manual_seed(0)
    first = nn.Conv2d(32, 32, 3, padding=1)
    second = nn.Conv2d(32, 32, 3, stride=2, padding=1, bias=False)
    maps = torch.randn(2, 32, 16, 24)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = convolve_merged(maps, first, second, merge_convolutions(first, second)).float()
    error = (found - second(first(maps))).abs()
    assert error.max() < 0.02 * found.abs().max()
