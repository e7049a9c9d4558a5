"""GridAttention and HybridAttention against loops over pixels, in float64."""

import re

import pytest
import torch
from torch.nn import functional as F

from claritycore.blocks import GridAttention, HybridAttention, WindowAttention2d
from claritycore.blocks.hybrid_attention import means_of_parts
from tests.blocks.attention_by_hand import attended, bias_by_hand, pixels_of, stirred, window_keys
from tests.strategies import normal

EXACT = {"rtol": 0, "atol": 1e-11}
# Map and grid: such as divide each other, and such as do not; smaller and larger than the map; one pixel.
GRIDS = [((6, 8), (3, 4)), ((7, 5), (3, 3)), ((9, 4), (4, 3)), ((5, 11), (8, 2)), ((3, 2), (8, 8)), ((1, 1), (2, 2))]


def grid_keys(size, grid, bias):
    """Every s-th pixel along an axis belongs together."""
    steps = [-(-n // g) for n, g in zip(size, grid, strict=True)]

    def keys(i, j):
        for k, m in pixels_of(size):
            if (i - k) % steps[0] == 0 and (j - m) % steps[1] == 0:
                yield (k, m), bias((i - k) // steps[0], (j - m) // steps[1])

    return keys


# Grids


@pytest.mark.parametrize(("size", "grid"), GRIDS, ids=str)
@pytest.mark.parametrize("bias", ["table", "cpb", "dynamic", None])
def test_each_pixel_attends_to_every_s_th(size, grid, bias):
    block = stirred(GridAttention(4, 2, grid_size=grid, bias=bias, qkv_bias=bias == "table"))
    x = normal((2, 4, *size), dtype=torch.float64, seed=1)
    expected = attended(block, x, grid_keys(size, grid, bias_by_hand(block.position_bias, grid)))
    torch.testing.assert_close(block(x), expected, **EXACT)


@pytest.mark.parametrize(("size", "grid"), GRIDS, ids=str)
def test_a_grid_spans_the_map_in_few_pixels(size, grid):
    block = stirred(GridAttention(2, 1, grid_size=grid))
    x = normal((1, 2, *size), dtype=torch.float64).requires_grad_()
    y = block(x)
    steps = [-(-n // g) for n, g in zip(size, grid, strict=True)]
    for i, j in pixels_of(size):
        (gradient,) = torch.autograd.grad(y[0, :, i, j] @ normal((2,), dtype=x.dtype), x, retain_graph=True)
        seen = {tuple(pixel) for pixel in gradient[0].abs().sum(0).nonzero().tolist()}
        assert seen == {
            (k, m) for k, m in pixels_of(size) if k % steps[0] == i % steps[0] and m % steps[1] == j % steps[1]
        }
        assert len(seen) <= grid[0] * grid[1]


def test_on_maps_that_it_divides_it_is_the_grid_of_maxvit():
    """Grid partition by a reshape: (G, H / G) and (G, W / G), attention over the G x G."""
    block = stirred(GridAttention(4, 2, grid_size=(2, 4)))
    x = normal((1, 4, 6, 12), dtype=torch.float64)
    cells = x.unflatten(3, (4, 3)).unflatten(2, (2, 3)).permute(0, 3, 5, 1, 2, 4).reshape(9, 4, 2, 4)
    plain = WindowAttention2d(4, 2, window_size=(2, 4)).double()
    plain.load_state_dict(block.state_dict())
    y = plain(cells).reshape(1, 3, 3, 4, 2, 4).permute(0, 3, 4, 1, 5, 2).reshape(1, 4, 6, 12)
    torch.testing.assert_close(block(x), y, **EXACT)


# Windows and tokens


@pytest.mark.parametrize("tokens", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("form", "shift", "size"),
    [
        ("window", 0, (5, 7)),
        ("window", (1, 2), (6, 4)),
        ("window", 2, (1, 1)),
        ("dilated", 1, (7, 9)),
        ("dilated", 0, (2, 3)),
        ("grid", 0, (5, 7)),
        ("grid", 0, (9, 2)),
    ],
)
def test_each_pixel_attends_to_its_window_and_the_tokens(form, shift, size, tokens):
    block = stirred(HybridAttention(4, 2, window_size=3, shift=shift, form=form, global_size=tokens))
    x = normal((2, 4, *size), dtype=torch.float64, seed=1)
    bias = bias_by_hand(block.position_bias, block.window_size)
    if form == "grid":
        keys = grid_keys(size, block.window_size, bias)
    else:
        dilation = (2, 2) if form == "dilated" else (1, 1)
        keys = window_keys(size, block.window_size, bias, shift=block.shift, dilation=dilation)
    pooled = F.adaptive_avg_pool2d(x, tokens).flatten(2) if tokens else None
    torch.testing.assert_close(block(x), attended(block, x, keys, pooled=pooled), **EXACT)


@pytest.mark.parametrize("size", [(1, 1), (3, 8), (7, 5), (8, 16), (13, 30), (2, 1)])
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_tokens_are_the_means_of_adaptive_pooling(size, parts):
    x = normal((2, *size, 3), dtype=torch.float64)
    expected = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), parts).flatten(2).transpose(1, 2)
    torch.testing.assert_close(means_of_parts(x, parts), expected, rtol=0, atol=1e-14)


def test_without_tokens_it_is_window_attention():
    block = stirred(HybridAttention(4, 2, window_size=3, shift=1, global_size=0))
    plain = WindowAttention2d(4, 2, window_size=3, shift=1).double()
    plain.load_state_dict(block.state_dict())
    x = normal((1, 4, 5, 7), dtype=torch.float64)
    assert torch.equal(block(x), plain(x))


def test_tokens_carry_what_no_window_reaches():
    x = normal((1, 4, 9, 9), dtype=torch.float64).requires_grad_()
    for tokens in (0, 2):
        block = stirred(HybridAttention(4, 2, window_size=3, global_size=tokens))
        (gradient,) = torch.autograd.grad(block(x)[0, :, 0, 0] @ normal((4,), dtype=x.dtype), x)
        assert (gradient[0, :, 8, 8].abs().max() > 0) == bool(tokens)


@pytest.mark.parametrize("block", [GridAttention(4, 2), HybridAttention(4, 2)], ids=["grid", "hybrid"])
def test_neither_may_be_tiled(block):
    assert not block.tile_safe


# Refusals


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (GridAttention, {"num_heads": 3}, "num_heads must divide the 8 channels, got 3"),
        (GridAttention, {"grid_size": 0}, "grid_size must be one or two integers of at least 1, got 0"),
        (GridAttention, {"bias": "none"}, "bias must be one of table, cpb, dynamic, got 'none'"),
        (HybridAttention, {"num_heads": 3}, "num_heads must divide the 8 channels, got 3"),
        (HybridAttention, {"window_size": 0}, "window_size must be one or two integers of at least 1, got 0"),
        (HybridAttention, {"form": "strip"}, "form must be one of window, dilated, grid, got 'strip'"),
        (HybridAttention, {"bias": "none"}, "bias must be one of table, cpb, dynamic, got 'none'"),
        (HybridAttention, {"shift": (0, 8)}, "shift must be less than window_size (8, 8), got (0, 8)"),
        (HybridAttention, {"shift": 8, "form": "dilated"}, "shift must be less than window_size (8, 8), got (8, 8)"),
        (HybridAttention, {"shift": -1}, "shift must be one or two integers of at least 0, got -1"),
        (HybridAttention, {"shift": 1, "form": "grid"}, "shift must be 0 for a grid, got (1, 1)"),
        (HybridAttention, {"global_size": -1}, "global_size must be an integer of at least 0, got -1"),
        (HybridAttention, {"global_size": 2.0}, "global_size must be an integer of at least 0, got 2.0"),
    ],
    ids=str,
)
def test_bad_arguments_raise(kind, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        kind(**{"channels": 8, "num_heads": 2} | options)


def test_repr():
    assert "8, 2, grid_size=(4, 4)" in repr(GridAttention(8, 2, grid_size=4))
    text = repr(HybridAttention(8, 2, window_size=4, form="dilated", global_size=2))
    assert "8, 2, window_size=(4, 4), shift=(0, 0), form='dilated', global_size=2" in text
