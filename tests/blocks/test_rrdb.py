"""Dense blocks: residual scales, growth, initial weights."""

import pytest
import torch
from torch.nn import functional as F

from claritycore.blocks import RRDB, ResidualDenseBlock
from tests.strategies import normal


def test_the_dense_block_is_the_formula():
    block = ResidualDenseBlock(3, growth_channels=2).double()
    x = normal((2, 3, 6, 5), dtype=torch.float64)
    grown = [x]
    for conv in (block.conv1, block.conv2, block.conv3, block.conv4):
        y = F.conv2d(torch.cat(grown, 1), conv.weight, conv.bias, padding=1)
        grown.append(torch.maximum(y, 0.2 * y))
    expected = x + 0.2 * F.conv2d(torch.cat(grown, 1), block.conv5.weight, block.conv5.bias, padding=1)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-13)


def test_rrdb_chains_three_and_scales_their_sum():
    block = RRDB(3, growth_channels=2).double()
    x = normal((1, 3, 6, 5), dtype=torch.float64)
    expected = x + 0.2 * block.rdb3(block.rdb2(block.rdb1(x)))
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-13)


def test_initial_weights_are_a_tenth_of_kaimings_and_biases_zero():
    torch.manual_seed(0)
    block = ResidualDenseBlock(64)
    for conv in (block.conv1, block.conv5):
        fan_in = conv.weight[0].numel()
        assert conv.weight.std().item() == pytest.approx(0.1 * (2 / fan_in) ** 0.5, rel=0.02)
        assert (conv.bias == 0).all()


@pytest.mark.parametrize("block", [ResidualDenseBlock, RRDB])
def test_bad_arguments_raise(block):
    with pytest.raises(ValueError, match="channels must be an integer of at least 1, got 0"):
        block(0)
    with pytest.raises(ValueError, match="growth_channels must be an integer of at least 1, got -2"):
        block(4, growth_channels=-2)
