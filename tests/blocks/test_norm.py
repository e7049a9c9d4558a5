"""Norms against the formula written out a pixel at a time."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from claritycore.blocks import LayerNorm2d, RMSNorm2d
from tests.strategies import feature_maps, normal


def layer_norm_by_hand(pixel, weight, bias, eps):
    mean = sum(pixel) / len(pixel)
    variance = sum((value - mean) ** 2 for value in pixel) / len(pixel)
    return [w * (value - mean) / (variance + eps) ** 0.5 + b for value, w, b in zip(pixel, weight, bias, strict=True)]


def rms_norm_by_hand(pixel, weight, eps):
    mean_square = sum(value**2 for value in pixel) / len(pixel)
    return [w * value / (mean_square + eps) ** 0.5 for value, w in zip(pixel, weight, strict=True)]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@given(x=feature_maps(3, sides=st.integers(1, 4), dtype=torch.float64))
def test_each_pixel_is_the_formula(memory_format, x):
    layer, rms = LayerNorm2d(3).double(), RMSNorm2d(3).double()
    with torch.no_grad():
        for parameter in (layer.weight, layer.bias, rms.weight):
            parameter.copy_(normal((3,), seed=1))
    pixels = x.movedim(1, -1).flatten(0, 2)
    by_layer = [layer_norm_by_hand(p, layer.weight.tolist(), layer.bias.tolist(), 1e-6) for p in pixels.tolist()]
    by_rms = [rms_norm_by_hand(p, rms.weight.tolist(), 1e-6) for p in pixels.tolist()]
    x = x.contiguous(memory_format=memory_format)
    for block, by_hand in ((layer, by_layer), (rms, by_rms)):
        y = block(x).movedim(1, -1).flatten(0, 2)
        torch.testing.assert_close(y, torch.tensor(by_hand, dtype=torch.float64), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_large_mean_does_not_swallow_the_variance(memory_format):
    x = (normal((1, 16, 5, 5)) + 4096).contiguous(memory_format=memory_format)
    exact = F.layer_norm(x.double().movedim(1, -1), (16,), eps=1e-6).movedim(-1, 1)
    torch.testing.assert_close(LayerNorm2d(16)(x).double(), exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize("block", [LayerNorm2d, RMSNorm2d])
def test_half_statistics_are_float32(block):
    x = normal((1, 64, 4, 4)) * 300  # a sum of squares beyond float16
    y = block(64).half()(x.half())
    assert y.isfinite().all()
    torch.testing.assert_close(y.float(), block(64)(x.half().float()), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("block", [LayerNorm2d, RMSNorm2d])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients(block, memory_format):
    norm = block(3).double()
    x = normal((2, 3, 2, 3), dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: norm(x), (x, *norm.parameters()))


@pytest.mark.parametrize("block", [LayerNorm2d, RMSNorm2d])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_second_derivatives_and_vmap(block, memory_format):
    norm = block(3).double()
    x = normal((2, 3, 2, 3), dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    assert torch.autograd.gradgradcheck(norm, x)
    torch.testing.assert_close(torch.vmap(norm)(x[:, None])[:, 0], norm(x), rtol=1e-12, atol=1e-12)


def test_compiled_and_eager_layer_norm_agree():
    """In eager mode on a CPU it is a batch norm over the channels; compiled, the formula."""
    norm = LayerNorm2d(16).double()
    x = normal((3, 16, 5, 7), dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), norm(x), rtol=1e-12, atol=1e-12)
    exported = torch.export.export(norm, (x,))
    assert not any("batch_norm" in str(node.target) for node in exported.graph.nodes)


def test_bad_arguments_raise():
    for block in (LayerNorm2d, RMSNorm2d):
        with pytest.raises(ValueError, match="channels must be an integer of at least 1, got 0"):
            block(0)
    assert repr(LayerNorm2d(8)) == "LayerNorm2d(8, eps=1e-06)"
    assert repr(RMSNorm2d(8, eps=1e-5)) == "RMSNorm2d(8, eps=1e-05)"
