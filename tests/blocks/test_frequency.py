"""Splits by frequency: they add up, the right frequencies land in each half, and export forms keep their bounds."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from claritycore.blocks import FreqBands, FreqSplit2d
from claritycore.blocks.pyramid import double, halve
from claritycore.kernels.frequency_split import fft_split, gaussian_sigma
from tests.strategies import feature_maps, normal

KINDS = ["fft", "blur", "haar", "avgpool", "dct", "laplacian"]
MASKED = ["fft", "blur", "dct"]
PYRAMIDS = ["haar", "avgpool", "laplacian"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

every_kind = pytest.mark.parametrize("kind", KINDS)


def response(kind: str, frequency: float, size: int = 128, **options) -> float:
    """What part of a wave along the rows is left among the low frequencies, in the middle of the map."""
    wave = torch.cos(math.pi * frequency * torch.arange(size, dtype=torch.float64))
    low = FreqSplit2d(1, kind=kind, learnable=False, **options).double()(wave.expand(1, 1, 4, size)).low[0, 0, 1]
    middle = slice(size // 4, 3 * size // 4)
    return ((low * wave)[middle].sum() / wave.square()[middle].sum()).item()


@every_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
def test_low_and_high_add_up(kind, dtype, data):
    x = data.draw(feature_maps(3, dtype=dtype))
    bands = FreqSplit2d(3, kind=kind).to(dtype)(x)
    assert isinstance(bands, FreqBands)
    assert bands.low.shape == bands.high.shape == x.shape
    assert bands.low.dtype == bands.high.dtype == dtype
    largest = torch.stack([x.double().abs(), bands.low.double().abs(), bands.high.double().abs()]).amax(0)
    assert ((bands.merge().double() - x.double()).abs() <= 2 * torch.finfo(dtype).eps * largest).all()


@every_kind
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (1, 97), (53, 1), (2, 3), (127, 129)])
def test_odd_and_prime_sizes_add_up(kind, size):
    x = normal((1, 2, *size), dtype=torch.float64)
    torch.testing.assert_close(FreqSplit2d(2, kind=kind).double()(x).merge(), x, rtol=0, atol=1e-14)


@every_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (1, 13), (7, 5), (32, 20)])
def test_a_constant_has_no_high_frequencies(kind, dtype, size):
    high = FreqSplit2d(2, kind=kind).to(dtype)(torch.full((1, 2, *size), 0.7, dtype=dtype)).high
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    # In half precision x - L is taken before L is rounded, so the error is that of the arithmetic.
    assert high.abs().max() <= (torch.finfo(dtype).eps if kind == "haar" else 8 * torch.finfo(arithmetic).eps)


@pytest.mark.parametrize("kind", MASKED)
@pytest.mark.parametrize("cutoff", [0.125, 0.25, 0.3])
@pytest.mark.parametrize("frequency", [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1])
def test_a_wave_passes_as_the_gaussian_says(kind, cutoff, frequency):
    wanted = math.exp(-((frequency / cutoff) ** 2) / 2)
    assert response(kind, frequency, cutoff=cutoff) == pytest.approx(wanted, abs=5e-3 if kind == "blur" else 2e-3)


@every_kind
def test_slow_waves_are_low_and_fast_ones_high(kind):
    assert response(kind, 1 / 32) > 0.98
    assert abs(response(kind, 1)) < 0.01


@every_kind
@pytest.mark.parametrize("frequency", [1 / 8, 1 / 4, 1 / 2])
def test_the_response_does_not_depend_on_the_size(kind, frequency):
    assert response(kind, frequency, 64) == pytest.approx(response(kind, frequency, 256), abs=1e-3)


@pytest.mark.parametrize("kind", MASKED)
def test_no_ringing_at_a_step_and_no_border_in_a_ramp(kind):
    split = FreqSplit2d(1, kind=kind).double()
    step = (torch.arange(64, dtype=torch.float64) >= 32).double().expand(1, 1, 64, 64)
    low = split(step).low
    assert low.min() >= -0.01
    assert low.max() <= 1.01
    ramp = torch.linspace(0, 1, 64, dtype=torch.float64).expand(1, 1, 64, 64)
    for image in (ramp, ramp.mT):
        assert split(image).high.abs().max() <= 0.05


def test_the_steep_masks_ring_as_the_docstring_says():
    step = (torch.arange(64, dtype=torch.float64) >= 32).double().expand(1, 1, 64, 64)
    for mask, least, most in (("butterworth", 0.02, 0.04), ("ideal", 0.07, 0.09)):
        assert least < FreqSplit2d(1, mask=mask).double()(step).low.max() - 1 < most


class Count(TorchDispatchMode):
    """Counts the Fourier transforms."""

    def __init__(self):
        super().__init__()
        self.transforms = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "fft" in func.name() and "freq" not in func.name():
            self.transforms.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(16, 16), (17, 31)])
def test_one_transform_and_one_inverse(kind, size):
    with Count() as count:
        FreqSplit2d(2, kind=kind)(normal((1, 2, *size)))
    assert [name.split("_")[-1] for name in count.transforms] == (["r2c", "c2r"] if kind == "fft" else [])


@every_kind
def test_vmap_keeps_calls_apart(kind):
    x, split = normal((3, 2, 2, 7, 6), dtype=torch.float64), FreqSplit2d(2, kind=kind).double()
    for calls in (x, x.transpose(2, 4).contiguous().transpose(2, 4)):
        for got, wanted in zip(
            torch.vmap(split)(calls)[:2], zip(*(split(each)[:2] for each in x), strict=True), strict=True
        ):
            torch.testing.assert_close(got, torch.stack(wanted), rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["fft", "dct"])
def test_however_low_a_fixed_cutoff_the_mean_passes(kind):
    x = normal((1, 2, 8, 9))
    low = FreqSplit2d(2, kind=kind, cutoff=1e-30, learnable=False)(x.abs()).low
    assert low.isfinite().all()
    constant = torch.full_like(x, 0.7)
    torch.testing.assert_close(FreqSplit2d(2, kind=kind, cutoff=1e-30, learnable=False)(constant).low, constant)


# What each kind computes


@given(x=feature_maps(3, dtype=torch.float64))
def test_fft_is_the_kernel_with_the_cutoff_of_each_channel(x):
    cutoffs = [0.15, 0.3, 0.9]
    for learnable, padding in ((True, 16), (False, 11)):  # five deviations of the lowest that there may be
        split = FreqSplit2d(3, cutoff=cutoffs, learnable=learnable).double()
        expected = fft_split(x, torch.tensor(cutoffs, dtype=torch.float64), padding=padding)
        for actual, wanted in zip(split(x)[:2], expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-6 if learnable else 1e-14)


@given(x=feature_maps(2, dtype=torch.float64))
def test_dct_is_the_transform_written_out(x):
    split = FreqSplit2d(2, kind="dct", cutoff=[0.2, 0.6], learnable=False).double()
    matrices = []
    for size in x.shape[2:]:
        k, n = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
        scale = torch.where(k == 0, 0.5, 1.0).double().mul(2 / size).sqrt()
        matrices.append(scale * torch.cos(math.pi * k * (2 * n + 1) / (2 * size)))
    spectrum = torch.einsum("kh,bchw,lw->bckl", matrices[0], x, matrices[1])
    for c, cutoff in enumerate((0.2, 0.6)):
        for k in range(x.shape[2]):
            for m in range(x.shape[3]):
                r = math.hypot(k / x.shape[2], m / x.shape[3])
                spectrum[:, c, k, m] *= math.exp(-((r / cutoff) ** 2) / 2)
    low = torch.einsum("kh,bckl,lw->bchw", matrices[0], spectrum, matrices[1])
    torch.testing.assert_close(split(x).low, low, rtol=0, atol=1e-12)


@given(x=feature_maps(2, dtype=torch.float64))
def test_haar_and_avgpool_average_cells(x):
    (height, width), cells = x.shape[2:], {}
    means = torch.empty_like(x)
    for i in range(height):
        for j in range(width):
            rows, columns = slice(i // 2 * 2, i // 2 * 2 + 2), slice(j // 2 * 2, j // 2 * 2 + 2)
            means[..., i, j] = cells[i // 2, j // 2] = x[..., rows, columns].mean((2, 3))
    torch.testing.assert_close(FreqSplit2d(2, kind="haar").double()(x).low, means, rtol=0, atol=1e-14)
    between = torch.empty_like(x)
    last = (height - 1) // 2, (width - 1) // 2
    for i in range(height):
        for j in range(width):
            far = [min(max(p // 2 + (1 if p % 2 else -1), 0), n) for p, n in zip((i, j), last, strict=True)]
            near = (i // 2, j // 2)
            between[..., i, j] = sum(
                weight * cells[row, column]
                for row, column, weight in [
                    (near[0], near[1], 9 / 16),
                    (near[0], far[1], 3 / 16),
                    (far[0], near[1], 3 / 16),
                    (far[0], far[1], 1 / 16),
                ]
            )
    torch.testing.assert_close(FreqSplit2d(2, kind="avgpool").double()(x).low, between, rtol=0, atol=1e-14)


@pytest.mark.parametrize("levels", [1, 2, 3])
@given(x=feature_maps(2, dtype=torch.float64))
def test_laplacian_is_the_pyramid(levels, x):
    bands = FreqSplit2d(2, kind="laplacian", levels=levels).double()(x)
    sizes, image = [], x
    for detail in bands.pyramid[:-1]:
        sizes.append(image.shape[2:])
        coarse = halve(image)
        torch.testing.assert_close(detail, image - double(coarse, *image.shape[2:]), rtol=0, atol=1e-14)
        image = coarse
    torch.testing.assert_close(bands.pyramid[-1], image, rtol=0, atol=0)
    for size in reversed(sizes):
        image = double(image, *size)
    torch.testing.assert_close(bands.low, image, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", PYRAMIDS)
@given(x=feature_maps(2, dtype=torch.float64))
def test_a_pyramid_gives_the_map_back(kind, x):
    split = FreqSplit2d(2, kind=kind, levels=3)
    torch.testing.assert_close(split.merge_pyramid(split(x).pyramid, x.shape[2:]), x, rtol=0, atol=1e-14)


def test_haar_keeps_the_energy():
    x = normal((2, 3, 16, 10), dtype=torch.float64)
    bands = FreqSplit2d(3, kind="haar")(x).pyramid
    assert sum(band.square().sum() for band in bands) == pytest.approx(x.square().sum().item(), rel=1e-13)


@pytest.mark.parametrize("kind", PYRAMIDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_pyramid_keeps_dtype_and_format(kind, dtype, memory_format):
    x = normal((2, 4, 9, 11), dtype=dtype).contiguous(memory_format=memory_format)
    bands = FreqSplit2d(4, kind=kind)(x)
    assert {band.dtype for band in bands.pyramid} == {dtype}
    assert all(band.is_contiguous(memory_format=memory_format) for band in (*bands[:2], *bands.pyramid))


@every_kind
def test_autocast_changes_nothing(kind):
    x, split = normal((1, 4, 9, 13)), FreqSplit2d(4, kind=kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = split(x)
    for actual, wanted in zip(cast[:2], split(x)[:2], strict=True):
        assert torch.equal(actual, wanted)


# Tiles


@pytest.mark.parametrize(
    ("kind", "levels"), [("blur", 1), ("haar", 1), ("avgpool", 1), *(("laplacian", n) for n in (1, 2, 3))]
)
def test_a_crop_with_its_surroundings_gives_the_pixels_of_the_whole(kind, levels):
    split = FreqSplit2d(1, kind=kind, levels=levels)
    assert split.tile_safe
    multiple = split.tile_multiple
    overlap = -(-split.receptive_radius // multiple) * multiple
    x = normal((1, 1, 4 * overlap + 21, 4 * overlap + 8), dtype=torch.float64)
    for start in (overlap, 2 * overlap):
        crop = x[..., start - overlap : start + overlap + 8, start - overlap : start + overlap + 8]
        expected = split(x).low[..., start : start + 8, start : start + 8]
        actual = split(crop).low[..., overlap : overlap + 8, overlap : overlap + 8]
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_the_radius_of_a_laplacian_is_that_of_the_pixel_that_sees_furthest(levels):
    split, cell = FreqSplit2d(1, kind="laplacian", levels=levels), 2**levels
    x = torch.zeros(1, 1, 1, 16 * cell, dtype=torch.float64, requires_grad=True)
    low, reach = split(x).low, 0
    for pixel in range(7 * cell, 8 * cell):
        touched = torch.autograd.grad(low[0, 0, 0, pixel], x, retain_graph=True)[0][0, 0, 0].nonzero()
        reach = max(reach, pixel - touched.min().item(), touched.max().item() - pixel)
    assert reach == split.receptive_radius


# Cutoffs that are learned


@pytest.mark.parametrize("kind", ["fft", "dct"])
def test_cutoffs_start_where_they_should_and_learn(kind):
    x = normal((4, 2, 24, 23))
    wanted = FreqSplit2d(2, kind=kind, cutoff=[0.15, 0.6], learnable=False)(x).low
    split = FreqSplit2d(2, kind=kind)
    torch.testing.assert_close(split.cutoffs(), torch.tensor([0.25, 0.25]))
    optimizer = torch.optim.Adam(split.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        (split(x).low - wanted).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(split.cutoffs(), torch.tensor([0.15, 0.6]), rtol=0, atol=0.01)


@pytest.mark.parametrize("kind", ["fft", "dct"])
@pytest.mark.parametrize("size", [(4, 5), (1, 7), (3, 1)])
def test_gradients_of_map_cutoffs_and_condition(kind, size):
    split = FreqSplit2d(2, kind=kind, condition_channels=3).double()

    def call(x, logit, weight, condition):
        state = {"cutoff_logit": logit, "condition.weight": weight}
        return torch.func.functional_call(split, state, (x, condition))[:2]

    arguments = (normal((2, 2, *size)), split.cutoff_logit, normal((2, 3), seed=1), normal((2, 3), seed=2))
    assert torch.autograd.gradcheck(call, [a.detach().double().requires_grad_() for a in arguments])


@pytest.mark.parametrize("kind", ["fft", "dct"])
def test_a_condition_moves_the_cutoffs_of_its_own_map(kind):
    x, condition = normal((3, 2, 9, 8), dtype=torch.float64), normal((3, 4), dtype=torch.float64, seed=1)
    split = FreqSplit2d(2, kind=kind, condition_channels=4).double()
    torch.testing.assert_close(split(x, condition).low, FreqSplit2d(2, kind=kind).double()(x).low)
    with torch.no_grad():
        split.condition.weight.copy_(normal((2, 4), seed=2))
    for i, cutoffs in enumerate(split.cutoffs(condition)):
        assert (cutoffs > 0.1).all()
        assert (cutoffs < 1.42).all()
        assert cutoffs[0] != cutoffs[1]
        other = FreqSplit2d(2, kind=kind, cutoff=cutoffs.tolist()).double()
        torch.testing.assert_close(split(x, condition).low[i : i + 1], other(x[i : i + 1]).low, rtol=0, atol=1e-6)


# Export forms


def rows(split: FreqSplit2d, size: int) -> torch.Tensor:
    """The low frequencies of a row as a matrix: rows of outputs, columns of inputs."""
    return split(torch.eye(size, dtype=torch.float64)[:, None, None]).low[:, 0, 0].mT


@pytest.mark.parametrize("cutoff", [0.105, 0.15, 0.2, 0.25, 0.3, 0.5, 0.8, 1.0, 1.41])
@pytest.mark.parametrize("size", [1, 2, 3, 8, 41])
def test_the_bounds_of_the_dct_form_hold_for_every_input(cutoff, size):
    split = FreqSplit2d(1, cutoff=cutoff).double()
    whole = rows(split, size)
    off = rows(split.export_form("dct"), size) - whole
    # Of a difference that constants do not see, what neighbours that differ by 1 can make is a sum of its tails. Both
    # axes at once make at most the sum of both, times what a row of either may amplify.
    tails = off.flip(1).cumsum(1).flip(1)[:, 1:].abs().sum(1)
    assert size == 1 or 2 * tails.max() * whole.abs().sum(1).max() < 1
    reach = math.ceil(3 * gaussian_sigma(cutoff))
    if cutoff <= 0.3 and size > 2 * reach:
        assert 2 * off[reach : size - reach].abs().sum(1).max() * whole.abs().sum(1).max() < 5e-3


@pytest.mark.parametrize(
    ("cutoff", "bound"),
    [
        (0.105, 0.01),
        (0.15, 0.01),
        (0.2, 0.01),
        (0.25, 0.01),
        (0.3, 0.01),
        (0.35, 0.04),
        (0.5, 0.25),
        (0.8, 0.75),
        (1.41, 0.75),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 7, 33])
def test_the_bound_of_the_blur_form_holds_for_every_input(cutoff, bound, size):
    split = FreqSplit2d(1, cutoff=cutoff).double()
    impulses = torch.eye(size * size, dtype=torch.float64).view(-1, 1, size, size)
    off = split.export_form("blur")(impulses).low - split(impulses).low
    assert off.abs().sum(0).max() < bound


@pytest.mark.parametrize("kind", ["dct", "blur"])
def test_an_export_form_takes_over_what_was_learned(kind):
    split = FreqSplit2d(3, cutoff=0.2).double()
    with torch.no_grad():
        split.cutoff_logit.add_(torch.tensor([-0.5, 0.0, 0.4]))
    made = split.export_form(kind)
    x = torch.nn.functional.interpolate(normal((1, 3, 6, 8), dtype=torch.float64), (24, 32), mode="bicubic")
    middle = (..., slice(9, -9), slice(9, -9))
    torch.testing.assert_close(made(x).low[middle], split(x).low[middle], rtol=0, atol=0.01 * x.abs().max().item())
    assert not any(type(part).__name__ == "fft" for part in made.modules())
    for other in (0.15, 0.3):  # another cutoff would show
        wrong = FreqSplit2d(3, cutoff=other).double()(x).low[middle]
        assert (wrong - split(x).low[middle]).abs().max() > 0.01 * x.abs().max()
    assert list(made.state_dict()) == (["cutoff_logit"] if kind == "dct" else [])
    assert not split.eval().export_form(kind).training


def test_the_dct_form_is_in_the_dtype_and_on_the_device_of_the_split_and_frozen_where_that_is():
    split = FreqSplit2d(2, condition_channels=3).double().requires_grad_(False)
    for parameter in split.export_form("dct").parameters():
        assert parameter.dtype == torch.float64
        assert not parameter.requires_grad
    assert {p.device.type for p in split.to("meta").export_form("dct").parameters()} == {"meta"}
    assert (split.kind, split.export_form("dct").kind) == ("fft", "dct")


def test_the_dct_form_follows_the_condition():
    split = FreqSplit2d(2, condition_channels=3)
    with torch.no_grad():
        split.condition.weight.copy_(normal((2, 3)))
    condition = normal((2, 3), seed=1)
    assert torch.equal(split.export_form("dct").cutoffs(condition), split.cutoffs(condition))
    with pytest.raises(ValueError, match="condition_channels must be 0 for kind 'blur', whose cutoffs are fixed"):
        split.export_form("blur")


def test_a_fixed_split_has_export_forms_too():
    assert FreqSplit2d(2, cutoff=0.3, learnable=False).export_form("dct").cutoff_logit is None
    assert FreqSplit2d(2, cutoff=(0.3, 0.4), learnable=False).export_form("blur").cutoff == (0.3, 0.4)


def test_bad_arguments_raise():
    with pytest.raises(ValueError, match="kind must be one of fft, blur, haar, avgpool, dct, laplacian, got 'wavelet'"):
        FreqSplit2d(4, kind="wavelet")
    with pytest.raises(ValueError, match="mask must be one of gaussian, butterworth, ideal, got 'box'"):
        FreqSplit2d(4, mask="box")
    with pytest.raises(ValueError, match="mask must be one of gaussian, got 'ideal'"):
        FreqSplit2d(4, kind="dct", mask="ideal")
    for name in ("channels", "levels"):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got 0"):
            FreqSplit2d(**{"channels": 4, "levels": 1, name: 0})
    for cutoff in (0.0, -0.1, 1.43, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"cutoff must be above 0 and at most 1.42, got {cutoff}"):
            FreqSplit2d(4, kind="blur", cutoff=cutoff)
    for cutoff in (0.1, 1.42, math.nan):
        with pytest.raises(ValueError, match=f"cutoff must be above 0.1 and below 1.42 to be learned, got {cutoff}"):
            FreqSplit2d(4, cutoff=cutoff)
    FreqSplit2d(4, cutoff=1.42, learnable=False)(normal((1, 4, 3, 3)))
    with pytest.raises(ValueError, match="cutoff must be one number or 4, one for each channel, got 3"):
        FreqSplit2d(4, cutoff=[0.2, 0.3, 0.4])
    for cutoff in ("0.25", None, torch.tensor([0.2, 0.3, 0.4, 0.5])):
        with pytest.raises(TypeError, match="cutoff must be a number or a sequence of numbers, got"):
            FreqSplit2d(4, cutoff=cutoff)
    for kind in ("blur", *PYRAMIDS):
        with pytest.raises(ValueError, match=f"learnable must be False for kind '{kind}' with mask 'gaussian'"):
            FreqSplit2d(4, kind=kind, learnable=True)
    with pytest.raises(ValueError, match="learnable must be False for kind 'fft' with mask 'ideal'"):
        FreqSplit2d(4, mask="ideal", learnable=True)
    with pytest.raises(ValueError, match="condition_channels must be 0 where no cutoff is learned, got 3"):
        FreqSplit2d(4, kind="haar", condition_channels=3)
    with pytest.raises(ValueError, match="condition_channels must be an integer of at least 0, got -1"):
        FreqSplit2d(4, condition_channels=-1)


def test_bad_conditions_and_forms_raise():
    x = normal((2, 4, 5, 5))
    with pytest.raises(ValueError, match="condition must be None, got a tensor"):
        FreqSplit2d(4)(x, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="condition must be a vector of 3 for each map, got None"):
        FreqSplit2d(4, condition_channels=3)(x)
    for shape in [(2, 4), (2, 3, 1), ()]:
        with pytest.raises(
            ValueError, match=rf"condition must be \(B, 3\), got shape \({', '.join(map(str, shape))}\)"
        ):
            FreqSplit2d(4, condition_channels=3)(x, torch.zeros(shape))
    with pytest.raises(ValueError, match="condition must have a row for each of 2 maps, got 3"):
        FreqSplit2d(4, condition_channels=3)(x, torch.zeros(3, 3))
    with pytest.raises(ValueError, match="kind must be one of dct, blur, got 'haar'"):
        FreqSplit2d(4).export_form("haar")
    for split in (FreqSplit2d(4, kind="haar"), FreqSplit2d(4, mask="butterworth")):
        with pytest.raises(ValueError, match="only kind 'fft' with mask 'gaussian' has an export form"):
            split.export_form("dct")
    with pytest.raises(ValueError, match="kind must be haar, avgpool or laplacian to have a pyramid, got 'fft'"):
        FreqSplit2d(4).merge_pyramid([x], (5, 5))


def test_bands_that_are_no_pyramid_raise():
    x = normal((1, 4, 5, 6))
    with pytest.raises(ValueError, match=r"bands must be the four \(LL, LH, HL, HH\), got 1"):
        FreqSplit2d(4, kind="haar").merge_pyramid([x], (5, 6))
    for split, count in ((FreqSplit2d(4, kind="avgpool"), 2), (FreqSplit2d(4, kind="laplacian", levels=2), 3)):
        bands = split(x).pyramid
        with pytest.raises(ValueError, match=f"bands must be {count}, got 1"):
            split.merge_pyramid(bands[:1], (5, 6))
        with pytest.raises(ValueError, match=r"band 0 must be 6 x 6, got shape \(1, 4, 5, 6\)"):
            split.merge_pyramid(bands, (6, 6))
        with pytest.raises(ValueError, match=r"band 1 must be 3 x 3, got shape \(1, 4, 5, 6\)"):
            split.merge_pyramid([bands[0], bands[0], *bands[2:]], (5, 6))
