"""The frequency splits are right: against transforms, filters and loops that others wrote, forward and backward."""

import math

import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from claritycore.kernels import blur_split, fft_split, gaussian_sigma, haar_merge, haar_split
from claritycore.kernels.frequency_split import fallback
from claritycore.kernels.frequency_split.op_fourier import smooth
from claritycore.kernels.frequency_split.operands import radius_of
from tests.kernels.closeness import CPU
from tests.strategies import SIDES, normal

FORMATS = {"first": torch.contiguous_format, "last": torch.channels_last}
SIGMAS = [0.3, 0.7, torch.tensor([0.3, 0.7, 0.5])]
TINY = [(1, 1), (1, 5), (4, 1), (2, 3), (4, 5)]
"""Sizes below the reach of a blur, beside it and above."""

SPLITS = {
    "gaussian": lambda x: fft_split(x, 0.25),
    "butterworth": lambda x: fft_split(x, 0.3, mask="butterworth"),
    "ideal": lambda x: fft_split(x, 0.5, mask="ideal"),
    "learned": lambda x: fft_split(x, torch.linspace(0.1, 1, x.shape[1]).to(x)),
    "blur": lambda x: blur_split(x, 1.5),
    "blur by channel": lambda x: blur_split(x, torch.linspace(0.4, 3, x.shape[1])),
}


def haar_bands(x):
    """Each band of the Haar transform alone as a map: the first is what is low, the rest what is high."""
    bands, size = haar_split(x)
    zero = torch.zeros_like(bands[0])
    return haar_merge((bands[0], zero, zero, zero), size), haar_merge((zero, *bands[1:]), size)


ALL = SPLITS | {"haar": haar_bands}


@pytest.fixture(params=["torch", "triton"])
def form(request, device):
    """A fast form, and where it runs."""
    return request.param, device if request.param == "triton" else CPU


def largest(x):
    return x.abs().max().item()


# Against what others wrote


def mirrored_index(i, size):
    return min(max(abs(i) if i < size else 2 * (size - 1) - i, 0), size - 1)


def by_numpy(x, cutoff, mask, padding):
    """The definition of `fft_split`, with the complex transform of numpy."""
    height, width = x.shape[2:]
    rows, columns = (smooth(side + 2 * padding) for side in (height, width))
    row = [mirrored_index(i, height) for i in range(-padding, rows - padding)]
    column = [mirrored_index(i, width) for i in range(-padding, columns - padding)]
    r = 2 * np.hypot(np.fft.fftfreq(rows)[:, None], np.fft.fftfreq(columns)[None])
    gain = {
        "gaussian": np.exp(-((r / cutoff) ** 2) / 2),
        "butterworth": 1 / (1 + (r / cutoff) ** 4),
        "ideal": r <= cutoff,
    }
    padded = x.numpy()[:, :, row][:, :, :, column]
    low = np.fft.ifft2(gain[mask] * np.fft.fft2(padded)).real
    return torch.from_numpy(low[:, :, padding : padding + height, padding : padding + width])


@given(height=SIDES, width=SIDES, mask=st.sampled_from(["gaussian", "butterworth", "ideal"]), padding=st.integers(0, 9))
def test_the_mask_is_applied_in_the_fourier_domain(height, width, mask, padding):
    x = normal((1, 2, height, width), dtype=torch.float64)
    low, high = fft_split(x, 0.37, mask=mask, padding=padding)
    assert largest(low - by_numpy(x, 0.37, mask, padding)) <= 1e-13
    assert largest(low + high - x) <= 1e-15


def test_each_map_and_channel_may_have_its_cutoff():
    x = normal((2, 3, 9, 14), dtype=torch.float64)
    cutoff = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.7, 1.3]], dtype=torch.float64)
    for given_cutoff, each in (
        (cutoff, cutoff),
        (cutoff[1], cutoff[1].expand(2, 3)),
        (cutoff[0, 1], cutoff[0, 1].expand(2, 3)),
    ):
        low, _ = fft_split(x, given_cutoff)
        for b, c in np.ndindex(2, 3):
            alone, _ = fft_split(x[b : b + 1, c : c + 1], each[b, c].item(), padding=8)
            assert largest(low[b : b + 1, c : c + 1] - alone) <= 1e-14


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.2])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_blur_is_that_of_scipy(sigma, backend):
    x = normal((2, 2, 23, 300), dtype=torch.float64)  # wider than a block of the fallback
    low, high = blur_split(x, sigma, backend=backend)
    options = {"sigma": sigma, "mode": "mirror", "radius": math.ceil(3 * sigma), "axes": (2, 3)}
    assert largest(low - torch.from_numpy(scipy.ndimage.gaussian_filter(x.numpy(), **options))) <= 1e-14
    assert largest(low + high - x) <= 1e-15


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("of", [list, tuple, torch.tensor], ids=["list", "tuple", "tensor"])
def test_each_channel_may_have_its_deviation(of, backend):
    x, sigma = normal((2, 4, 9, 14), dtype=torch.float64), [0.4, 1.7, 0.4, 3.0]
    low, high = blur_split(x, of(sigma), backend=backend)
    for c, value in enumerate(sigma):
        alone = blur_split(x[:, c : c + 1], torch.tensor(value).item() if of is torch.tensor else value)
        assert largest(low[:, c : c + 1] - alone[0]) <= 1e-14
        assert largest(high[:, c : c + 1] - alone[1]) <= 1e-14


def haar_by_loop(x):
    batch, channels, height, width = x.shape
    bands = torch.zeros(4, batch, channels, (height + 1) // 2, (width + 1) // 2, dtype=x.dtype)
    for i, j in np.ndindex(bands.shape[3:]):
        rows, columns = (2 * i, min(2 * i + 1, height - 1)), (2 * j, min(2 * j + 1, width - 1))
        a, b, c, d = (x[:, :, row, column] for row in rows for column in columns)
        bands[:, :, :, i, j] = torch.stack([a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d]) / 2
    return bands


@given(height=SIDES, width=SIDES)
def test_the_haar_transform_is_sums_and_differences_of_four(height, width):
    x = normal((2, 3, height, width), dtype=torch.float64)
    bands, size = haar_split(x, backend="reference")
    assert size == (height, width)
    assert largest(torch.stack(bands) - haar_by_loop(x)) <= 1e-14
    assert largest(haar_merge(bands, size, backend="reference") - x) <= 1e-15


def test_bands_have_the_names_of_pywavelets():
    """cH, the second, is of horizontal edges: high down a column."""
    rows = torch.tensor([1.0, -1.0]).repeat(4)[:, None].expand(1, 1, 8, 8)
    energy = {"rows": [b.square().sum().item() for b in haar_split(rows)[0]]}
    energy["columns"] = [b.square().sum().item() for b in haar_split(rows.mT)[0]]
    assert energy == {"rows": [0, 64, 0, 0], "columns": [0, 0, 64, 0]}


def test_haar_keeps_the_energy_of_even_sides():
    x = normal((2, 3, 8, 14), dtype=torch.float64)
    assert sum(band.square().sum() for band in haar_split(x)[0]).item() == pytest.approx(x.square().sum().item(), 1e-14)


def results(x, sigma, backend):
    """Bands, maps and every gradient, by name."""
    leaf = x.detach().clone().requires_grad_()
    (low, high), (bands, size) = blur_split(leaf, sigma, backend=backend), haar_split(leaf, backend=backend)
    draws = [normal(tuple(y.shape), dtype=torch.float64, seed=i).to(y) for i, y in enumerate((low, high, *bands, leaf))]
    leaves = [draw.clone().requires_grad_() for draw in draws[2:6]]
    merged = haar_merge(leaves, size, backend=backend)
    return {
        **{"low": low, "high": high, "gradient of blur": torch.autograd.grad((low, high), leaf, draws[:2])[0]},
        **dict(zip(("ll", "lh", "hl", "hh"), bands, strict=True)),
        **{"gradient of haar": torch.autograd.grad(bands, leaf, draws[2:6])[0], "merged": merged},
        **{f"gradient of band {i}": g for i, g in enumerate(torch.autograd.grad(merged, leaves, draws[6]))},
    }


def assert_right(size, sigma, channels_are, backend, device, maps=(2, 3)):
    x = normal((*maps, *size), dtype=torch.float64)
    truth = results(x, sigma, "reference")
    got = results(x.to(device, torch.float32).to(memory_format=FORMATS[channels_are]), sigma, backend)
    for name, value in got.items():
        assert largest(value.cpu().double() - truth[name]) <= 2e-6 * max(1, largest(truth[name])), name


@given(height=SIDES, width=SIDES, sigma=st.sampled_from(SIGMAS), channels_are=st.sampled_from(list(FORMATS)))
def test_the_fallback_agrees(height, width, sigma, channels_are):
    assert_right((height, width), sigma, channels_are, "torch", CPU)


@pytest.mark.parametrize("channels_are", FORMATS)
@pytest.mark.parametrize("sigma", SIGMAS[1:], ids=["one", "each"])
@pytest.mark.parametrize("few", [1, 8], ids=["as it lies", "rearranged"])
def test_the_fallback_agrees_whatever_it_cuts(few, sigma, channels_are, monkeypatch):
    for name, value in {"BLOCK": 4, "BLOCK_ACROSS": 5, "PIXELS": 40, "FEW": few}.items():
        monkeypatch.setattr(fallback, name, value)
    for size in ((13, 4), (5, 19), (1, 9), (2, 2)):
        assert_right(size, sigma, channels_are, "torch", CPU)


@pytest.mark.parametrize("channels_are", FORMATS)
@pytest.mark.parametrize("sigma", SIGMAS[1:], ids=["one", "each"])
@pytest.mark.parametrize("size", TINY, ids=str)
def test_triton_agrees(size, sigma, channels_are, device):
    # The interpreter takes a second for a map of 20 pixels.
    assert_right(size, sigma, channels_are, "triton", device, maps=(1 if math.prod(size) == 20 else 2, 3))


@pytest.mark.parametrize("channels_are", FORMATS)
def test_triton_agrees_at_the_seams(channels_are, device, monkeypatch):
    fused = pytest.importorskip("claritycore.kernels.frequency_split.fused")
    for name, value in {"LANES": 4, "PIXELS": 4, "MOST_ROWS": 2, "LEAST_ROWS": 2}.items():
        monkeypatch.setattr(fused, name, value)
    assert_right((5, 5), 0.3, channels_are, "triton", device, maps=(1, 5 if channels_are == "last" else 1))


def test_wrong_numbers_would_be_seen():
    x = normal((1, 1, 9, 9), dtype=torch.float64)
    assert largest(blur_split(x, 1.0)[0] - blur_split(x, 1.001)[0]) > 1e-5
    assert largest(fft_split(x, 0.3)[0] - fft_split(x, 0.301)[0]) > 1e-5


# What a split is


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [(1, 1), (1, 31), (17, 1), (2, 2), (13, 37), (64, 48)], ids=str)
def test_bands_add_up_and_a_constant_is_low(name, size):
    x = normal((2, 3, *size))
    low, high = ALL[name](x)
    assert low.shape == high.shape == x.shape
    assert bool(((low + high - x).abs() <= 2.0**-22 * torch.maximum(x.abs(), low.abs()).clamp(min=1)).all())
    low, high = ALL[name](torch.full_like(x, 3.0))
    assert largest(high) <= 3e-6


@pytest.mark.parametrize("size", [64, 256])
def test_a_wave_lands_in_its_band_whatever_the_size(size):
    """The Gaussian mask lets exp(-(r / c)^2 / 2) of a wave pass, away from the borders."""
    t = torch.arange(size, dtype=torch.float64)
    middle = slice(size // 4, -size // 4)
    for frequency in (0.05, 0.25, 0.8):
        wave = torch.cos(math.pi * frequency * t).expand(1, 1, size, size)
        passed = math.exp(-((frequency / 0.25) ** 2) / 2)
        for x in (wave, wave.mT):
            for low in (fft_split(x, 0.25)[0], blur_split(x, gaussian_sigma(0.25))[0]):
                assert largest((low - passed * x)[..., middle, middle]) <= 8e-3
            assert largest((fft_split(x, 0.25)[0] - passed * x)[..., middle, middle]) <= 1e-5
            low, high = fft_split(x, 0.25, mask="ideal", padding=0 if size * frequency % 4 == 0 else None)
            other = high if frequency < 0.25 else low if frequency > 0.25 else 0 * low
            assert largest(other[..., middle, middle]) <= 0.1


def test_a_step_does_not_ring_and_a_ramp_has_no_border():
    step = (torch.arange(64) >= 32).double().expand(1, 1, 64, 64)
    ramp = torch.linspace(0, 1, 64, dtype=torch.float64).expand(1, 1, 64, 64)
    for split in (SPLITS["gaussian"], SPLITS["blur"]):
        low, _ = split(step)
        assert low.max() <= 1.01
        assert low.min() >= -0.01
        for x in (ramp, ramp.mT):
            assert largest(split(x)[1]) <= 0.05
    assert fft_split(step, 0.5, mask="ideal")[0].max() > 1.05


def test_the_blur_is_the_gaussian_mask():
    x = normal((1, 2, 40, 33), dtype=torch.float64)
    assert largest(blur_split(x, gaussian_sigma(0.2))[0] - fft_split(x, 0.2)[0]) <= 5e-3
    assert gaussian_sigma(gaussian_sigma(0.3)) == pytest.approx(0.3)


def test_one_transform_forward_and_one_back():
    counts = {}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            counts[func.__name__] = counts.get(func.__name__, 0) + 1
            return func(*args, **(kwargs or {}))

    x = normal((1, 2, 31, 33))
    with Count():
        fft_split(x, 0.25)
    assert {name: n for name, n in counts.items() if "fft" in name} == {"_fft_r2c.default": 1, "_fft_c2r.default": 1}


@settings(max_examples=30)
@given(size=st.integers(1, 3000))
def test_padded_sizes_are_the_least_smooth_ones(size):
    products = {2**a * 3**b * 5**c for a in range(13) for b in range(8) for c in range(6)}
    assert smooth(size) == min(n for n in products if n >= size)


def test_padding_follows_the_cutoff():
    x = normal((1, 1, 40, 40), dtype=torch.float64)
    for cutoff, padding in ((1.42, 4), (0.25, 7), (0.1, 16), (0.01, 32)):
        assert torch.equal(fft_split(x, cutoff)[0], fft_split(x, cutoff, padding=padding)[0])
    assert torch.equal(
        fft_split(x, torch.tensor(0.1).double())[0], fft_split(x, torch.tensor(0.1).double(), padding=8)[0]
    )
    assert radius_of([0.3, 1.1]) == 4
