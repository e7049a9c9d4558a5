"""What follows for tiles when parts are put together, torch's own among them."""

import pytest
from torch import nn

from claritycore.blocks import LayerNorm2d, MSGDown, WindowAttention2d
from claritycore.blocks.tiling import Tiling, side_by_side, tiling_of


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (None, (True, 0, 1)),
        (nn.GELU(), (True, 0, 1)),
        (nn.Conv2d(2, 2, (3, 7), padding=(1, 3), dilation=(2, 1)), (True, 3, 1)),
        (nn.Conv2d(2, 2, 3, padding=1, dilation=4), (True, 4, 1)),
        (nn.Conv2d(2, 2, 3, stride=2), (False, 0, 1)),
        (nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 5)), (True, 3, 1)),
        (nn.BatchNorm2d(2), (False, 0, 1)),
        (LayerNorm2d(2), (True, 0, 1)),
        (MSGDown(2, gated=False), (True, 1, 2)),
        (Tiling(True, 5, 4), (True, 5, 4)),
    ],
)
def test_a_part_says_it_or_is_one_of_torchs(part, says):
    assert tiling_of(part) == says


def test_parts_in_a_row_add_up_and_parts_side_by_side_do_not():
    parts = WindowAttention2d(4, 2, window_size=4), nn.Conv2d(4, 4, 3), WindowAttention2d(4, 2, window_size=6)
    assert tiling_of(*parts) == (True, 3 + 1 + 5, 12)
    assert side_by_side(*parts) == (True, 5, 12)
    assert not tiling_of(*parts, nn.BatchNorm2d(4)).tile_safe
    assert tiling_of(*parts).times(2) == (True, 18, 24)
