"""Peers that a benchmark takes where they are installed: stand-ins have the interfaces that they are called by."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import claritycore

ROOT = Path(claritycore.__file__).parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # benchmarks run from a checkout and are never installed

from benchmarks import window_blocks  # noqa: E402


class WindowAttention(nn.Module):
    """What timm's takes: windows (B * windows, pixels, C) and a mask (windows, pixels, pixels)."""

    def __init__(self, dim: int, num_heads: int, head_dim: int | None = None, window_size: int = 7) -> None:
        super().__init__()
        self.num_heads, self.window_size = num_heads, window_size
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        at = torch.cartesian_prod(*2 * [torch.arange(self.window_size)])
        steps = at[:, None] - at + self.window_size - 1
        bias = self.relative_position_bias_table[steps[..., 0] * (2 * self.window_size - 1) + steps[..., 1]]
        bias = bias.permute(2, 0, 1)[None] + mask.repeat(len(x) // len(mask), 1, 1)[:, None]
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))


@pytest.fixture
def timm(monkeypatch):
    module = ModuleType("timm.models.swin_transformer")
    module.WindowAttention = WindowAttention
    for name in ("timm", "timm.models", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)


def test_timm_computes_the_block_with_our_weights(timm):
    case = {"channels": 12, "heads": 3, "window": 4, "size": 8}
    block = window_blocks.swin(case)
    x = torch.randn(2, 12, 8, 12, requires_grad=True)
    theirs = window_blocks.swin_by_timm(block)(x)
    torch.testing.assert_close(theirs, block(x), rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(y.square().sum(), [x, *block.parameters()]) for y in (theirs, block(x))]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_without_timm_it_is_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError):
        window_blocks.swin_by_timm(window_blocks.swin({"channels": 12, "heads": 3, "window": 4, "size": 8}))
