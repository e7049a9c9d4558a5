"""Attention over channels against its formulas, a channel at a time."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from claritycore.blocks import ChannelAttention, TransposedAttention
from claritycore.deploy import summarize
from tests.strategies import feature_maps, normal


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


@given(x=feature_maps(6, dtype=torch.float64), reduction=st.sampled_from([1, 2, 3, 16]))
def test_squeeze_and_excite_is_the_formula(x, reduction):
    block = ChannelAttention(6, reduction=reduction).double()
    first, second = block.conv_du[0], block.conv_du[2]
    assert len(first.weight) == max(6 // reduction, 1)
    for sample, result in zip(x, block(x), strict=True):
        means = [channel.sum().item() / channel.numel() for channel in sample]
        rows = zip(first.weight.flatten(1).tolist(), first.bias.tolist(), strict=True)
        hidden = [max(sum(w * m for w, m in zip(row, means, strict=True)) + b, 0.0) for row, b in rows]
        for c in range(6):
            score = sum(w * h for w, h in zip(second.weight[c].flatten().tolist(), hidden, strict=True))
            expected = sample[c] * sigmoid(score + second.bias[c].item())
            torch.testing.assert_close(result[c], expected, rtol=0, atol=1e-12)


@given(x=feature_maps(7, dtype=torch.float64), kernel_size=st.sampled_from([1, 3, 5, 9]))
def test_the_efficient_form_is_a_convolution_along_the_channels(x, kernel_size):
    block = ChannelAttention(7, form="efficient", kernel_size=kernel_size).double()
    weights, reach = block.conv.weight.flatten().tolist(), kernel_size // 2
    for sample, result in zip(x, block(x), strict=True):
        means = [channel.sum().item() / channel.numel() for channel in sample]
        for c in range(7):
            near = [(w, c + k - reach) for k, w in enumerate(weights) if 0 <= c + k - reach < 7]
            expected = sample[c] * sigmoid(sum(w * means[at] for w, at in near))
            torch.testing.assert_close(result[c], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("channels", "size"), [(1, 1), (4, 1), (8, 3), (16, 3), (64, 3), (128, 5), (512, 5), (2048, 7)]
)
def test_the_efficient_kernel_grows_with_the_channels(channels, size):
    """|log2(C) / 2 + 1 / 2|_odd as the authors' code rounds it."""
    assert ChannelAttention(channels, form="efficient").conv.kernel_size == (size,)


def test_the_public_layouts():
    excite = {name: tuple(tensor.shape) for name, tensor in ChannelAttention(64).state_dict().items()}
    assert excite == {
        "conv_du.0.weight": (4, 64, 1, 1),
        "conv_du.0.bias": (4,),
        "conv_du.2.weight": (64, 4, 1, 1),
        "conv_du.2.bias": (64,),
    }
    efficient = ChannelAttention(64, form="efficient").state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in efficient.items()} == {"conv.weight": (1, 1, 3)}


@pytest.mark.parametrize("form", ["squeeze_excite", "efficient"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_means_of_large_half_maps_are_those_of_float32(form, dtype, tolerance, memory_format):
    """Sums of 2**18 values near 2 are beyond float16, and beyond what bfloat16 can count to."""
    block = ChannelAttention(16, form=form).to(dtype)
    x = (normal((1, 16, 512, 512)) + 2).to(dtype).contiguous(memory_format=memory_format)
    with torch.no_grad():
        y, expected = block(x), block.float()(x.float())
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=tolerance * expected.abs().max().item())


def test_bad_arguments_raise():
    with pytest.raises(ValueError, match="form must be one of squeeze_excite, efficient, got 'spatial'"):
        ChannelAttention(8, form="spatial")
    with pytest.raises(ValueError, match='kernel_size must be None unless form is "efficient", got 3'):
        ChannelAttention(8, kernel_size=3)
    with pytest.raises(ValueError, match="kernel_size must be an odd integer of at least 1, got 4"):
        ChannelAttention(8, form="efficient", kernel_size=4)
    for name in ("channels", "reduction"):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got 0"):
            ChannelAttention(**{"channels": 8, name: 0})
    assert "ChannelAttention(\n  8, form='efficient'\n" in repr(ChannelAttention(8, form="efficient"))


def with_values_of_some_size(block: TransposedAttention, seed: int = 0) -> TransposedAttention:
    with torch.no_grad():
        for number, parameter in enumerate(block.parameters()):
            parameter.copy_(normal(tuple(parameter.shape), dtype=torch.float64, seed=seed + number))
    return block


def attended_by_hand(block: TransposedAttention, x: torch.Tensor) -> torch.Tensor:
    """One cosine after the other."""
    channels, width = block.channels, block.channels // block.num_heads
    q, k, v = block.qkv_dwconv(block.qkv(x)).split(channels, dim=1)
    mixed = torch.zeros_like(x)
    for b in range(len(x)):
        for c in range(channels):
            head = c // width
            others = range(head * width, (head + 1) * width)
            cosines = [(q[b, c] * k[b, o]).sum() / (q[b, c].norm() * k[b, o].norm()) for o in others]
            weights = [math.exp(block.temperature[head].item() * cosine.item()) for cosine in cosines]
            for weight, o in zip(weights, others, strict=True):
                mixed[b, c] += weight / sum(weights) * v[b, o]
    return block.project_out(mixed)


@pytest.mark.parametrize("num_heads", [1, 2, 6])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@given(x=feature_maps(6, dtype=torch.float64), bias=st.booleans())
def test_transposed_attention_is_the_formula(num_heads, memory_format, x, bias):
    block = with_values_of_some_size(TransposedAttention(6, num_heads=num_heads, bias=bias).double())
    with torch.no_grad():
        y = block(x.contiguous(memory_format=memory_format))
        torch.testing.assert_close(y, attended_by_hand(block, x), rtol=0, atol=1e-11)


@pytest.mark.parametrize("num_heads", [1, 2])
def test_gradients_of_transposed_attention(num_heads):
    block = with_values_of_some_size(TransposedAttention(4, num_heads=num_heads, bias=True).double())
    x = normal((2, 4, 3, 2), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: block(x), (x, *block.parameters()))


def test_the_layout_of_restormer():
    state = TransposedAttention(48, num_heads=8, bias=True).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "temperature": (8, 1, 1),
        "qkv.weight": (144, 48, 1, 1),
        "qkv.bias": (144,),
        "qkv_dwconv.weight": (144, 1, 3, 3),
        "qkv_dwconv.bias": (144,),
        "project_out.weight": (48, 48, 1, 1),
        "project_out.bias": (48,),
    }
    plain = TransposedAttention(48)
    assert not any("bias" in name for name in plain.state_dict())
    assert sum(parameter.numel() for parameter in plain.parameters()) == 10_513
    assert plain.temperature.item() == 1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 4e-2)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_products_over_large_half_maps_do_not_overflow(dtype, tolerance, memory_format):
    """Sums of 2**18 products of values near 50 are ten thousand times the largest of float16."""
    torch.manual_seed(0)
    block = TransposedAttention(8, num_heads=2).to(dtype)
    with torch.no_grad():
        block.temperature.mul_(4)
    x = (100 * normal((1, 8, 512, 512)) + 50).to(dtype).contiguous(memory_format=memory_format)
    with torch.no_grad():
        y = block(x)
        expected = block.float()(x.float())
        with torch.autocast("cpu", dtype=dtype):
            cast = block(x.float())
    assert expected.abs().max() > 20
    for result in (y, cast):
        torch.testing.assert_close(result.float(), expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_map_of_zeros_has_neither_nan_nor_infinite_gradients(dtype):
    block = TransposedAttention(4, num_heads=2).to(dtype)
    x = torch.zeros(1, 4, 3, 3, dtype=dtype, requires_grad=True)
    y = block(x)
    y.sum().backward()
    assert not y.any()
    assert all(t.grad.isfinite().all() for t in (x, *block.parameters()))


def test_macs_of_transposed_attention():
    channels, heads, pixels = 12, 3, 5 * 7
    macs = pixels * (4 * channels**2 + 27 * channels + 2 * channels**2 // heads)
    assert summarize(TransposedAttention(channels, num_heads=heads), (2, channels, 5, 7)).macs == 2 * macs


def test_bad_arguments_of_transposed_attention_raise():
    with pytest.raises(ValueError, match="num_heads must divide the 8 channels, got 3"):
        TransposedAttention(8, num_heads=3)
    for name in ("channels", "num_heads"):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got 0"):
            TransposedAttention(**{"channels": 8, name: 0})
    assert "TransposedAttention(\n  8, num_heads=2\n" in repr(TransposedAttention(8, num_heads=2))
