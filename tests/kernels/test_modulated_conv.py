"""The modulated convolution and its epilogue are right: three forms of one formula, at every scale of a style."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from claritycore.kernels import modulate, modulated_conv2d, noise_bias_act
from claritycore.kernels.modulated_conv import GAINS
from tests.kernels.closeness import CPU
from tests.strategies import SIDES, normal

FORMATS = {"first": torch.contiguous_format, "last": torch.channels_last}
DOUBLE = {"dtype": torch.float64}


def inputs(batch=2, channels=3, outputs=4, size=(5, 6), kernel=3, dtype=torch.float64):
    weight = normal((outputs, channels, kernel, kernel), dtype=dtype, seed=1)
    return normal((batch, channels, *size), dtype=dtype), weight, normal((batch, channels), dtype=dtype, seed=2)


@given(height=SIDES, width=SIDES, kernel=st.sampled_from([1, 3, 5]), demodulate=st.booleans())
def test_the_forms_agree(height, width, kernel, demodulate):
    operands = inputs(size=(height, width), kernel=kernel)
    expected = modulated_conv2d(*operands, demodulate=demodulate, form="reference")
    for form in ("auto", "scale", "grouped"):
        y = modulated_conv2d(*operands, demodulate=demodulate, form=form)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12 * expected.abs().max().item())
    one = operands[0][:1], operands[1], operands[2][:1]
    for form in ("auto", "folded", "grouped", "scale"):
        y = modulated_conv2d(*one, demodulate=demodulate, form=form)
        torch.testing.assert_close(y, expected[:1], rtol=0, atol=1e-12 * expected.abs().max().item())


def test_the_formula_written_out():
    x, weight, style = inputs(size=(3, 2))
    y = modulated_conv2d(x, weight, style)
    for b in range(2):
        kernel = weight * style[b, :, None, None]
        kernel = kernel / (kernel**2).sum((1, 2, 3), keepdim=True).sqrt()
        padded = torch.nn.functional.pad(x[b], (1, 1, 1, 1))
        for i in range(3):
            for j in range(2):
                expected = (kernel * padded[:, i : i + 3, j : j + 3]).sum((1, 2, 3))
                torch.testing.assert_close(y[b, :, i, j], expected, rtol=1e-7, atol=1e-7)


def test_ones_without_demodulation_are_a_convolution():
    x, weight, style = inputs()
    y = modulated_conv2d(x, weight, torch.ones_like(style), demodulate=False)
    torch.testing.assert_close(y, torch.nn.functional.conv2d(x, weight, padding=1), rtol=0, atol=1e-12)


@given(factor=st.sampled_from([1e-30, 1e-6, 3.0, 1e6, 1e30]), form=st.sampled_from(["scale", "grouped"]))
def test_the_scale_of_a_style_or_a_kernel_changes_nothing(factor, form):
    x, weight, style = inputs(dtype=torch.float32)
    expected = modulated_conv2d(x, weight, style, form=form)
    for scaled in ((weight, style * factor), (weight * factor, style)):
        torch.testing.assert_close(modulated_conv2d(x, *scaled, form=form), expected, rtol=0, atol=1e-5)


def test_unit_variance_stays():
    x, weight, style = inputs(2, 64, 64, (64, 64), dtype=torch.float32)
    y = modulated_conv2d(x, weight, style)[..., 1:-1, 1:-1]
    assert (y.var((2, 3)) - 1).abs().max() <= 0.2
    assert abs(y.var().item() - 1) <= 0.02


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factor", [1e-6, 20.0, 6e4])
@pytest.mark.parametrize("form", ["scale", "grouped", "auto"])
def test_half_precision_at_extreme_styles(dtype, factor, form):
    """Of 512 channels and styles and maps so loud, squares of kernels overflow half precision."""
    x, weight, style = inputs(1, 512, 8, (3, 4))
    x, weight, style = (30 * x).to(dtype), weight.to(dtype), style.float() * factor
    y = modulated_conv2d(x, weight, style, form=form)
    expected = modulated_conv2d(x.double(), weight.double(), style.double(), form="reference")
    assert y.dtype == dtype
    assert (y.double() - expected).abs().max() <= 8 * torch.finfo(dtype).eps * expected.abs().max()


def test_a_loud_style_of_quiet_maps_without_demodulation_stays_in_half_precision():
    """What kernel and style were divided by is beyond float16, and what comes of it is not."""
    x, weight, style = inputs(dtype=torch.float32)
    x, style = (1e-3 * x).half(), 1e6 * style
    y = modulated_conv2d(x, 0.1 * weight, style, demodulate=False)
    expected = modulated_conv2d(x.double(), 0.1 * weight.double(), style.double(), demodulate=False)
    assert 1e3 < expected.abs().max() < 6e4
    assert (y.double() - expected).abs().max() <= 4 * torch.finfo(torch.float16).eps * expected.abs().max()


@pytest.mark.parametrize("form", ["scale", "grouped"])
def test_a_map_of_doubles_is_convolved_in_double_precision(form):
    x, weight, style = inputs()
    weight, style = weight.float(), style.float()
    expected = modulated_conv2d(x, weight.double(), style.double(), form="reference")
    torch.testing.assert_close(modulated_conv2d(x, weight, style, form=form), expected, rtol=0, atol=1e-12)


def test_a_style_of_zeros_gives_zeros_and_finite_gradients():
    x, weight, style = (v.float().requires_grad_() for v in inputs())
    y = modulated_conv2d(x, weight, 0 * style, form="scale")
    assert torch.equal(y, torch.zeros_like(y))
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), (x, weight, style)))


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if torch.is_tensor(tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_sample_has_a_kernel_of_its_own():
    x, weight, style = (v.requires_grad_() for v in inputs(8, 16, 16, (2, 2), dtype=torch.float32))
    with Largest() as largest:
        modulated_conv2d(x, weight, style, form="scale").sum().backward()
    assert largest.elements == weight.numel()
    with Largest() as largest:
        modulated_conv2d(x, weight, style, form="grouped")
    assert largest.elements == 8 * weight.numel()


@pytest.mark.parametrize(
    ("batch", "channels", "side", "dtype", "form"),
    [
        (1, 48, 16, torch.float32, "folded"),
        (1, 48, 8, torch.float32, "scale"),  # the kernel is larger than both maps
        (4, 16, 48, torch.float32, "grouped"),
        (4, 16, 48, torch.bfloat16, "scale"),
        (4, 16, 40, torch.float32, "scale"),
        (2, 512, 48, torch.float32, "scale"),  # two kernels are larger than the maps
    ],
    ids=str,
)
def test_the_form_that_is_taken(batch, channels, side, dtype, form):
    operands = inputs(batch, channels, channels, (side, side), dtype=dtype)
    assert torch.equal(modulated_conv2d(*operands), modulated_conv2d(*operands, form=form))
    if form != "scale":
        assert not torch.equal(modulated_conv2d(*operands), modulated_conv2d(*operands, form="scale"))


def test_demodulation_is_a_small_product():
    _, weight, style = inputs()
    scales = modulate(weight, style)
    kernels = weight * style[:, None, :, None, None]
    expected = kernels.square().sum((2, 3, 4)).rsqrt()
    undone = style.abs().amax(1, keepdim=True) * weight.abs().amax((1, 2, 3)) * math.sqrt(27)
    torch.testing.assert_close(scales.out_scale / undone, expected, rtol=1e-7, atol=0)


# The epilogue


def epilogue(size=(3, 5), batch=2, channels=3, dtype=torch.float64, one=False, device=CPU):
    x = normal((batch, channels, *size), dtype=dtype)
    small = {
        "bias": normal((channels,), dtype=dtype, seed=1),
        "noise": normal((1 if one else batch, 1, *size), dtype=dtype, seed=2),
        "strength": normal(() if one else (channels,), dtype=dtype, seed=3),
        "demodulation": normal((batch, channels), dtype=dtype, seed=4),
    }
    return {name: v.to(device) for name, v in ({"x": x} | small).items()}


def results(operands, **options):
    """The output and every gradient, by name."""
    leaves = {name: v.detach().requires_grad_() for name, v in operands.items()}
    y = noise_bias_act(**leaves, **options)
    pull = normal(tuple(y.shape), seed=9, dtype=torch.float64).to(y)
    gradients = torch.autograd.grad(y, list(leaves.values()), pull)
    return {"y": y, **dict(zip(leaves, gradients, strict=True))}


def assert_right(backend, device, channels_are, size, one=False, channels=3, **options):
    truth = results(epilogue(size, channels=channels, one=one), backend="reference", **options)
    operands = epilogue(size, channels=channels, one=one, dtype=torch.float32, device=device)
    operands["x"] = operands["x"].to(memory_format=FORMATS[channels_are])
    for name, value in results(operands, backend=backend, **options).items():
        scale = max(1, truth[name].abs().max().item())
        assert (value.cpu().double() - truth[name]).abs().max() <= 2e-6 * scale * math.sqrt(size[0] * size[1]), name


def test_the_epilogue_written_out():
    x, bias, noise, strength, demodulation = epilogue((2, 3)).values()
    y = noise_bias_act(x, bias, noise, strength, demodulation, clamp=1.5)
    for b, c, i, j in torch.cartesian_prod(*map(torch.arange, y.shape)).tolist():
        z = x[b, c, i, j] * demodulation[b, c] + strength[c] * noise[b, 0, i, j] + bias[c]
        z = max(-1.5, min(1.5, (z if z > 0 else 0.2 * z).item() * math.sqrt(2)))
        assert y[b, c, i, j].item() == pytest.approx(z, 1e-12)


@given(
    height=SIDES, width=SIDES, channels_are=st.sampled_from(list(FORMATS)), one=st.booleans(),
    activation=st.sampled_from(list(GAINS)), clamp=st.sampled_from([None, 1.0]),
)  # fmt: skip
def test_the_fallback_agrees(height, width, channels_are, one, activation, clamp):
    assert_right("torch", CPU, channels_are, (height, width), one, activation=activation, clamp=clamp)


@pytest.mark.parametrize("channels_are", FORMATS)
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1), (3, 5)], ids=str)
@pytest.mark.parametrize("activation", GAINS)
def test_triton_agrees(size, channels_are, activation, device):
    assert_right("triton", device, channels_are, size, activation=activation, clamp=1.0, gain=1.25)


@pytest.mark.parametrize("channels_are", FORMATS)
@pytest.mark.parametrize("clamp", [None, 0.7])
def test_triton_agrees_at_the_seams(channels_are, clamp, device, monkeypatch):
    fused = pytest.importorskip("claritycore.kernels.modulated_conv.fused")
    for name, value in {"TILE": 4, "MOST_CHANNELS": 2, "STEPS": 2}.items():
        monkeypatch.setattr(fused, name, value)
    assert_right("triton", device, channels_are, (4, 5), one=True, channels=5, clamp=clamp)


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_operands_may_be_missing_and_maps_turned(form, device):
    device = device if form == "triton" else CPU
    x, bias, noise, strength, demodulation = epilogue((3, 4), device=device).values()
    for given_ in ({}, {"bias": bias}, {"noise": noise, "strength": strength}, {"demodulation": demodulation}):
        for turned in (x, x.mT.contiguous().mT, torch.cat((x, x), 3)[..., :4], x.expand(3, *x.shape)[0]):
            y = noise_bias_act(turned, **given_, backend=form)
            torch.testing.assert_close(y, noise_bias_act(x, **given_, backend="reference"), rtol=0, atol=1e-14)
            assert y.stride() == torch.empty_like(turned).stride()


@pytest.mark.parametrize("form", ["torch", "triton"])
def test_slopes_where_activation_and_bound_have_a_corner(form, device):
    """Of zero and of the bound itself, as torch has them."""
    device = device if form == "triton" else CPU
    x = torch.tensor([0.0, -0.0, 1.0, -1.0, 1.5, -1.5, 0.5, -0.5], dtype=torch.float64).view(1, 1, 2, 4)
    for options in ({"activation": "lrelu"}, {"activation": "relu"}, {"activation": "linear", "clamp": 1.0}):
        expected = results({"x": x}, gain=1.0, backend="reference", **options)
        found = results({"x": x.to(device)}, gain=1.0, backend=form, **options)
        for name, value in expected.items():
            torch.testing.assert_close(found[name].cpu(), value, rtol=0, atol=1e-14)


def test_noise_of_no_strength_changes_nothing():
    operands = epilogue(dtype=torch.float32)
    operands["strength"] = torch.zeros(())
    silent = noise_bias_act(operands["x"], operands["bias"], demodulation=operands["demodulation"])
    assert torch.equal(noise_bias_act(**operands), silent)


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_are", FORMATS)
def test_half_precision_is_rounded_once(form, dtype, channels_are, device):
    operands = epilogue(dtype=torch.float32, device=device if form == "triton" else CPU)
    operands["x"] = operands["x"].to(dtype).to(memory_format=FORMATS[channels_are])
    y = noise_bias_act(**operands, backend=form)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=FORMATS[channels_are])
    exact = noise_bias_act(**{name: v.double() for name, v in operands.items()}, backend="reference")
    assert (y.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
