"""SPAB: the paper's formula with deployed kernels, and how it is trained."""

import torch
from torch.nn import functional as F

from claritycore.blocks import SPAB, reparameterize_model
from tests.strategies import normal


def test_the_block_is_the_formula():
    torch.manual_seed(0)
    block = SPAB(6).double()
    weights = reparameterize_model(block).state_dict()
    x = normal((2, 6, 7, 9), dtype=torch.float64)

    def conv(x, name):
        return F.conv2d(x, weights[f"{name}.fused.weight"], weights[f"{name}.fused.bias"], padding=1)

    first = F.silu(conv(x, "conv1"))
    z = conv(F.silu(conv(first, "conv2")), "conv3")
    expected = (z + x) * (torch.sigmoid(z) - 0.5)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)
    y, activated = block(x, return_first=True)
    assert torch.equal(y, block(x))
    torch.testing.assert_close(activated, first, rtol=0, atol=1e-12)


def test_each_convolution_is_trained_with_doubled_channels_inside_and_a_point_beside():
    conv = SPAB(6).conv2
    chain, point = conv.branches
    assert [tuple(c.weight.shape) for c in chain.convs] == [(12, 6, 1, 1), (12, 12, 3, 3), (6, 12, 1, 1)]
    assert [tuple(c.weight.shape) for c in point.convs] == [(6, 6, 1, 1)]


def test_a_small_gate_keeps_its_digits_in_half_precision():
    torch.manual_seed(0)
    block = SPAB(6).double()
    with torch.no_grad():
        for part in block.modules():
            if hasattr(part, "last_factor"):
                for parameter in part.last_factor():
                    parameter.mul_(1e-2)
    block = reparameterize_model(block)
    x = normal((1, 6, 8, 8), dtype=torch.float64)
    exact = block(x)
    half = block.bfloat16()(x.bfloat16()).double()
    assert exact.abs().max() < 0.01
    torch.testing.assert_close(half, exact, rtol=0, atol=0.03 * exact.abs().max().item())
