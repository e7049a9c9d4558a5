"""What a block prints of itself: the numbers that it was made with."""

import pytest

from claritycore.blocks import NAFBlock, RepConv2d, SelectiveScan2d


@pytest.mark.parametrize(
    ("block", "printed"),
    [
        (RepConv2d(8, 4, kernel_size=5, branches=("5x5", "1x1")), "8, 4, kernel_size=(5, 5), branches=('5x5', '1x1')"),
        (RepConv2d(8, norm="sum"), "norm='sum'"),
        (NAFBlock(8, window_size=5), "window_size=5"),
        (NAFBlock(8), "window_size=None"),
        (SelectiveScan2d(8, expand=1.5, d_conv=5), "8, d_state=16, expand=1.5, dt_rank=1, d_conv=5"),
    ],
)
def test_a_block_prints_its_arguments(block, printed):
    assert printed in repr(block)
