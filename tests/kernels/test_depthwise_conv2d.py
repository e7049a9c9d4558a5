"""The depthwise convolution is right: every form against a loop over taps in float64, outputs and all gradients.

Errors are relative to the largest value of the truth.
"""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from claritycore.kernels.depthwise_conv2d import depthwise_conv2d, depthwise_conv2d_reference, fallback
from tests.kernels.closeness import CPU, OUTPUT_ERROR, assert_close, error

ACTIVATIONS = (None, "relu", "leaky_relu", "gelu", "silu")
TENSORS = ("x", "weight", "bias")
FORMATS = {"first": torch.contiguous_format, "last": torch.channels_last}


@dataclass(frozen=True)
class Case:
    """One combination of sizes and options."""

    height: int
    width: int
    rows: int
    columns: int
    batch: int = 1
    channels: int = 2
    bias: bool = True
    activation: str | None = None
    channels_are: str = "first"

    def inputs(self, device=CPU, dtype=torch.float64):
        """The arguments of one call; the same numbers whatever the device and dtype."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(shape, generator=generator).to(device, dtype)

        x = draw(self.batch, self.channels, self.height, self.width)
        return {
            "x": x.to(memory_format=FORMATS[self.channels_are]),
            "weight": draw(self.channels, 1, self.rows, self.columns) / math.sqrt(self.rows * self.columns),
            "bias": draw(self.channels) if self.bias else None,
            "activation": self.activation,
        }


def cases(sides, sizes, channels=3):
    odd = sizes.map(lambda half: 2 * half + 1)
    return st.builds(
        Case,
        height=sides,
        width=sides,
        rows=odd,
        columns=odd,
        batch=st.integers(1, 2),
        channels=st.integers(1, channels),
        bias=st.booleans(),
        activation=st.sampled_from(ACTIVATIONS),
        channels_are=st.sampled_from(list(FORMATS)),
    )


def tensors(inputs):
    return {name: inputs[name] for name in TENSORS if inputs[name] is not None}


def wide(inputs):
    return inputs | {name: value.cpu().double() for name, value in tensors(inputs).items()}


def run(inputs, backend):
    """y and the gradient of every input, by name."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in tensors(inputs).items()}
    y = depthwise_conv2d(**inputs | leaves, backend=backend)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    gradients = torch.autograd.grad(y, list(leaves.values()), upstream)
    return {"y": y.detach()} | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}


def assert_right(case, backend, device):
    assert_close(run(case.inputs(device, torch.float32), backend), run(case.inputs(), "reference"))


def loop(x, weight, bias, activation):
    """The formula, number by number."""
    x, weight = x.numpy(), weight.numpy()
    y = np.zeros(x.shape) if bias is None else np.zeros(x.shape) + bias.numpy()[:, None, None]
    for (b, c, h, w), (i, j) in ((at, tap) for at in np.ndindex(x.shape) for tap in np.ndindex(weight.shape[2:])):
        row, column = h + i - weight.shape[2] // 2, w + j - weight.shape[3] // 2
        if 0 <= row < x.shape[2] and 0 <= column < x.shape[3]:
            y[b, c, h, w] += weight[c, 0, i, j] * x[b, c, row, column]
    curves = {
        None: lambda z: z,
        "relu": lambda z: max(z, 0),
        "leaky_relu": lambda z: z if z > 0 else 0.2 * z,
        "gelu": lambda z: z * (1 + math.erf(z / math.sqrt(2))) / 2,
        "silu": lambda z: z / (1 + math.exp(-z)),
    }
    return torch.from_numpy(np.vectorize(curves[activation], otypes=[float])(y))


@given(case=cases(st.integers(1, 5), st.integers(0, 3)))
def test_the_reference_is_the_formula(case):
    assert error(depthwise_conv2d_reference(**case.inputs()), loop(**case.inputs())) <= 1e-14


@given(case=cases(st.integers(1, 20), st.integers(0, 10), channels=20))
def test_the_fallback_agrees(case):
    assert_right(case, "torch", CPU)


@settings(max_examples=8)
@given(case=cases(st.integers(1, 4), st.integers(0, 2)))
def test_triton_agrees(case, device):
    assert_right(case, "triton", device)


@pytest.fixture(params=["torch", "triton"])
def form(request, device):
    """A fast form, and where it runs."""
    return request.param, device if request.param == "triton" else CPU


@pytest.mark.parametrize("channels_are", FORMATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(form, activation, channels_are):
    assert_right(Case(2, 3, 3, 3, activation=activation, channels_are=channels_are), *form)


SEAMS = [
    (2, 5, 31, 17),  # the kernel is larger than the map
    (1, 1, 5, 5),
    (1, 9, 1, 17),  # strips
    (9, 1, 17, 1),
    (2, 20, 1, 3),  # more columns than are computed at once
    (40, 2, 3, 1),
    (1, 20, 1, 37),  # more columns of kernel than a block of taps has
]


@pytest.mark.parametrize("channels_are", FORMATS)
@pytest.mark.parametrize("sizes", SEAMS, ids=str)
def test_every_form_agrees_at_the_seams(sizes, channels_are, form):
    assert_right(Case(*sizes, channels=1 if max(sizes) > 10 else 2, channels_are=channels_are), *form)


@pytest.mark.parametrize("channels_are", FORMATS)
def test_triton_agrees_with_many_channels(channels_are, device):
    assert_right(Case(1, 2, 1, 3, channels=33, channels_are=channels_are), "triton", device)


@pytest.mark.parametrize("channels_are", FORMATS)
def test_triton_divides_the_taps(channels_are, device, monkeypatch):
    fused_backward = pytest.importorskip("claritycore.kernels.depthwise_conv2d.fused_backward")
    monkeypatch.setattr(fused_backward, "TAPS", 6)
    monkeypatch.setattr(fused_backward, "COLUMNS", 3)
    assert_right(Case(3, 3, 5, 5, channels_are=channels_are), "triton", device)


@pytest.mark.parametrize("channels_are", FORMATS)
def test_triton_divides_the_pixels(channels_are, device, monkeypatch):
    fused_backward = pytest.importorskip("claritycore.kernels.depthwise_conv2d.fused_backward")
    for programs in (1, 4, 1000):  # all to one, unevenly, one each
        monkeypatch.setattr(fused_backward, "PROGRAMS_PER_PROCESSOR", programs)
        assert_right(Case(5, 3, 1, 3, batch=3, channels_are=channels_are), "triton", device)


@pytest.mark.parametrize("avx2", [False, True])
@pytest.mark.parametrize("channels_are", FORMATS)
def test_the_fallback_agrees_whatever_it_cuts(channels_are, avx2, monkeypatch):
    for name, value in {"PIECE": 1000, "TILE": 5, "GROUP": 500, "AVX2": avx2}.items():
        monkeypatch.setattr(fallback, name, value)
    cut = {"channels_are": channels_are}
    assert_right(Case(12, 13, 3, 17, batch=3, **cut), "torch", CPU)
    assert_right(Case(16, 64, 15, 15, channels=40, **cut), "torch", CPU)
    assert_right(Case(6, 7, 5, 5, batch=5, channels=17, **cut), "torch", CPU)


@pytest.mark.parametrize("channels_are", FORMATS)
def test_the_fallback_agrees_without_onednn(channels_are, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert_right(Case(12, 13, 5, 17, batch=2, activation="gelu", channels_are=channels_are), "torch", CPU)


def test_large_maps_and_kernels_agree():
    case = Case(130, 70, 21, 21, channels=3, activation="silu")
    assert_right(case, "torch", CPU)


@pytest.mark.parametrize("sizes", [(17, 2, 63, 17), (16, 4, 31, 3), (17, 33, 63, 3), (17, 1, 63, 31)], ids=str)
def test_one_channel_and_a_kernel_far_taller_than_the_map_agree(sizes):
    """OneDNN's own gradient of such a kernel writes past its memory: sometimes wrong, sometimes the end of Python."""
    for _ in range(5):
        assert_right(Case(*sizes, batch=3, channels=1), "torch", CPU)


def test_wrong_numbers_would_be_seen():
    inputs = Case(3, 4, 3, 5).inputs()
    flipped = inputs | {"weight": inputs["weight"].flip(2, 3)}
    assert error(depthwise_conv2d(**flipped), loop(**inputs)) > 1e3 * OUTPUT_ERROR
