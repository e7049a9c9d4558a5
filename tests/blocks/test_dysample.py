"""DySample against a loop over its samples, in the form that runs and in the one that is compiled or exported."""

import contextlib
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from claritycore.blocks import DySample
from tests.strategies import SIDES, feature_maps, normal

STYLES = ("lp", "pl")


@contextlib.contextmanager
def form(compiled: bool):
    """Take the gathers of compiled graphs in eager mode, or grid_sample."""
    with mock.patch("torch.compiler.is_compiling", return_value=compiled):
        yield


both_forms = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


def with_offsets_of_some_pixels(block: DySample, seed: int = 0) -> DySample:
    with torch.no_grad():
        for number, parameter in enumerate(block.parameters()):
            parameter.copy_(normal(tuple(parameter.shape), dtype=torch.float64, seed=seed + number))
    return block.eval()


def sampled_by_hand(block: DySample, x: torch.Tensor) -> torch.Tensor:
    """One output value after the other, in float64."""
    s, groups = block.scale_factor, block.groups
    batch, channels, height, width = x.shape
    y = torch.empty(batch, channels, s * height, s * width, dtype=torch.float64)
    for b, c, i, j, k, m in torch.cartesian_prod(*map(torch.arange, (batch, channels, height, width, s, s))).tolist():
        group = c // (channels // groups)
        if block.style == "lp":
            features, first, second = x[b, :, i, j], group * s * s + k * s + m, (groups + group) * s * s + k * s + m
        else:
            features, first, second = x[b, k * s + m :: s * s, i, j], group, groups + group
        place = []
        for number, own, step, side in ((first, j, m, width), (second, i, k, height)):
            offset = block.offset.weight[number].flatten() @ features + block.offset.bias[number]
            if block.scope is not None:
                offset = offset * torch.sigmoid(block.scope.weight[number].flatten() @ features) / 2
            else:
                offset = offset / 4
            at = own + (step - (s - 1) / 2) / s + offset.item()
            place.append(min(max(at, 0.0), side - 1.0))
        left, top = int(place[0]), int(place[1])
        right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
        across, down = place[0] - left, place[1] - top
        above = x[b, c, top, left] * (1 - across) + x[b, c, top, right] * across
        below = x[b, c, bottom, left] * (1 - across) + x[b, c, bottom, right] * across
        y[b, c, i * s + k, j * s + m] = above * (1 - down) + below * down
    return y


@both_forms
@pytest.mark.parametrize("style", STYLES)
@given(x=feature_maps(16), scale=st.sampled_from([1, 2, 4]))
def test_without_offsets_it_is_bilinear_upsampling(compiled, style, x, scale):
    block = DySample(16, scale_factor=scale, style=style)
    nn.init.zeros_(block.offset.weight)
    with form(compiled):
        y = block(x)
    expected = F.interpolate(x, scale_factor=float(scale), mode="bilinear", align_corners=False)
    # Coordinates between -1 and 1, as grid_sample takes them, are rounded to 2**-24 of the side.
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6 if compiled else 1e-5)


@both_forms
@pytest.mark.parametrize("style", STYLES)
@given(x=feature_maps(18, dtype=torch.float64))
def test_without_offsets_it_is_bilinear_upsampling_by_3(compiled, style, x):
    block = DySample(18, scale_factor=3, style=style, groups=3).double()
    nn.init.zeros_(block.offset.weight)
    with form(compiled):
        y = block(x)
    # The thirds of a pixel are those of float32.
    torch.testing.assert_close(
        y, F.interpolate(x, scale_factor=3.0, mode="bilinear", align_corners=False), rtol=0, atol=1e-6
    )


@both_forms
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dyscope", [False, True])
@pytest.mark.parametrize(
    ("scale", "groups", "channels", "size"),
    [(2, 2, 4, (3, 4)), (2, 1, 4, (1, 1)), (3, 3, 9, (2, 3)), (4, 1, 16, (1, 2)), (1, 2, 4, (2, 5))],
)
def test_each_sample_is_the_formula(compiled, style, dyscope, scale, groups, channels, size):
    block = DySample(channels, scale_factor=scale, style=style, groups=groups, dyscope=dyscope).double()
    with_offsets_of_some_pixels(block)
    # The public layout: x before y, then the groups, then the cell row by row.
    steps = [(step - (scale - 1) / 2) / scale for step in range(scale)]
    grid = [column for _ in range(groups) for _ in steps for column in steps]
    grid += [row for _ in range(groups) for row in steps for _ in steps]
    exact = torch.tensor(grid, dtype=torch.float64).view(1, -1, 1, 1)
    torch.testing.assert_close(block.init_pos, exact, rtol=0, atol=1e-7)
    block.init_pos.copy_(exact)
    x = normal((2, channels, *size), dtype=torch.float64, seed=3)
    with form(compiled), torch.no_grad():
        y = block(x)
        torch.testing.assert_close(y, sampled_by_hand(block, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("style", STYLES)
@given(x=feature_maps(8, sides=SIDES), seed=st.integers(0, 99))
def test_the_forms_agree_in_outputs_and_gradients(style, x, seed):
    block = with_offsets_of_some_pixels(DySample(8, style=style, dyscope=True).double(), seed)
    results = []
    for compiled in (False, True):
        leaf = x.double().requires_grad_()
        with form(compiled):
            y = block(leaf)
        upstream = normal(tuple(y.shape), dtype=torch.float64)
        results.append((y, *torch.autograd.grad((y * upstream).sum(), [leaf, *block.parameters()])))
    for eager, gathered in zip(*results, strict=True):
        torch.testing.assert_close(eager, gathered, rtol=1e-9, atol=1e-9)


@both_forms
@pytest.mark.parametrize("style", STYLES)
def test_gradients(compiled, style):
    block = with_offsets_of_some_pixels(DySample(4, style=style, groups=2, dyscope=True).double())
    x = normal((1, 4, 3, 2), dtype=torch.float64).requires_grad_()
    with form(compiled):
        assert torch.autograd.gradcheck(lambda x, *_: block(x), (x, *block.parameters()))


@both_forms
@pytest.mark.parametrize("width", [20, 600, 4096])
def test_places_in_wide_maps_are_as_exact_as_float32_allows(compiled, width):
    block = with_offsets_of_some_pixels(DySample(8))
    x = normal((1, 8, 3, width))
    with torch.no_grad():
        with form(compiled):
            y = block(x)
        offsets = block.offset(x).double()  # the same, so that only the places differ
        block.offset.forward = lambda _: offsets
        block.init_pos = block.init_pos.double()
        exact = block(x.double())
    # Gathers know how far it is from pixel to pixel; grid_sample takes places in parts of the width, and the
    # difference of two neighbours, here up to 8, times their error is the error of the sample.
    tolerance = 2e-6 if compiled else 8 * width * 2**-23
    assert (y.double() - exact).abs().max() <= tolerance


@both_forms
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str)
def test_places_are_float32_under_half(compiled, dtype, tolerance):
    """In bfloat16 a place near the end of 600 pixels would be 2 pixels off."""
    torch.manual_seed(0)
    block = DySample(8).to(dtype)
    x = normal((1, 8, 5, 600), dtype=dtype)
    with torch.no_grad(), form(compiled):
        y = block(x)
        expected = block.float()(x.float())
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), expected, rtol=0, atol=tolerance * expected.abs().max().item())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = block(x.float())
        torch.testing.assert_close(y.float(), expected, rtol=0, atol=2e-2 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("style", "dyscope", "parameters", "shapes"),
    [
        ("lp", False, 544, {"offset.weight": (32, 16, 1, 1), "offset.bias": (32,)}),
        ("lp", True, 1056, {"offset.weight": (32, 16, 1, 1), "offset.bias": (32,), "scope.weight": (32, 16, 1, 1)}),
        ("pl", False, 40, {"offset.weight": (8, 4, 1, 1), "offset.bias": (8,)}),
        ("pl", True, 72, {"offset.weight": (8, 4, 1, 1), "offset.bias": (8,), "scope.weight": (8, 4, 1, 1)}),
    ],
)
def test_the_public_layout(style, dyscope, parameters, shapes):
    block = DySample(16, scale_factor=2, style=style, groups=4, dyscope=dyscope)
    assert sum(parameter.numel() for parameter in block.parameters()) == parameters
    state = {name: tuple(tensor.shape) for name, tensor in block.state_dict().items()}
    assert state == {**shapes, "init_pos": (1, 32, 1, 1)}


def test_it_starts_as_the_paper_says():
    torch.manual_seed(0)
    block = DySample(64, scale_factor=4, dyscope=True)
    assert block.offset.weight.std().item() == pytest.approx(0.001, rel=0.05)
    assert not block.offset.bias.any()
    assert not block.scope.weight.any()
    with torch.device("meta"):
        assert DySample(8).offset.weight.is_meta


def test_exports_without_grid_sample():
    program = torch.export.export(DySample(8).eval(), (normal((1, 8, 5, 7)),))
    assert not any("grid_sampler" in str(node.target) for node in program.graph.nodes)


def test_bad_arguments_raise():
    with pytest.raises(ValueError, match="style must be one of lp, pl, got 'up'"):
        DySample(8, style="up")
    with pytest.raises(ValueError, match="channels must be a multiple of groups = 4, got 6"):
        DySample(6)
    with pytest.raises(ValueError, match='channels must be a multiple of 9 for style "pl", got 12'):
        DySample(12, scale_factor=3, style="pl")
    with pytest.raises(ValueError, match='channels must be a multiple of 16 for style "pl", got 8'):
        DySample(8, scale_factor=4, style="pl")
    for name in ("channels", "scale_factor", "groups"):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got 0"):
            DySample(**{"channels": 8, name: 0})
    assert repr(DySample(8)).startswith("DySample(\n  8, scale_factor=2, style='lp', groups=4\n")
    assert DySample(8).tile_safe is False
    assert (DySample(8).receptive_radius, DySample(8, scale_factor=1).receptive_radius) == (1, 0)
