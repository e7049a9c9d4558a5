"""WindowAttention2d, OverlappingCrossAttention and the position biases against loops over pixels, in float64."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from claritycore.blocks import OverlappingCrossAttention, WindowAttention2d
from claritycore.blocks.position_bias import ContinuousBias, DynamicBias, TableBias
from tests.blocks.attention_by_hand import attended, bias_by_hand, pixels_of, stirred, window_keys
from tests.strategies import normal

EXACT = {"rtol": 0, "atol": 1e-11}

# Map, window, shift: 1 x 1, windows larger than the map along one axis or both, odd, rectangular, every kind of shift.
CUTS = [
    ((1, 1), (3, 3), (0, 0)),
    ((1, 1), (4, 2), (3, 1)),
    ((5, 7), (8, 8), (0, 0)),
    ((5, 7), (8, 8), (4, 4)),
    ((2, 9), (7, 3), (3, 1)),
    ((6, 8), (3, 4), (0, 0)),
    ((6, 8), (3, 4), (1, 2)),
    ((7, 5), (3, 3), (2, 0)),
    ((1, 9), (1, 4), (0, 3)),
]


def by_hand(block, x, logit_scale=None):
    """WindowAttention2d from its docstring."""
    bias = bias_by_hand(block.position_bias, block.window_size)
    size = (x.shape[2], x.shape[3])
    keys = window_keys(size, block.window_size, bias, shift=block.shift, dilation=block.dilation)
    learned = None if block.log_scale is None else block.log_scale.exp().clamp(max=100)

    def scale(image, head):
        own = 1 / math.sqrt(block.channels // block.num_heads) if learned is None else learned[head]
        return own * (1.0 if logit_scale is None else logit_scale[image, head])

    return attended(block, x, keys, scale=scale, cosine=learned is not None)


# Windows


@pytest.mark.parametrize(("size", "window", "shift"), CUTS, ids=str)
@pytest.mark.parametrize("cosine", [False, True])
def test_each_pixel_attends_to_its_window(size, window, shift, cosine):
    block = stirred(WindowAttention2d(6, 3, window_size=window, shift=shift, cosine=cosine))
    x = normal((2, 6, *size), dtype=torch.float64, seed=1)
    torch.testing.assert_close(block(x), by_hand(block, x), **EXACT)


@pytest.mark.parametrize(
    ("size", "window", "shift", "dilation"),
    [
        ((9, 7), (2, 3), (0, 0), (2, 2)),
        ((9, 7), (2, 3), (1, 2), (3, 2)),
        ((5, 8), (3, 2), (2, 0), (1, 5)),
        ((3, 2), (2, 2), (1, 1), (7, 4)),
        ((1, 1), (2, 2), (1, 0), (3, 3)),
    ],
    ids=str,
)
def test_of_dilated_windows_every_second_or_third_pixel_belongs_together(size, window, shift, dilation):
    block = stirred(WindowAttention2d(4, 2, window_size=window, shift=shift, dilation=dilation))
    x = normal((2, 4, *size), dtype=torch.float64, seed=1)
    torch.testing.assert_close(block(x), by_hand(block, x), **EXACT)


@pytest.mark.parametrize("bias", ["table", "cpb", "dynamic", None])
@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("window", [(3, 3), (1, 4)])
def test_each_bias_is_the_formula(bias, qkv_bias, window):
    block = stirred(WindowAttention2d(4, 2, window_size=window, shift=(0, 2), bias=bias, qkv_bias=qkv_bias))
    x = normal((1, 4, 5, 7), dtype=torch.float64, seed=1)
    torch.testing.assert_close(block(x), by_hand(block, x), **EXACT)
    if block.position_bias is not None:
        assert block.position_bias().std() > 0.1, "a bias near zero tests nothing"


@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    window=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    data=st.data(),
)
def test_a_gradient_is_zero_outside_the_window_and_nowhere_zero_inside(size, window, data):
    shift = tuple(data.draw(st.integers(0, w - 1)) for w in window)
    dilation = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    block = stirred(WindowAttention2d(2, 1, window_size=window, shift=shift, dilation=dilation))
    x = normal((1, 2, *size), dtype=torch.float64, seed=1).requires_grad_()
    i, j = (data.draw(st.integers(0, n - 1)) for n in size)
    (gradient,) = torch.autograd.grad(block(x)[0, :, i, j] @ normal((2,), dtype=x.dtype, seed=2), x)
    seen = {tuple(pixel) for pixel in gradient[0].abs().sum(0).nonzero().tolist()}
    keys = window_keys(size, window, lambda dy, dx: 0.0, shift=shift, dilation=dilation)
    assert seen == {pixel for pixel, _ in keys(i, j)}


def test_one_number_stands_for_both_axes():
    block, pairs = (WindowAttention2d(4, 2, window_size=w, shift=s) for w, s in ((4, 2), ((4, 4), [2, 2])))
    assert (block.window_size, block.shift) == (pairs.window_size, pairs.shift) == ((4, 4), (2, 2))


# Cosines, and logits scaled from outside


def test_learned_scales_stop_at_100():
    block = stirred(WindowAttention2d(4, 2, window_size=3, cosine=True))
    x = normal((1, 4, 4, 5), dtype=torch.float64)
    results = []
    for scale in (math.log(100), math.log(101), 50.0, math.log(99)):
        with torch.no_grad():
            block.log_scale.fill_(scale)
        results.append(block(x))
        torch.testing.assert_close(results[-1], by_hand(block, x), **EXACT)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert not torch.allclose(results[0], results[3], atol=1e-6)
    assert block.log_scale.shape == (2,)
    assert WindowAttention2d(4, 2, cosine=True).log_scale.exp().tolist() == pytest.approx([10.0, 10.0])


def test_cosines_ignore_lengths():
    block = stirred(WindowAttention2d(4, 2, window_size=3, bias=None, cosine=True, qkv_bias=False))
    x = normal((1, 4, 4, 5), dtype=torch.float64)
    grown = block(7 * x) - block.proj.bias[:, None, None]
    torch.testing.assert_close(grown, 7 * (block(x) - block.proj.bias[:, None, None]), **EXACT)


@pytest.mark.parametrize("cosine", [False, True])
def test_a_prompt_scales_the_logits_and_learns(cosine):
    block = stirred(WindowAttention2d(6, 3, window_size=3, shift=1, cosine=cosine))
    x = normal((2, 6, 5, 4), dtype=torch.float64, seed=1)
    logit_scale = (1 + 0.5 * normal((2, 3), dtype=torch.float64, seed=2)).requires_grad_()
    upstream = normal((2, 6, 5, 4), dtype=torch.float64, seed=3)
    inputs = [logit_scale, x.requires_grad_(), *block.parameters()]
    y, expected = block(x, logit_scale), by_hand(block, x, logit_scale)
    torch.testing.assert_close(y, expected, **EXACT)
    for gradient, right in zip(*(torch.autograd.grad(z, inputs, upstream) for z in (y, expected)), strict=True):
        assert (right != 0).any()
        torch.testing.assert_close(gradient, right, rtol=0, atol=1e-10)


def test_a_scale_of_ones_changes_nothing_and_one_of_zeros_leaves_the_bias_alone():
    block = stirred(WindowAttention2d(4, 2, window_size=3, bias=None))
    x = normal((2, 4, 3, 3), dtype=torch.float64)
    torch.testing.assert_close(block(x, torch.ones(2, 2, dtype=x.dtype)), block(x), **EXACT)
    means = block(x, torch.zeros(2, 2, dtype=x.dtype))
    torch.testing.assert_close(means, means[:, :, :1, :1].expand_as(means), **EXACT)


# Overlapping windows


def overlapping_by_hand(block, x):
    """OverlappingCrossAttention from its docstring."""
    (height, width), window, wider = x.shape[2:], block.window_size, block.key_window_size
    bias = bias_by_hand(block.position_bias, window, wider)
    margins = [(k - w) // 2 for w, k in zip(window, wider, strict=True)]

    def keys(i, j):
        for p, q in pixels_of(wider):
            k, m = (n // w * w - e + o for n, w, e, o in zip((i, j), window, margins, (p, q), strict=True))
            inside = 0 <= k < height and 0 <= m < width
            if inside or block.zero_border:
                yield (k, m) if inside else None, bias(i - k, j - m)

    return attended(block, x, keys)


@pytest.mark.parametrize(
    ("size", "window", "ratio"),
    [
        ((1, 1), 4, 0.5),
        ((5, 7), 4, 0.5),
        ((8, 4), 4, 1.0),
        ((3, 10), (2, 3), 2.0),
        ((6, 5), (1, 2), 4.0),
        ((4, 5), 3, 0.0),
        ((4, 5), 5, 0.5),
    ],
    ids=str,
)
@pytest.mark.parametrize("zero_border", [False, True])
def test_each_pixel_attends_to_a_larger_window(size, window, ratio, zero_border):
    block = stirred(OverlappingCrossAttention(4, 2, window_size=window, overlap_ratio=ratio, zero_border=zero_border))
    x = normal((2, 4, *size), dtype=torch.float64, seed=1)
    torch.testing.assert_close(block(x), overlapping_by_hand(block, x), **EXACT)


@pytest.mark.parametrize("bias", ["cpb", "dynamic", None])
def test_the_other_biases_of_larger_windows_go_by_the_offset_too(bias):
    block = stirred(OverlappingCrossAttention(4, 2, window_size=(2, 4), overlap_ratio=1.0, bias=bias, qkv_bias=False))
    x = normal((1, 4, 5, 7), dtype=torch.float64, seed=1)
    torch.testing.assert_close(block(x), overlapping_by_hand(block, x), **EXACT)


def test_larger_windows_without_overlap_are_windows():
    block = stirred(OverlappingCrossAttention(4, 2, window_size=3, overlap_ratio=0.3))
    assert block.key_window_size == (3, 3)
    plain = WindowAttention2d(4, 2, window_size=3).double()
    plain.load_state_dict(block.state_dict())
    x = normal((1, 4, 7, 8), dtype=torch.float64)
    torch.testing.assert_close(block(x), plain(x), **EXACT)


# Position biases alone


@pytest.mark.parametrize("kind", [TableBias, ContinuousBias, DynamicBias])
@pytest.mark.parametrize("window", [(1, 1), (3, 3), (2, 5)])
@pytest.mark.parametrize("extra", [0, 2])
def test_a_bias_lists_every_offset_row_by_row(kind, window, extra):
    wider = tuple(w + extra for w in window)
    bias = stirred(kind(2, window, key_window_size=wider if extra else None))
    right = bias_by_hand(bias, window, wider)
    furthest = [(w + k - 2) // 2 for w, k in zip(window, wider, strict=True)]
    offsets = [(dy, dx) for dy in range(-furthest[0], furthest[0] + 1) for dx in range(-furthest[1], furthest[1] + 1)]
    torch.testing.assert_close(bias(), torch.stack([right(*offset) for offset in offsets]), **EXACT)


def test_first_tables_are_narrow_and_continuous_ones_stay_below_16():
    torch.manual_seed(0)
    assert TableBias(64, (16, 16))().std().item() == pytest.approx(0.02, rel=0.05)
    values = stirred(ContinuousBias(2, (8, 8)), strength=30)()
    assert values.min() >= 0
    assert values.max() <= 16


def test_continuous_bias_takes_the_same_weights_for_another_window():
    small, large = ContinuousBias(2, (4, 4)), ContinuousBias(2, (7, 7))
    large.load_state_dict(small.state_dict())
    corners = [bias().unflatten(0, (2 * w - 1, 2 * w - 1))[:: w - 1, :: w - 1] for bias, w in ((small, 4), (large, 7))]
    torch.testing.assert_close(*corners)  # the furthest offsets are as far, by the formula


def test_continuous_bias_keeps_the_offsets_of_the_window_it_was_trained_with():
    small = stirred(ContinuousBias(2, (4, 5)))
    bias = ContinuousBias(2, (7, 7), pretrained_window_size=(4, 5))
    block = WindowAttention2d(4, 2, window_size=7, bias=bias).double()
    block.position_bias.load_state_dict(small.state_dict())
    table = block.position_bias().view(13, 13, 2)
    torch.testing.assert_close(table[3:-3, 2:-2], small().view(7, 9, 2), **EXACT)
    assert block(normal((1, 4, 9, 8), dtype=torch.float64)).shape == (1, 4, 9, 8)


@pytest.mark.parametrize(("kind", "tolerance"), [(ContinuousBias, 1e-2), (DynamicBias, 3e-2)])
def test_computed_biases_in_half_precision_know_their_offsets(kind, tolerance):
    torch.manual_seed(0)
    bias = kind(2, (24, 24)).bfloat16()
    exact = kind(2, (24, 24)).double()
    exact.load_state_dict(bias.state_dict())
    error = (bias().double() - exact()).abs().max() / exact().abs().max()
    assert error < tolerance


# Tiles


@pytest.mark.parametrize(
    "block",
    [
        WindowAttention2d(4, 2, window_size=3, shift=1),
        WindowAttention2d(4, 2, window_size=(2, 4), shift=(1, 3), dilation=(2, 1), cosine=True, bias="cpb"),
        OverlappingCrossAttention(4, 2, window_size=4),
        OverlappingCrossAttention(4, 2, window_size=(2, 4), overlap_ratio=1.0, zero_border=True),
    ],
    ids=lambda block: type(block).__name__,
)
def test_tiles_that_begin_at_multiples_equal_the_whole(block):
    stirred(block)
    x = normal((1, 4, 41, 38), dtype=torch.float64)
    torch.testing.assert_close(tile_by_tile(block, x), block(x), **EXACT)


def tile_by_tile(block, x, core=13):
    """Compute cores anywhere, each in a tile that begins at a multiple and has `receptive_radius` pixels around it."""
    multiple, radius = block.tile_multiple, block.receptive_radius
    y = torch.empty_like(x)
    for i in range(0, x.shape[2], core):
        for j in range(0, x.shape[3], core):
            top, left = (max(at - radius, 0) // multiple * multiple for at in (i, j))
            part = block(x[:, :, top : i + core + radius, left : j + core + radius])
            y[:, :, i : i + core, j : j + core] = part[:, :, i - top :, j - left :][:, :, :core, :core]
    return y


def test_tiles_that_begin_elsewhere_do_not():
    block = stirred(WindowAttention2d(4, 2, window_size=4))
    x = normal((1, 4, 12, 12), dtype=torch.float64)
    assert block.tile_multiple == 4
    assert not torch.allclose(block(x[:, :, 1:])[:, :, 3:], block(x)[:, :, 4:])


# Refusals

WINDOWS = [WindowAttention2d, OverlappingCrossAttention]


@pytest.mark.parametrize("kind", WINDOWS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 0}, "channels must be an integer of at least 1, got 0"),
        ({"num_heads": 0}, "num_heads must be an integer of at least 1, got 0"),
        ({"num_heads": 3}, "num_heads must divide the 8 channels, got 3"),
        ({"window_size": 0}, "window_size must be one or two integers of at least 1, got 0"),
        ({"window_size": (4, -1)}, "window_size must be one or two integers of at least 1, got (4, -1)"),
        ({"window_size": (4, 4, 4)}, "window_size must be one or two integers of at least 1, got (4, 4, 4)"),
        ({"window_size": 8.0}, "window_size must be one or two integers of at least 1, got 8.0"),
        ({"window_size": "88"}, "window_size must be one or two integers of at least 1, got '88'"),
        ({"window_size": True}, "window_size must be one or two integers of at least 1, got True"),
        ({"bias": "relative"}, "bias must be one of table, cpb, dynamic, got 'relative'"),
        ({"bias": True}, "bias must be one of table, cpb, dynamic, got True"),
    ],
    ids=str,
)
def test_bad_arguments_raise(kind, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        kind(**{"channels": 8, "num_heads": 2} | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": 8}, "shift must be less than window_size (8, 8), got (8, 8)"),
        ({"shift": (0, 3), "window_size": (4, 3)}, "shift must be less than window_size (4, 3), got (0, 3)"),
        ({"shift": -1}, "shift must be one or two integers of at least 0, got -1"),
        ({"dilation": 0}, "dilation must be one or two integers of at least 1, got 0"),
    ],
    ids=str,
)
def test_bad_windows_raise(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        WindowAttention2d(8, 2, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_size": 7}, "overlap_ratio must enlarge (7, 7) by even numbers, got 0.5"),
        ({"window_size": (4, 2)}, "overlap_ratio must enlarge (4, 2) by even numbers, got 0.5"),
        ({"overlap_ratio": -0.5}, "overlap_ratio must be at least 0 and finite, got -0.5"),
        ({"overlap_ratio": math.inf}, "overlap_ratio must be at least 0 and finite, got inf"),
        ({"overlap_ratio": math.nan}, "overlap_ratio must be at least 0 and finite, got nan"),
    ],
    ids=str,
)
def test_bad_overlaps_raise(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        OverlappingCrossAttention(8, 2, **options)


@pytest.mark.parametrize("shape", [(3, 2), (2, 3), (2, 1), (3,), (2, 2, 1), ()], ids=str)
def test_a_scale_of_another_shape_raises(shape):
    block = WindowAttention2d(4, 2)
    with pytest.raises(ValueError, match=r"^logit_scale must be \(B, num_heads\) = \(2, 2\), got shape"):
        block(normal((2, 4, 3, 3)), torch.ones(shape))


@pytest.mark.parametrize("scale", [torch.ones(2, 1), torch.ones(2, 3), torch.ones(1), 2.0], ids=str)
def test_a_scale_that_cosine_logits_cannot_take_raises(scale):
    block = WindowAttention2d(4, 2, cosine=True)
    with pytest.raises(ValueError, match=r"^logit_scale must be \(B, num_heads\) for 2 heads, got (shape|2.0)"):
        block(normal((2, 4, 3, 3)), scale)


def test_a_scale_that_is_no_tensor_raises():
    with pytest.raises(TypeError, match=r"^logit_scale must be a tensor, got 2.0"):
        WindowAttention2d(4, 2)(normal((2, 4, 3, 3)), 2.0)


def test_repr():
    text = repr(WindowAttention2d(8, 2, window_size=(4, 6), shift=(2, 3), dilation=2, cosine=True))
    assert "8, 2, window_size=(4, 6), shift=(2, 3), dilation=(2, 2), cosine=True" in text
    text = repr(OverlappingCrossAttention(8, 2, window_size=4, zero_border=True))
    assert "8, 2, window_size=(4, 4), key_window_size=(6, 6), zero_border=True" in text
