"""Ways down and up against plain convolutions, and skips of every size."""

import copy
from unittest import mock

import numpy as np
import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from claritycore.blocks import ConvGate, DySample, MSGDown, MSGUp, OverlapPatchEmbed, SkipFusion
from claritycore.blocks.padding import pad_to_multiple
from tests.strategies import SIDES, feature_maps, normal

FORMS = st.sampled_from([False, True])


def moved(block: nn.Module, seed: int = 0) -> nn.Module:
    """Off the start values, where a gate only passes on."""
    with torch.no_grad():
        for number, parameter in enumerate(block.parameters()):
            parameter.add_(0.2 * normal(tuple(parameter.shape), seed=seed + number))
    return block.double().eval()


def gated(gate: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if not isinstance(gate, ConvGate):
        return x
    both = F.conv2d(x, gate.conv.weight, gate.conv.bias, padding=1)
    return both[:, : x.shape[1]] * torch.sigmoid(both[:, x.shape[1] :])


@given(x=feature_maps(3, dtype=torch.float64), scale=st.integers(1, 4), gate=FORMS)
def test_down_strided_is_a_convolution_read_at_every_s_th_pixel(x, scale, gate):
    block = moved(MSGDown(3, 5, scale_factor=scale, gated=gate))
    every = F.conv2d(x, block.conv.weight, block.conv.bias, padding=1)
    torch.testing.assert_close(block(x), gated(block.gate, every[..., ::scale, ::scale]), rtol=0, atol=1e-12)


@given(x=feature_maps(3, dtype=torch.float64), scale=st.integers(1, 4), gate=FORMS)
def test_down_by_unshuffling_is_a_convolution_and_a_rearrangement(x, scale, gate):
    block = moved(MSGDown(3, 2 * scale**2, scale_factor=scale, form="unshuffle", gated=gate))
    y = F.conv2d(pad_to_multiple(x, scale), block.conv.weight, block.conv.bias, padding=1)
    y = rearrange(y, "b c (h i) (w j) -> b (c i j) h w", i=scale, j=scale)
    assert tuple(y.shape[2:]) == (-(-x.shape[2] // scale), -(-x.shape[3] // scale))
    torch.testing.assert_close(block(x), gated(block.gate, y), rtol=0, atol=1e-12)


@given(x=feature_maps(16, dtype=torch.float64), scale=st.sampled_from([1, 2, 4]), gate=FORMS)
def test_up_by_shuffling_is_a_rearrangement_and_a_convolution(x, scale, gate):
    block = moved(MSGUp(16, 3, scale_factor=scale, gated=gate))
    y = rearrange(x, "b (c i j) h w -> b c (h i) (w j)", i=scale, j=scale)
    y = F.conv2d(y, block.conv.weight, block.conv.bias, padding=1)
    torch.testing.assert_close(block(x), gated(block.gate, y), rtol=0, atol=1e-12)


@given(x=feature_maps(5, dtype=torch.float64), scale=st.integers(1, 3), gate=FORMS)
def test_up_by_expanding_is_a_convolution_and_a_rearrangement(x, scale, gate):
    block = moved(MSGUp(5, 3, scale_factor=scale, form="expand", gated=gate))
    weight, bias = (rearrange(p, "(c n) ... -> c n ...", n=scale**2) for p in block.upsample.conv.parameters())
    means = weight.mean((3, 4), keepdim=True)
    weight = weight - means + means.mean(1, keepdim=True)  # level: no pixel of a cell answers a constant otherwise
    bias = bias.mean(1, keepdim=True).expand_as(bias)
    y = F.conv2d(x, weight.flatten(0, 1), bias.flatten(), padding=1)
    y = rearrange(y, "b (c i j) h w -> b c (h i) (w j)", i=scale, j=scale)
    torch.testing.assert_close(block(x), gated(block.gate, y), rtol=0, atol=1e-12)


@given(x=feature_maps(6, dtype=torch.float64), scale=st.integers(1, 3), gate=FORMS)
def test_up_by_sampling_is_dysample_and_a_convolution(x, scale, gate):
    block = moved(MSGUp(6, 3, scale_factor=scale, form="dysample", gated=gate))
    assert isinstance(block.upsample, DySample)
    assert block.upsample.groups == 2  # of four that 6 channels allow
    y = F.conv2d(block.upsample(x), block.conv.weight, block.conv.bias, padding=1)
    torch.testing.assert_close(block(x), gated(block.gate, y), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "build",
    [lambda **k: MSGDown(4, 8, **k), lambda **k: MSGUp(8, 4, **k), lambda **k: MSGUp(8, 4, form="expand", **k)],
)
def test_a_fresh_gate_changes_nothing(build):
    block, plain = build(), build(gated=False)
    plain.load_state_dict({key: value for key, value in block.state_dict().items() if not key.startswith("gate.")})
    x = normal((1, block.in_channels, 5, 7))
    torch.testing.assert_close(block(x), plain(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("block", "radius", "multiple"),
    [
        (MSGDown(4, gated=False), 1, 2),
        (MSGDown(4, scale_factor=4), 5, 4),
        (MSGDown(4, form="unshuffle", gated=False), 1, 2),
        (MSGDown(9, scale_factor=3, form="unshuffle"), 4, 3),
        (MSGUp(4, scale_factor=1), 2, 1),
        (MSGUp(4, gated=False), 1, 1),
        (MSGUp(4, form="expand"), 2, 1),
        (MSGUp(4, form="expand", gated=False), 1, 1),
        (OverlapPatchEmbed(4, 5, kernel_size=7, stride=4), 3, 4),
        (OverlapPatchEmbed(4, 5), 1, 1),
    ],
)
def test_every_form_may_be_tiled_as_it_says(block, radius, multiple):
    assert (block.tile_safe, block.receptive_radius, block.tile_multiple) == (True, radius, multiple)
    block = moved(block)
    margin = radius + -radius % multiple
    size = 2 * margin + 4 * multiple
    whole = normal((1, getattr(block, "in_channels", 4), size + 3 * multiple, size + 3 * multiple)).double()
    tile = block(whole[..., multiple : multiple + size, 2 * multiple : 2 * multiple + size])
    y = block(whole)
    ratio = y.shape[-1] / whole.shape[-1]
    top, left, edge, length = (round(ratio * n) for n in (multiple, 2 * multiple, margin, size))
    inside = y[..., top + edge : top + length - edge, left + edge : left + length - edge]
    torch.testing.assert_close(tile[..., edge : length - edge, edge : length - edge], inside, rtol=0, atol=1e-12)


def test_what_samples_where_the_map_says_may_not_be_tiled():
    assert MSGUp(4).tile_safe
    up = MSGUp(4, form="dysample")
    assert not up.tile_safe
    assert up.receptive_radius == 2


@pytest.mark.parametrize("form", ["concat", "add"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@given(data=st.data())
def test_the_result_of_a_fusion_has_the_size_of_the_skip(form, compiled, data):
    skip = data.draw(feature_maps(3, dtype=torch.float64))
    height, width = (data.draw(st.integers(max(side - 1, 1), side + 4)) for side in skip.shape[2:])
    x = normal((len(skip), 3, height, width), dtype=torch.float64, seed=1)
    block = SkipFusion(3, form=form).double()
    with mock.patch("torch.compiler.is_compiling", return_value=compiled):
        y = block(x, skip)
    beyond = [(0, max(want - have, 0)) for have, want in zip(x.shape[2:], skip.shape[2:], strict=True)]
    aligned = np.pad(x.numpy(), [(0, 0), (0, 0), *beyond], mode="edge")[..., : skip.shape[2], : skip.shape[3]]
    aligned = torch.from_numpy(aligned.copy())
    joined = aligned + skip if form == "add" else torch.cat([aligned, skip], dim=1)
    weight = block.project.weight.flatten(1)
    expected = torch.einsum("oc,bchw->bohw", weight, joined) + block.project.bias[:, None, None]
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("x_size", "skip_size"), [((5, 7), (5, 7)), ((6, 8), (5, 7)), ((4, 7), (5, 7)), ((8, 6), (5, 7))]
)
def test_fusion_keeps_the_memory_format(x_size, skip_size):
    x, skip = (normal((2, 4, *size)).contiguous(memory_format=torch.channels_last) for size in (x_size, skip_size))
    block = SkipFusion(4)
    assert block(x, skip).is_contiguous(memory_format=torch.channels_last)
    assert block(x.contiguous(), skip.contiguous()).is_contiguous()


def test_an_exported_fusion_takes_every_pair_of_sizes():
    block = SkipFusion(2, skip_channels=3).eval()
    sizes = dict.fromkeys((2, 3), torch.export.Dim.DYNAMIC)
    example = (normal((1, 2, 6, 8)), normal((1, 3, 5, 7)))
    program = torch.export.export(block, example, dynamic_shapes=(sizes, sizes)).module()
    for x_size, skip_size in [((6, 8), (5, 7)), ((4, 4), (4, 4)), ((5, 6), (6, 7)), ((8, 3), (6, 4))]:
        x, skip = normal((1, 2, *x_size)), normal((1, 3, *skip_size), seed=1)
        torch.testing.assert_close(program(x, skip), block(x, skip), rtol=1e-5, atol=1e-5)


@given(size=st.tuples(SIDES, SIDES), scale=st.integers(1, 3))
def test_down_up_and_fusion_come_back_to_every_size(size, scale):
    image = normal((1, 4, *size))
    down = MSGDown(4, 2 * scale**2, scale_factor=scale, form="unshuffle")
    up = MSGUp(2 * scale**2, 4, scale_factor=scale)
    assert SkipFusion(4)(up(down(image)), image).shape == image.shape


@given(x=feature_maps(3, dtype=torch.float64), stride=st.integers(1, 3))
def test_patch_embedding_is_a_convolution_under_the_public_name(x, stride):
    block = OverlapPatchEmbed(3, 4, stride=stride).double()
    assert list(block.state_dict()) == ["proj.weight"]
    every = F.conv2d(x, block.proj.weight, padding=1)
    torch.testing.assert_close(block(x), every[..., ::stride, ::stride], rtol=0, atol=1e-12)


def test_bad_arguments_raise():
    with pytest.raises(ValueError, match="form must be one of strided, unshuffle, got 'pool'"):
        MSGDown(4, form="pool")
    with pytest.raises(ValueError, match='out_channels must be a multiple of 4 for form "unshuffle", got 6'):
        MSGDown(4, 6, form="unshuffle")
    with pytest.raises(ValueError, match="form must be one of pixelshuffle, expand, dysample, got 'nearest'"):
        MSGUp(4, form="nearest")
    with pytest.raises(ValueError, match='in_channels must be a multiple of 4 for form "pixelshuffle", got 6'):
        MSGUp(6)
    with pytest.raises(ValueError, match="form must be one of concat, add, got 'mul'"):
        SkipFusion(4, form="mul")
    with pytest.raises(ValueError, match='skip_channels must be channels = 4 for form "add", got 2'):
        SkipFusion(4, skip_channels=2, form="add")
    with pytest.raises(ValueError, match="kernel_size must be an odd integer of at least 1, got 4"):
        OverlapPatchEmbed(3, 4, kernel_size=4)
    with pytest.raises(ValueError, match="kernel_size must be at least stride = 4, got 3"):
        OverlapPatchEmbed(3, 4, stride=4)
    for block in (MSGDown, MSGUp):
        for name in ("in_channels", "out_channels", "scale_factor"):
            with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got 0"):
                block(**{"in_channels": 4, name: 0})
    for name in ("channels", "skip_channels"):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got 0"):
            SkipFusion(**{"channels": 4, name: 0})
    for name in ("in_channels", "embed_dim", "stride"):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got 0"):
            OverlapPatchEmbed(**{"in_channels": 3, "embed_dim": 4, name: 0})


def test_skips_that_do_not_fit_raise():
    block = SkipFusion(2, skip_channels=3)
    fits = r"x must have the batch size of skip and be at most 1 pixel smaller, got \(1, 2, 4, 4\) for \({}\)"
    for shape in ("1, 3, 6, 4", "1, 3, 4, 8", "2, 3, 4, 4"):
        with pytest.raises(ValueError, match=fits.format(shape)):
            block(torch.zeros(1, 2, 4, 4), torch.zeros(*map(int, shape.split(", "))))
    with pytest.raises(ValueError, match=r"SkipFusion takes \(B, C, H, W\) with C = 3 channels"):
        block(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4))
    with pytest.raises(TypeError, match=r"SkipFusion takes floating-point feature maps, got torch\.int64"):
        block(torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 4, 4, dtype=torch.int64))


@pytest.mark.parametrize("autocast", [False, True])
def test_tall_maps_of_one_pixel_are_right_in_bfloat16(autocast):
    """oneDNN's own strided convolution returns stray memory there on some processors."""
    torch.manual_seed(0)
    block = OverlapPatchEmbed(4, 6, kernel_size=3, stride=2)
    for width in (1, 2, 3):
        x = torch.randn(2, 4, 19, width)
        expected = block(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = block(x) if autocast else copy.deepcopy(block).bfloat16()(x.bfloat16())
        assert y.shape == expected.shape
        assert (y.float() - expected).abs().max() <= 0.02 * expected.abs().max()
