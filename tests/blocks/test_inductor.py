"""Blocks compiled to machine code compute the same: one of each family, since each takes many seconds."""

import shutil

import pytest
import torch

from tests.blocks.test_properties import assert_same
from tests.contracts import CONTRACTS
from tests.strategies import normal

COMPILED = (
    *("LayerNorm2d", "PixelShuffleUp", "PLKBlock", "DySample", "MSGDown", "NAFBlock", "SelectiveScan2d"),
    *("DeformableAttention2d", "SwinBlock", "FreqSplit2d", "ModulatedNoiseConv2d up", "LocalStatistics"),
)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", COMPILED)
def test_inductor_computes_the_same(name):
    contract = CONTRACTS[name]
    c = contract.channels[-1]
    x = normal((1, c, 6, 9))
    block = contract.make(c).eval()
    torch._dynamo.reset()
    with torch.no_grad():
        assert_same(torch.compile(block, fullgraph=True)(x), block(x), torch.float32)
