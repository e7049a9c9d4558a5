"""Changes of resolution against what they claim to be."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from claritycore.blocks import BicubicUp, PixelShuffleUp
from tests.strategies import feature_maps, normal


@given(x=feature_maps(4), scale=st.integers(1, 4))
def test_pixel_shuffle_starts_as_convolution_and_nearest_upsampling(x, scale):
    torch.manual_seed(0)
    up = PixelShuffleUp(4, 3, scale_factor=scale)
    low = F.conv2d(x, up.conv.weight[:: scale**2], up.conv.bias[:: scale**2], padding=1)
    expected = low.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    torch.testing.assert_close(up(x), expected, rtol=1e-5, atol=1e-5)


def test_pixel_shuffle_keeps_kaimings_spread():
    torch.manual_seed(0)
    plain = torch.nn.Conv2d(64, 64, 3).weight.std().item()
    assert PixelShuffleUp(64, scale_factor=2).conv.weight.std().item() == pytest.approx(plain, rel=0.02)


@given(x=feature_maps(4, dtype=torch.float64), scale=st.integers(1, 4))
def test_pixel_shuffle_that_is_level_has_kernels_of_one_sum_and_one_bias(x, scale):
    torch.manual_seed(0)
    up = PixelShuffleUp(4, 3, scale_factor=scale, level=True).double()
    for parameter in up.parameters():
        torch.nn.init.normal_(parameter)
    weight, bias = up.conv.weight.clone(), up.conv.bias.clone()
    for channel in range(3):
        own = slice(channel * scale**2, (channel + 1) * scale**2)
        sums = weight[own].sum((2, 3))  # of each pixel of the cell, for each channel that it reads
        weight[own] += ((sums.mean(0) - sums) / 9)[..., None, None]
        bias[own] = bias[own].mean()
    expected = F.pixel_shuffle(F.conv2d(x, weight, bias, padding=1), scale)
    torch.testing.assert_close(up(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [2, 3])
def test_a_level_pixel_shuffle_keeps_a_constant_whatever_it_has_learned(scale):
    torch.manual_seed(0)
    x = normal((1, 4, 1, 1), dtype=torch.float64).expand(1, 4, 6, 7)
    for level, pattern in ((False, True), (True, False)):
        up = PixelShuffleUp(4, 3, scale_factor=scale, level=level).double()
        start = up(x)
        for parameter in up.parameters():
            torch.nn.init.normal_(parameter)
        inside = up(x)[..., scale:-scale, scale:-scale]  # within the border of zeros
        spread = (inside.amax((2, 3)) - inside.amin((2, 3))).max()
        assert (spread > 0.1) == pattern
        assert (spread < 1e-12) != pattern
        assert torch.equal(start[..., ::scale, ::scale], start[..., 1::scale, 1::scale]), "not as nearest upsampling"


def test_a_level_pixel_shuffle_in_half_precision():
    up = PixelShuffleUp(8, scale_factor=2, level=True).to(torch.bfloat16)
    x = normal((1, 8, 6, 7), dtype=torch.bfloat16)
    assert up(x).dtype == torch.bfloat16
    torch.testing.assert_close(up(x).float(), up.float()(x.float()), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@given(x=feature_maps(4), scale=st.integers(1, 4))
def test_pixel_shuffle_is_torchs_in_both_memory_formats(memory_format, x, scale):
    up = PixelShuffleUp(4, 3, scale_factor=scale).to(memory_format=memory_format)
    x = x.contiguous(memory_format=memory_format)
    with torch.no_grad():
        convolved = up.conv(x)
        y, expected = up(x), F.pixel_shuffle(convolved, scale)
    assert torch.equal(y, expected)
    if convolved.is_contiguous(memory_format=memory_format):
        assert y.is_contiguous(memory_format=memory_format)


def test_pixel_shuffle_is_one_operator_in_an_export():
    program = torch.export.export(PixelShuffleUp(4), (normal((1, 4, 5, 7)),))
    assert torch.ops.aten.pixel_shuffle.default in [node.target for node in program.graph.nodes]


def cubic(distance: float, a: float = -0.75) -> float:
    d = abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def bicubic_matrix(size: int, scale: int) -> torch.Tensor:
    """Row i holds the weights of output sample i, taps beyond the edge folded onto it."""
    matrix = torch.zeros(scale * size, size, dtype=torch.float64)
    for i in range(scale * size):
        centre = (i + 0.5) / scale - 0.5
        first = int(torch.tensor(centre).floor()) - 1
        for tap in range(first, first + 4):
            matrix[i, min(max(tap, 0), size - 1)] += cubic(centre - tap)
    return matrix


@given(x=feature_maps(2, dtype=torch.float64), scale=st.integers(1, 4))
def test_bicubic_is_the_formula(x, scale):
    rows, columns = bicubic_matrix(x.shape[2], scale), bicubic_matrix(x.shape[3], scale)
    torch.testing.assert_close(BicubicUp(scale)(x), rows @ x @ columns.T, rtol=0, atol=1e-11)


@pytest.mark.parametrize("scale", [2, 3, 4, 5, 8])
def test_bicubic_far_from_the_corner_is_as_exact_as_near_it(scale):
    x = normal((1, 2, 3, 2000))
    rows, columns = bicubic_matrix(3, scale), bicubic_matrix(2000, scale)
    torch.testing.assert_close(BicubicUp(scale)(x).double(), rows @ x.double() @ columns.T, rtol=0, atol=2e-6)


def test_bicubic_keeps_a_constant():
    x = torch.full((1, 3, 5, 7), 0.3, dtype=torch.float64)
    torch.testing.assert_close(BicubicUp(3)(x), torch.full((1, 3, 15, 21), 0.3, dtype=torch.float64))


def test_bicubic_at_scale_1_is_the_input():
    x = normal((1, 2, 3, 4))
    assert BicubicUp(1)(x) is x


def test_bad_arguments_raise():
    for kernel_size in (4, 3.0, True):
        with pytest.raises(ValueError, match=f"kernel_size must be an odd integer of at least 1, got {kernel_size}"):
            PixelShuffleUp(4, kernel_size=kernel_size)
    with pytest.raises(ValueError, match="scale_factor must be an integer of at least 1, got 0"):
        PixelShuffleUp(4, scale_factor=0)
    with pytest.raises(ValueError, match="out_channels must be an integer of at least 1, got 0"):
        PixelShuffleUp(4, 0)
    with pytest.raises(ValueError, match="scale_factor must be an integer of at least 1, got 0"):
        BicubicUp(0)
