"""The frequency splits as torch sees them: compile, vmap, autocast, gradient checks, layouts, and what they refuse."""

from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from claritycore.deploy import flop_formulas
from claritycore.kernels import blur_split, fft_split, haar_merge, haar_split
from claritycore.kernels.frequency_split import (
    blur_split_flops,
    fft_split_flops,
    frequency_split_bytes,
    gaussian_sigma,
    haar_split_flops,
    op_fourier,
)
from tests.kernels.closeness import CPU
from tests.kernels.test_frequency_split import ALL, FORMATS, SPLITS, largest
from tests.strategies import normal

OPS = torch.ops.claritycore
EACH = torch.tensor([0.3, 0.6])


@pytest.fixture(params=["torch", "triton"])
def form(request, device):
    """A fast form, and where it runs."""
    return request.param, device if request.param == "triton" else CPU


@pytest.mark.parametrize("mask", ["gaussian", "butterworth"])
@pytest.mark.parametrize("shape", [(), (2,), (1, 2)], ids=str)
def test_gradients_of_the_fourier_split(mask, shape):
    x = normal((1, 2, 3, 5), dtype=torch.float64).requires_grad_()
    cutoff = torch.full(shape, 0.4, dtype=torch.float64, requires_grad=True)
    split = partial(fft_split, mask=mask, padding=2)
    assert gradcheck(split, (x, cutoff))
    if shape == (2,):
        assert gradgradcheck(split, (x, cutoff))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 5)], ids=str)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradients_of_blur_and_haar(backend, size):
    x = normal((1, 2, *size), dtype=torch.float64).requires_grad_()
    for split in (
        lambda x: blur_split(x, EACH, backend=backend),
        lambda x: haar_split(x, backend=backend)[0],
        lambda x: haar_merge([b.square() for b in haar_split(x, backend=backend)[0]], size, backend=backend),
    ):
        assert gradcheck(split, x)
        assert gradgradcheck(split, x)


def test_they_meet_the_rules_of_torch(form):
    name, device = form
    x, half = (normal((1, 2, *size)).to(device).requires_grad_() for size in ((3, 4), (2, 2)))
    opcheck(OPS.blur_split, (x, [0.3], name))
    opcheck(OPS.blur_split_adjoint, (x, x.detach().clone(), [0.3, 0.3], name))
    opcheck(OPS.haar_split, (x, False, name))
    opcheck(OPS.haar_merge, (half, *(half.detach() * i for i in range(3)), [3, 4], True, name))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_are", FORMATS)
def test_dtypes_and_layouts_are_kept(form, dtype, channels_are):
    backend, device = form
    x = normal((2, 2, 3, 5), dtype=dtype).to(device).to(memory_format=FORMATS[channels_are])
    wide = x.float() if dtype != torch.float64 else x
    for split in (
        lambda x: blur_split(x, 0.3, backend=backend),
        lambda x: haar_split(x, backend=backend)[0],
        lambda x: [haar_merge(*haar_split(x, backend=backend), backend=backend)],
        lambda x: fft_split(x, 0.5),
    ):
        for y, exact in zip(split(x), split(wide), strict=True):
            assert y.dtype == dtype
            assert y.is_contiguous(memory_format=FORMATS[channels_are])
            assert largest(y.double() - exact.double()) <= 2 * torch.finfo(dtype).eps * largest(exact)


@pytest.mark.parametrize("name", ALL)
def test_views_repeat_batches_and_autocast(name):
    x = normal((2, 3, 9, 7))
    low, high = ALL[name](x)
    turned = x.mT.contiguous().mT
    apart = torch.cat((x, x), 3)[..., :7]
    for other in (x.clone(), turned, apart):
        assert largest(ALL[name](other)[0] - low) <= 1e-6
    assert all(torch.equal(a, b) for a, b in zip(ALL[name](x), (low, high), strict=True))
    assert largest(ALL[name](x[1:])[0] - low[1:]) <= 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        inside = ALL[name](x)
    assert torch.equal(inside[0], low)
    assert ALL[name](x[:0])[0].shape == (0, 3, 9, 7)
    if name != "blur by channel":
        assert ALL[name](x.to("meta"))[1].shape == x.shape


@pytest.mark.parametrize("name", ["gaussian", "learned", "blur", "haar"])
def test_vmap_keeps_calls_apart(name):
    x = normal((3, 2, 2, 5, 4), dtype=torch.float64)
    for got, want in zip(torch.vmap(ALL[name])(x), zip(*map(ALL[name], x), strict=True), strict=True):
        assert largest(got - torch.stack(want)) <= 1e-14
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(torch.vmap(ALL[name])(leaf)[0].square().sum(), leaf)
    for got, one in zip(gradient, x, strict=True):
        one.requires_grad_()
        assert largest(got - torch.autograd.grad(ALL[name](one)[0].square().sum(), one)[0]) <= 1e-13


@pytest.mark.parametrize("name", ["gaussian", "learned", "blur", "haar"])
def test_they_compile_in_one_graph(name):
    compiled = torch.compile(ALL[name], fullgraph=True, backend="aot_eager", dynamic=False)
    x = normal((2, 3, 6, 9)).requires_grad_()
    for got, want in zip(compiled(x), ALL[name](x), strict=True):
        assert largest(got - want) <= 1e-6
        assert got.stride() == want.stride()


@pytest.mark.parametrize("name", ["gaussian", "learned", "blur", "haar"])
def test_one_graph_serves_every_size(name, monkeypatch):
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(ALL[name], fullgraph=True, backend=count, dynamic=True)
    sizes = ((6, 9), (17, 12), (40, 31))
    got = [compiled(normal((2, 3, *size))) for size in sizes]
    monkeypatch.setattr(op_fourier, "smooth", lambda n: n)  # the one thing that differs: an open size is not rounded
    for size, bands in zip(sizes, got, strict=True):
        for one, want in zip(bands, ALL[name](normal((2, 3, *size))), strict=True):
            assert largest(one - want) <= 1e-6
            assert one.stride() == want.stride()
    assert len(graphs) == 1


X = torch.zeros(1, 2, 4, 4)
BANDS = [torch.zeros(1, 2, 2, 2)] * 4
REFUSED = [
    (lambda: fft_split(X[0], 0.5), ValueError, r"x must be \(B, C, H, W\), got shape \(2, 4, 4\)"),
    (lambda: blur_split(X[:, :, :0], 1.0), ValueError, "x must have at least one row and column"),
    (lambda: haar_split(X.long()), TypeError, "x must be floating-point, got torch.int64"),
    (lambda: fft_split(X, 0.0), ValueError, "cutoff must be above 0 and at most 1.42, got 0.0"),
    (lambda: fft_split(X, 1.43), ValueError, "cutoff must be above 0 and at most 1.42, got 1.43"),
    (lambda: fft_split(X, float("nan")), ValueError, "cutoff must be above 0 and at most 1.42, got nan"),
    (lambda: fft_split(X, torch.ones(3)), ValueError, r"cutoff must be a number or \(\), \(C,\) = \(2,\) or .* \(3,\)"),
    (lambda: fft_split(X, torch.ones(2, dtype=torch.int)), TypeError, "cutoff must be floating-point, got torch.int32"),
    (lambda: fft_split(X, 0.5, mask="box"), ValueError, "mask must be one of gaussian, butterworth, ideal, got 'box'"),
    (lambda: fft_split(X, 0.5, padding=-1), ValueError, "padding must be an integer of at least 0, got -1"),
    (lambda: fft_split(X, 0.5, padding=1.5), ValueError, "padding must be an integer of at least 0, got 1.5"),
    (lambda: fft_split(X, [0.5, 0.5]), TypeError, r"cutoff must be a number or a tensor, got \[0.5, 0.5\]"),
    (lambda: blur_split(X, "12"), TypeError, "sigma must be a number, a sequence of numbers or a tensor, got '12'"),
    (lambda: blur_split(X, [1.0]), ValueError, "sigma must be a number or one for each of 2 channels, got 1"),
    (lambda: blur_split(X, [1.0, 0.0]), ValueError, "sigma must be above 0 and finite, got 0.0"),
    (
        lambda: fft_split(X, torch.ones(2, requires_grad=True), mask="ideal"),
        *(ValueError, "cutoff of an ideal mask must not require a gradient"),
    ),
    (lambda: blur_split(X, 0.0), ValueError, "sigma must be above 0 and finite, got 0.0"),
    (lambda: blur_split(X, float("inf")), ValueError, "sigma must be above 0 and finite, got inf"),
    (lambda: blur_split(X, torch.tensor([1.0, -1.0])), ValueError, "sigma must be above 0 and finite, got -1.0"),
    (lambda: blur_split(X, torch.ones(3)), ValueError, r"sigma must be a number or \(C,\) = \(2,\), got shape \(3,\)"),
    (lambda: blur_split(X, torch.ones(2, requires_grad=True)), ValueError, "sigma must not .* learn a cutoff with fft"),
    (lambda: blur_split(X, 1.0, backend="cuda"), ValueError, "backend must be one of auto, triton, torch, reference"),
    (lambda: haar_merge(BANDS[:3], (4, 4)), ValueError, r"bands must be the four \(LL, LH, HL, HH\), got 3"),
    (lambda: haar_merge(BANDS, (4, 5)), ValueError, r"LL must be \(B, C, 2, 3\) for a map of 4 x 5, got shape"),
    (lambda: haar_merge(BANDS, (4, 0)), ValueError, r"size must be a height and a width of at least 1, got \(4, 0\)"),
    (lambda: haar_merge(BANDS, 4), ValueError, "size must be a height and a width of at least 1, got 4"),
    (lambda: haar_merge(BANDS, (4.0, 4.0)), ValueError, r"size must be a height and a width .*, got \(4.0, 4.0\)"),
    (lambda: haar_merge(None, (4, 4)), ValueError, r"bands must be the four \(LL, LH, HL, HH\), got None"),
    (lambda: haar_merge([*BANDS[:3], BANDS[0].double()], (4, 4)), ValueError, "HH must have the shape and dtype of LL"),
    (lambda: gaussian_sigma(0.0), ValueError, "cutoff must be above 0, got 0.0"),
]


@pytest.mark.parametrize(("call", "kind", "message"), REFUSED, ids=[message[:40] for _, _, message in REFUSED])
def test_bad_input_is_named(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_a_backend_that_cannot_run_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="frequency_split cannot run with backend='triton': its tensors are on cpu"):
        blur_split(X, 1.0, backend="triton")


def test_they_count_their_work():
    assert blur_split_flops(2, 3, 5, 7, sigma=1.0) == 2 * 3 * 5 * 7 * (4 * 7 + 1)
    assert haar_split_flops(2, 3, 5, 7) == 12 * 2 * 3 * 3 * 4
    assert fft_split_flops(1, 1, 24, 24, padding=4) == 2 * 2.5 * 32 * 32 * 10 + 2 * 32 * 17 + 24 * 24
    assert frequency_split_bytes(2, 3, 5, 7, itemsize=2, backward=True) == 2 * 6 * 2 * 3 * 5 * 7
    x = normal((1, 2, 24, 24)).requires_grad_()
    transform = 2 * 2.5 * 40 * 40 * 10.643856  # two channels of 40 x 40
    # Torch takes the gradient of a real transform by a complex one.
    expected = {"gaussian": 5 * transform, "blur": 2 * blur_split_flops(1, 2, 24, 24, sigma=1.5)}
    for name, flops in expected.items():
        with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
            SPLITS[name](x)[0].sum().backward()
        assert counter.get_total_flops() == pytest.approx(flops, rel=1e-3)
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        haar_merge(*haar_split(x))
    assert counter.get_total_flops() == 2 * haar_split_flops(1, 2, 24, 24)
