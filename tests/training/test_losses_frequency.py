"""Losses over spectra and pyramids against numpy's full transforms, scipy's filters and explicit loops."""

import numpy as np
import pytest
import torch
from scipy.ndimage import convolve1d

from claritycore.blocks.pyramid import double, halve, laplacian_pyramid
from claritycore.training.frequency_losses import FFTLoss, FocalFrequencyLoss, LaplacianLoss
from claritycore.training.pixel_losses import L2Loss
from claritycore.training.pyramid import high_pass, low_pass, texture

SIZES = [(1, 1), (1, 2), (1, 7), (6, 1), (2, 2), (3, 4), (8, 5), (31, 12), (16, 16)]


def pair(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, *shape, generator=generator, dtype=torch.float64).unbind(0)


def full_spectrum(image):
    return np.fft.fft2(image.numpy(), norm="ortho")


def radius(height, width):
    vertical, horizontal = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)
    return 2 * np.hypot(vertical, horizontal)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cutoff", [None, 0.25, 0.9])
def test_the_fft_loss_equals_its_formula_over_the_full_spectrum(size, cutoff):
    a, b = pair(2, 3, *size)
    weight = 1 if cutoff is None else 1 - np.exp(-((radius(*size) / cutoff) ** 2) / 2)
    fa, fb = full_spectrum(a), full_spectrum(b)
    magnitude, difference = (weight * np.abs(np.abs(fa) - np.abs(fb))).mean(), (weight * np.abs(fa - fb)).mean()
    np.testing.assert_allclose(FFTLoss(cutoff=cutoff)(a, b).item(), magnitude, rtol=1e-12, atol=1e-16)
    np.testing.assert_allclose(FFTLoss("complex", cutoff=cutoff)(a, b).item(), difference, rtol=1e-12, atol=1e-16)


def test_the_magnitude_does_not_see_a_shift_and_the_difference_does():
    image = pair(1, 3, 12, 10)[0]
    shifted = image.roll((3, 4), (2, 3))
    assert FFTLoss()(image, shifted).item() < 1e-14
    assert FFTLoss("complex")(image, shifted).item() > 0.1


def test_a_cutoff_leaves_brightness_out_and_counts_fine_detail_in_full():
    image = pair(1, 1, 16, 16)[0]
    checkerboard = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64).tile(8, 8)
    brighter, sharper = (image + 0.1 * x for x in (torch.ones_like(checkerboard), checkerboard))
    assert FFTLoss("complex", cutoff=0.25)(image, brighter).item() < 1e-14
    torch.testing.assert_close(
        FFTLoss("complex", cutoff=0.25)(image, sharper), FFTLoss("complex")(image, sharper), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("alpha", [0, 0.5, 1, 2])
def test_the_focal_loss_equals_its_formula_with_its_gradient(size, alpha):
    a, b = pair(2, 3, *size)
    a.requires_grad_()
    error = full_spectrum((a - b).detach())
    weight = np.abs(error) ** alpha
    weight = weight / weight.max((2, 3), keepdims=True)
    loss = FocalFrequencyLoss(alpha)(a, b)
    np.testing.assert_allclose(loss.item(), (weight * np.abs(error) ** 2).mean(), rtol=1e-12)
    (gradient,) = torch.autograd.grad(loss, a)
    expected = 2 / a.numel() * np.fft.ifft2(weight * error, norm="ortho").real
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-9, atol=1e-15)


def test_the_focal_loss_without_focus_is_the_squared_error():
    a, b = pair(2, 3, 9, 14)
    torch.testing.assert_close(FocalFrequencyLoss(0)(a, b), L2Loss()(a, b))


def test_the_focal_loss_keeps_small_errors_in_float32():
    a, b = (x.float() for x in pair(1, 3, 9, 14))
    a = b + 1e-5 * (a - b)
    wide = FocalFrequencyLoss(4)(a.double(), b.double())
    torch.testing.assert_close(FocalFrequencyLoss(4)(a, b).double(), wide, rtol=1e-5, atol=0)


# The pyramid


def halved(image):
    for axis in (2, 3):
        image = convolve1d(image, np.array([1, 4, 6, 4, 1]) / 16, axis, mode="nearest")
    return image[:, :, ::2, ::2]


def doubled(image, height, width):
    """Zeros between the pixels, one of these repeated beyond each border, and the binomial kernel, twice per axis."""
    for axis, size in ((2, height), (3, width)):
        padded = np.concatenate([image.take([0], axis), image, image.take([-1], axis)], axis)
        spread = np.zeros([*padded.shape[:axis], 2 * padded.shape[axis], *padded.shape[axis + 1 :]])
        spread[(slice(None),) * axis + (slice(0, None, 2),)] = padded
        image = convolve1d(spread, np.array([1, 4, 6, 4, 1]) / 8, axis, mode="constant").take(range(2, 2 + size), axis)
    return image


def bands_of(image, levels):
    bands = []
    for _ in range(levels):
        coarse = halved(image)
        bands.append(image - doubled(coarse, *image.shape[2:]))
        image = coarse
    return [*bands, image]


@pytest.mark.parametrize("size", SIZES)
def test_halving_and_doubling_equal_filters(size):
    image = pair(2, 3, *size)[0]
    small = halve(image)
    np.testing.assert_allclose(small.numpy(), halved(image.numpy()), atol=1e-15)
    np.testing.assert_allclose(double(small, *size).numpy(), doubled(small.numpy(), *size), atol=1e-15)


@pytest.mark.parametrize("size", SIZES)
def test_a_pyramid_adds_up_to_its_image_and_so_do_low_and_high(size):
    image = pair(2, 3, *size)[0]
    rebuilt = None
    for band in reversed(laplacian_pyramid(image, 3)):
        rebuilt = band if rebuilt is None else band + double(rebuilt, *band.shape[2:])
    torch.testing.assert_close(rebuilt, image)
    torch.testing.assert_close(low_pass(image, 2) + high_pass(image, 2), image)
    torch.testing.assert_close(low_pass(image, 1), double(halve(image), *size))
    torch.testing.assert_close(texture(image, 2), high_pass(image, 2) + 0.5)
    assert texture(image, 0) is image


@pytest.mark.parametrize("size", SIZES)
def test_a_flat_image_has_no_detail(size):
    assert high_pass(torch.full((1, 1, *size), 0.7, dtype=torch.float64), 3).abs().max() < 1e-15


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("levels", "first"), [(1, 0), (3, 0), (5, 2), (2, 2)])
def test_the_laplacian_loss_equals_its_formula(size, levels, first):
    a, b = pair(2, 3, *size)
    pairs = zip(bands_of(a.numpy(), levels)[first:], bands_of(b.numpy(), levels)[first:], strict=True)
    expected = sum(np.abs(x - y).mean() for x, y in pairs)
    np.testing.assert_allclose(LaplacianLoss(levels, first=first)(a, b).item(), expected, rtol=1e-11)


def test_where_sides_halve_evenly_it_is_the_published_sum():
    a, b = pair(1, 1, 16, 32)
    pairs = zip(bands_of(a.numpy(), 3), bands_of(b.numpy(), 3), strict=True)
    published = sum(4**j * np.abs(x - y).sum() for j, (x, y) in enumerate(pairs))
    np.testing.assert_allclose(LaplacianLoss(3)(a, b).item(), published / a.numel(), rtol=1e-12)


def test_structure_alone_leaves_texture_free():
    image = pair(1, 1, 32, 32)[0]
    checkerboard = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64).tile(16, 16)
    textured, brighter = image + 0.1 * checkerboard, image + 0.1
    # What is left is the border, where the pattern is cut off.
    assert LaplacianLoss(first=2)(image, textured).item() < 0.05 * LaplacianLoss()(image, textured).item()
    torch.testing.assert_close(LaplacianLoss(first=2)(image, brighter).item(), 0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FFTLoss("phase"), r"form must be one of magnitude, complex, got 'phase'"),
        (lambda: FFTLoss(cutoff=0), r"cutoff must be positive and finite, got 0"),
        (lambda: FFTLoss(cutoff="low"), r"cutoff must be positive and finite, got 'low'"),
        (lambda: FocalFrequencyLoss(-1), r"alpha must be at least 0 and finite, got -1"),
        (lambda: FocalFrequencyLoss(float("nan")), r"alpha must be at least 0 and finite, got nan"),
        (lambda: LaplacianLoss(0), r"levels must be an integer of at least 1, got 0"),
        (lambda: LaplacianLoss(3, first=4), r"first must be an integer from 0 to levels, 3, got 4"),
        (lambda: LaplacianLoss(3, first=-1), r"first must be an integer from 0 to levels, 3, got -1"),
    ],
)
def test_bad_options_are_told(make, message):
    with pytest.raises(ValueError, match=message):
        make()
