"""SwinBlock and ConvAttention: their formulas, their dtypes, and what they say of their parts."""

import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from claritycore.blocks import (
    ChannelAttention,
    ConvAttention,
    GatedFFN,
    GridAttention,
    HybridAttention,
    OverlappingCrossAttention,
    SwinBlock,
    WindowAttention2d,
)
from tests.blocks.attention_by_hand import stirred
from tests.blocks.test_window_attention import by_hand, tile_by_tile
from tests.strategies import normal

EXACT = {"rtol": 0, "atol": 1e-11}


def layer_norm(norm, x):
    """Over the channels of each pixel."""
    mean = x.mean(1, keepdim=True)
    deviation = ((x - mean).square().mean(1, keepdim=True) + 1e-5).sqrt()
    return (x - mean) / deviation * norm.weight[:, None, None] + norm.bias[:, None, None]


def two_layers(mlp, x):
    hidden = torch.einsum("oc,bchw->bohw", mlp.fc1.weight, x) + mlp.fc1.bias[:, None, None]
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    return torch.einsum("oc,bchw->bohw", mlp.fc2.weight, hidden) + mlp.fc2.bias[:, None, None]


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (5, 7)])
def test_the_block_is_the_formula(post_norm, prompted, size):
    attention = WindowAttention2d(4, 2, window_size=3, shift=1, cosine=post_norm)
    block = stirred(SwinBlock(4, attention, mlp_ratio=1.75, post_norm=post_norm))
    assert block.mlp.fc1.out_features == 7
    x = normal((2, 4, *size), dtype=torch.float64, seed=1)
    logit_scale = 1 + 0.5 * normal((2, 2), dtype=torch.float64, seed=2) if prompted else None
    if post_norm:
        y = x + layer_norm(block.norm1, by_hand(attention, x, logit_scale))
        y = y + layer_norm(block.norm2, two_layers(block.mlp, y))
    else:
        y = x + by_hand(attention, layer_norm(block.norm1, x), logit_scale)
        y = y + two_layers(block.mlp, layer_norm(block.norm2, y))
    torch.testing.assert_close(block(x, logit_scale), y, **EXACT)


def test_another_network_takes_the_place_of_the_two_layers():
    block = stirred(SwinBlock(4, WindowAttention2d(4, 2, window_size=3), ffn=GatedFFN(4)))
    x = normal((1, 4, 5, 6), dtype=torch.float64)
    y = x + block.attn(block.norm1(x))
    torch.testing.assert_close(block(x), y + block.mlp(block.norm2(y)), **EXACT)
    assert (block.receptive_radius, block.tile_multiple, block.tile_safe) == (3, 3, True)


ATTENTIONS = [
    WindowAttention2d(4, 2, window_size=3),
    OverlappingCrossAttention(4, 2, window_size=4),
    GridAttention(4, 2, grid_size=3),
    HybridAttention(4, 2, window_size=3, global_size=2),
    ConvAttention(4, WindowAttention2d(4, 2, window_size=3)),
]


@pytest.mark.parametrize("attention", ATTENTIONS, ids=lambda attention: type(attention).__name__)
def test_a_prompt_reaches_every_attention_and_learns(attention):
    block = SwinBlock(4, attention)
    x = normal((1, 4, 5, 6))
    logit_scale = torch.ones(1, 2, requires_grad=True)
    y = block(x, logit_scale)
    torch.testing.assert_close(y, block(x))
    y.square().sum().backward()
    assert (logit_scale.grad != 0).all()


def test_an_attention_that_does_not_fit_is_refused():
    with pytest.raises(TypeError, match=r"attention must be a module such as WindowAttention2d.*, got 2"):
        SwinBlock(4, 2)
    with pytest.raises(ValueError, match="attention must be for 4 channels, got one for 8"):
        SwinBlock(4, WindowAttention2d(8, 2))
    with pytest.raises(ValueError, match="attention must be for 4 channels, got one for 8"):
        ConvAttention(4, WindowAttention2d(8, 2))


def test_attention_beside_a_convolution_is_the_formula():
    attention = WindowAttention2d(6, 3, window_size=3, shift=2)
    block = stirred(ConvAttention(6, attention, compress=2, reduction=3, scale=0.25))
    assert (block.conv1.out_channels, block.channel_attention.conv_du[0].out_channels) == (3, 2)
    x = normal((2, 6, 5, 4), dtype=torch.float64, seed=1)
    hidden = F.conv2d(x, block.conv1.weight, block.conv1.bias, padding=1)
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    conv = F.conv2d(hidden, block.conv2.weight, block.conv2.bias, padding=1)
    first, last = block.channel_attention.conv_du[0], block.channel_attention.conv_du[2]
    scores = (conv.mean((2, 3)) @ first.weight.flatten(1).T + first.bias).clamp(min=0) @ last.weight.flatten(1).T
    conv = conv / (1 + (-(scores + last.bias)).exp())[:, :, None, None]
    torch.testing.assert_close(block(x), by_hand(attention, x) + 0.25 * conv, **EXACT)
    assert isinstance(block.channel_attention, ChannelAttention)


# Tiles


@pytest.mark.parametrize(
    ("attention", "ffn", "says"),
    [
        (WindowAttention2d(4, 2, window_size=(3, 2), dilation=2), None, (True, 4, 12)),
        (OverlappingCrossAttention(4, 2, window_size=4), None, (True, 4, 4)),
        (WindowAttention2d(4, 2, window_size=4), GatedFFN(4), (True, 4, 4)),
        (GridAttention(4, 2), None, (False, 0, 1)),
        (HybridAttention(4, 2), None, (False, 0, 8)),
        (HybridAttention(4, 2, form="dilated", window_size=(4, 6)), None, (False, 0, 24)),
        (HybridAttention(4, 2, form="grid"), None, (False, 0, 1)),
        (ConvAttention(4, WindowAttention2d(4, 2)), None, (False, 7, 8)),
        (nn.Conv2d(4, 4, 3, padding=1), None, (True, 1, 1)),
        (nn.InstanceNorm2d(4), None, (False, 0, 1)),
    ],
    ids=lambda part: type(part).__name__,
)
def test_a_block_is_as_tile_safe_as_its_parts(attention, ffn, says):
    block = SwinBlock(4, attention, ffn=ffn)
    assert (block.tile_safe, block.receptive_radius, block.tile_multiple) == says


class Stack(nn.Sequential):
    """Blocks one after the other."""

    @property
    def receptive_radius(self):
        return sum(block.receptive_radius for block in self)

    @property
    def tile_multiple(self):
        return math.lcm(*(block.tile_multiple for block in self))


def test_a_stack_of_plain_and_shifted_blocks_tile_by_tile_equals_the_whole():
    attentions = [
        WindowAttention2d(4, 2, window_size=4),
        WindowAttention2d(4, 2, window_size=4, shift=2),
        OverlappingCrossAttention(4, 2, window_size=4),
    ]
    stack = stirred(Stack(*(SwinBlock(4, attention, mlp_ratio=2) for attention in attentions)), strength=0.3)
    x = normal((1, 4, 41, 38), dtype=torch.float64)
    torch.testing.assert_close(tile_by_tile(stack, x), stack(x), **EXACT)


# Half precision


def deep(loud: float) -> nn.Sequential:
    """40 blocks, alternately shifted, of which the last layers are `loud` times what they start as."""
    torch.manual_seed(0)
    blocks = [SwinBlock(16, WindowAttention2d(16, 2, window_size=4, shift=2 * (n % 2))) for n in range(40)]
    with torch.no_grad():
        for block in blocks:
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.mul_(loud)
    return nn.Sequential(*blocks).eval()


def test_forty_blocks_with_a_stream_beyond_float16_stay_finite():
    """As trained nets of this kind have them: the stream grows from block to block, each part normalises it anew."""
    stack, x = deep(30000.0), normal((1, 16, 9, 13))
    with torch.no_grad():
        exact = stack.double()(x.double())
        stack.float()
        assert exact.abs().max() > 2 * torch.finfo(torch.float16).max
        with torch.autocast("cpu", dtype=torch.float16):
            y = stack(x)
        assert y.dtype == torch.float32
        assert y.isfinite().all()
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=0.01 * exact.abs().max().item())
        half = stack.bfloat16()(x.bfloat16())
        assert half.dtype == torch.bfloat16
        assert half.isfinite().all()
        torch.testing.assert_close(half.double(), exact, rtol=0, atol=0.1 * exact.abs().max().item())
        assert not stack.half()(x.half()).isfinite().all(), "a stream in float16 is none: the recipe is needed"


def test_gradients_of_forty_blocks_are_finite_under_autocast():
    stack, x = deep(300.0).train(), normal((1, 16, 9, 13)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        y = stack(x)
    (y * normal(tuple(y.shape), seed=1)).mean().backward()
    for tensor in (x, *stack.parameters()):
        assert tensor.grad.isfinite().all()


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_hot_softmaxes_are_finite_in_half_precision(dtype, cosine):
    """Logits of thousands."""
    block = WindowAttention2d(8, 2, window_size=4, shift=2, cosine=cosine)
    with torch.no_grad():
        block.qkv.weight.mul_(30)
        block.position_bias.relative_position_bias_table.mul_(1e5)
    x = (30 * normal((1, 8, 9, 7))).to(dtype).requires_grad_()
    block.to(dtype)(x).float().square().mean().sqrt().backward()
    for tensor in (x, *block.parameters()):
        assert tensor.grad.isfinite().all()


# Refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SwinBlock(0, nn.Identity()), "channels must be an integer of at least 1, got 0"),
        (
            lambda: SwinBlock(4, nn.Identity(), mlp_ratio=0.2),
            "mlp_ratio must leave at least 1 channel, got 0.2 of 4 channels",
        ),
        (
            lambda: SwinBlock(4, nn.Identity(), mlp_ratio=math.inf),
            "mlp_ratio must leave at least 1 channel, got inf of 4 channels",
        ),
        (lambda: ConvAttention(0, nn.Identity()), "channels must be an integer of at least 1, got 0"),
        (lambda: ConvAttention(4, nn.Identity(), compress=0), "compress must be an integer of at least 1, got 0"),
        (lambda: ConvAttention(4, nn.Identity(), reduction=0), "reduction must be an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments_raise(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


def test_repr():
    assert "8, post_norm=True" in repr(SwinBlock(8, nn.Identity(), post_norm=True))
    assert "8, scale=0.5" in repr(ConvAttention(8, nn.Identity(), scale=0.5))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_vmap_keeps_calls_apart(memory_format):
    block = stirred(SwinBlock(4, WindowAttention2d(4, 2, window_size=3, shift=1)).double())
    x = normal((3, 4, 5, 7), dtype=torch.float64).contiguous(memory_format=memory_format)
    torch.testing.assert_close(torch.vmap(block)(x[:, None])[:, 0], block(x), rtol=0, atol=1e-12)
