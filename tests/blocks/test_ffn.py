"""Gated feed-forward blocks against their formulas, written with the tensors of their state dicts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from claritycore.blocks import ConvGate, GatedFFN, NAFBlock
from tests.strategies import feature_maps, normal


def moved(block: nn.Module) -> nn.Module:
    with torch.no_grad():
        for number, parameter in enumerate(block.parameters()):
            parameter.add_(0.3 * normal(tuple(parameter.shape), seed=number))
    return block.double().eval()


def pointwise(state, name, x):
    """A 1x1 convolution."""
    y = torch.einsum("oi,bihw->bohw", state[f"{name}.weight"][:, :, 0, 0], x)
    return y + state[f"{name}.bias"][:, None, None] if f"{name}.bias" in state else y


def depthwise(state, name, x):
    """Nine shifted products."""
    weight, (height, width) = state[f"{name}.weight"], x.shape[2:]
    padded = x.new_zeros(*x.shape[:2], height + 2, width + 2)
    padded[..., 1:-1, 1:-1] = x
    y = sum(
        weight[:, 0, i, j, None, None] * padded[..., i : i + height, j : j + width] for i in range(3) for j in range(3)
    )
    return y + state[f"{name}.bias"][:, None, None] if f"{name}.bias" in state else y


def layer_norm(state, name, x):
    centred = x - x.mean(1, keepdim=True)
    y = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return y * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def gelu(x):
    return x * (1 + torch.special.erf(x / math.sqrt(2))) / 2


def window_means(x, window_size):
    reach, y = window_size // 2, torch.empty_like(x)
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            y[..., i, j] = x[..., max(i - reach, 0) : i + reach + 1, max(j - reach, 0) : j + reach + 1].mean((2, 3))
    return y


@pytest.mark.parametrize("bias", [False, True])
@given(x=feature_maps(3, dtype=torch.float64))
def test_gated_ffn_is_the_formula(bias, x):
    block = moved(GatedFFN(3, expansion=2.5, bias=bias))
    state = block.state_dict()
    a, b = depthwise(state, "dwconv", pointwise(state, "project_in", x)).chunk(2, dim=1)
    torch.testing.assert_close(block(x), pointwise(state, "project_out", gelu(a) * b), rtol=0, atol=1e-12)


def test_gated_ffn_has_restormers_layout():
    block = GatedFFN(48)
    shapes = {name: tuple(tensor.shape) for name, tensor in block.state_dict().items()}
    assert shapes == {
        "project_in.weight": (254, 48, 1, 1),
        "dwconv.weight": (254, 1, 3, 3),
        "project_out.weight": (48, 127, 1, 1),
    }
    assert sum(parameter.numel() for parameter in block.parameters()) == 20_574
    assert {f"{name}.bias" for name in ("project_in", "dwconv", "project_out")} < set(
        GatedFFN(4, bias=True).state_dict()
    )


@pytest.mark.parametrize("kernel_size", [1, 3])
@given(x=feature_maps(3, dtype=torch.float64))
def test_conv_gate_is_the_formula(kernel_size, x):
    block = moved(ConvGate(3, kernel_size=kernel_size))
    reach, (height, width) = kernel_size // 2, x.shape[2:]
    padded = nn.functional.pad(x, [reach] * 4)
    value, gate = (
        sum(
            torch.einsum("oi,bihw->bohw", weight[:, :, i, j], padded[..., i : i + height, j : j + width])
            for i in range(kernel_size)
            for j in range(kernel_size)
        )
        + bias[:, None, None]
        for weight, bias in zip(block.conv.weight.split(3), block.conv.bias.split(3), strict=True)
    )
    torch.testing.assert_close(block(x), value / (1 + torch.exp(-gate)), rtol=0, atol=1e-12)


@given(x=feature_maps(4), kernel_size=st.sampled_from([1, 3, 5]))
def test_a_fresh_conv_gate_passes_on_what_it_gets_and_can_learn(x, kernel_size):
    block = ConvGate(4, kernel_size=kernel_size)
    y = block(x)
    torch.testing.assert_close(y, x, rtol=0, atol=1e-6)
    y.square().sum().backward()
    for parameter in block.parameters():
        assert parameter.grad.reshape(8, -1).any(1).all()  # of the values and of the gate


@pytest.mark.parametrize("window_size", [None, 1, 3, 9])
@given(x=feature_maps(4, sides=st.integers(1, 9), dtype=torch.float64))
def test_naf_block_is_the_formula(window_size, x):
    block = moved(NAFBlock(4, dw_expand=3, window_size=window_size))
    state = block.state_dict()
    a, b = depthwise(state, "conv2", pointwise(state, "conv1", layer_norm(state, "norm1", x))).chunk(2, dim=1)
    u = a * b
    mean = u.mean((2, 3), keepdim=True) if window_size is None else window_means(u, window_size)
    y = x + state["beta"] * pointwise(state, "conv3", u * pointwise(state, "sca.1", mean))
    a, b = pointwise(state, "conv4", layer_norm(state, "norm2", y)).chunk(2, dim=1)
    torch.testing.assert_close(block(x), y + state["gamma"] * pointwise(state, "conv5", a * b), rtol=0, atol=1e-11)


@pytest.mark.parametrize("groups", [1, 2, 4])
@given(x=feature_maps(4, sides=st.integers(2, 9), dtype=torch.float64))
def test_group_norms_take_the_place_of_layer_norms(groups, x):
    block = moved(NAFBlock(4, norm_groups=groups))
    state = block.state_dict()

    def group_norm(name, x):
        cells = x.reshape(len(x), groups, -1)
        cells = (cells - cells.mean(2, keepdim=True)) / (cells.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return cells.reshape(x.shape) * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]

    a, b = depthwise(state, "conv2", pointwise(state, "conv1", group_norm("norm1", x))).chunk(2, dim=1)
    u = a * b
    y = x + state["beta"] * pointwise(state, "conv3", u * pointwise(state, "sca.1", u.mean((2, 3), keepdim=True)))
    a, b = pointwise(state, "conv4", group_norm("norm2", y)).chunk(2, dim=1)
    torch.testing.assert_close(block(x), y + state["gamma"] * pointwise(state, "conv5", a * b), rtol=0, atol=1e-11)


def test_group_norms_see_the_whole_map_and_divide_the_channels():
    assert not NAFBlock(4, window_size=5, norm_groups=2).tile_safe
    assert set(NAFBlock(4, norm_groups=2).state_dict()) == set(NAFBlock(4).state_dict())
    with pytest.raises(ValueError, match="channels must be a multiple of norm_groups = 3, got 4"):
        NAFBlock(4, norm_groups=3)
    with pytest.raises(ValueError, match="norm_groups must be an integer of at least 1, got 0"):
        NAFBlock(4, norm_groups=0)


def test_naf_block_has_the_public_layout():
    block = NAFBlock(64)
    shapes = {name: tuple(tensor.shape) for name, tensor in block.state_dict().items()}
    convolutions = {
        "conv1": (128, 64, 1, 1),
        "conv2": (128, 1, 3, 3),
        "conv3": (64, 64, 1, 1),
        "sca.1": (64, 64, 1, 1),
        "conv4": (128, 64, 1, 1),
        "conv5": (64, 64, 1, 1),
    }
    assert shapes == {
        **{f"{name}.weight": shape for name, shape in convolutions.items()},
        **{f"{name}.bias": shape[:1] for name, shape in convolutions.items()},
        **{f"{norm}.{name}": (64,) for norm in ("norm1", "norm2") for name in ("weight", "bias")},
        **dict.fromkeys(["beta", "gamma"], (1, 64, 1, 1)),
    }
    assert sum(parameter.numel() for parameter in block.parameters()) == 30_784


def test_windows_make_naf_block_tile_safe_and_as_wide_as_the_map_change_nothing():
    whole, local = NAFBlock(4), NAFBlock(4, window_size=21)
    assert (whole.tile_safe, whole.receptive_radius) == (False, 1)
    assert (local.tile_safe, local.receptive_radius) == (True, 11)
    moved(whole)
    local.double().load_state_dict(whole.state_dict())
    x = normal((2, 4, 9, 11), dtype=torch.float64)
    torch.testing.assert_close(local(x), whole(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_windows_keep_the_memory_format(memory_format):
    x = normal((2, 4, 9, 11)).contiguous(memory_format=memory_format)
    assert NAFBlock(4, window_size=5)(x).is_contiguous(memory_format=memory_format)


def test_bad_arguments_raise():
    for expansion in (0.2, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"expansion must leave at least 1 channel, got {expansion} of 4 channels"):
            GatedFFN(4, expansion=expansion)
    with pytest.raises(ValueError, match="kernel_size must be an odd integer of at least 1, got 2"):
        ConvGate(4, kernel_size=2)
    with pytest.raises(ValueError, match="window_size must be an odd integer of at least 1, got 8"):
        NAFBlock(4, window_size=8)
    for name in ("dw_expand", "ffn_expand"):
        with pytest.raises(ValueError, match=rf"channels \* {name} must be even, got 9"):
            NAFBlock(3, **{"dw_expand": 2, "ffn_expand": 2, name: 3})
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got 0"):
            NAFBlock(4, **{name: 0})
    for block in (GatedFFN, ConvGate, NAFBlock):
        with pytest.raises(ValueError, match="channels must be an integer of at least 1, got 0"):
            block(0)
