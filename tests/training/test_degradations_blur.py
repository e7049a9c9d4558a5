"""Blur kernels, blurring, sharpening and resizing against loops, moments, spectra and scipy."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage, special

from claritycore.images import imresize
from claritycore.training.blur_kernels import (
    blur,
    gaussian_kernels,
    motion_kernels,
    plateau_kernels,
    sharpen,
    sinc_kernels,
)
from claritycore.training.blur_stage import Blur
from claritycore.training.resizing import RESIZE_MODES, resize
from claritycore.training.stages import Resize
from tests.strategies import normal


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def moments(kernel):
    """Mean (x, y) and covariance of a kernel as a distribution."""
    axis = torch.arange(len(kernel), dtype=torch.float64) - len(kernel) // 2
    x, y = axis.expand_as(kernel), axis[:, None].expand_as(kernel)
    mean = torch.stack([(kernel * x).sum(), (kernel * y).sum()])
    d = torch.stack([x - mean[0], y - mean[1]])
    return mean, torch.einsum("ihw,jhw,hw->ij", d, d, kernel)


ALL = {
    "gaussian": gaussian_kernels(21, t(0.3, 2.0), t(1.0, 4.0), t(0.5, -2.0)),
    "generalised": gaussian_kernels(21, t(0.3, 2.0), t(1.0, 4.0), t(0.5, -2.0), beta=t(0.5, 4.0)),
    "plateau": plateau_kernels(21, t(0.3, 2.0), t(1.0, 4.0), t(0.5, -2.0), beta=t(1.0, 2.0)),
    "sinc": sinc_kernels(21, t(1.1, 3.0)),
    "supported": sinc_kernels(21, t(1.1, 3.0), support=torch.tensor([7, 21])),
    "line": motion_kernels(21, t(5.0, 15.0), t(0.4, 2.0)),
    "path": motion_kernels(21, t(5.0, 15.0), t(0.4, 2.0), normal((2, 8), dtype=torch.float64)),
}


@pytest.mark.parametrize("name", ALL)
def test_kernels_sum_to_one_and_those_of_a_row_stand_alone(name):
    assert ALL[name].dtype == torch.float64
    torch.testing.assert_close(ALL[name].sum((1, 2)), t(1.0, 1.0))
    if name not in ("sinc", "supported"):
        assert (ALL[name] >= 0).all()


@pytest.mark.parametrize(("sigma_x", "sigma_y", "theta"), [(1.0, 1.0, 0.0), (2.0, 4.0, 0.6), (3.0, 1.5, -2.2)])
def test_gaussians_have_the_covariance_that_they_are_named_by(sigma_x, sigma_y, theta):
    mean, covariance = moments(gaussian_kernels(51, t(sigma_x), t(sigma_y), t(theta))[0])
    turn = t(math.cos(theta), -math.sin(theta), math.sin(theta), math.cos(theta)).view(2, 2)
    torch.testing.assert_close(mean, t(0.0, 0.0), rtol=0, atol=1e-12)
    torch.testing.assert_close(covariance, turn @ torch.diag(t(sigma_x, sigma_y) ** 2) @ turn.T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (gaussian_kernels, lambda q, beta: math.exp(-0.5 * q**beta)),
        (plateau_kernels, lambda q, beta: 1 / (q**beta + 1)),
    ],
)
def test_kernels_are_their_formulas(make, shape):
    sigma_x, sigma_y, theta, beta = 1.3, 2.1, 0.7, 1.7
    expected = torch.zeros(9, 9, dtype=torch.float64)
    for row in range(9):
        for column in range(9):
            x, y = column - 4, row - 4
            along, across = x * math.cos(theta) + y * math.sin(theta), y * math.cos(theta) - x * math.sin(theta)
            if max(abs(x), abs(y)) <= 3:
                expected[row, column] = shape((along / sigma_x) ** 2 + (across / sigma_y) ** 2, beta)
    made = make(9, t(sigma_x), t(sigma_y), t(theta), beta=t(beta), support=torch.tensor([7]))[0]
    torch.testing.assert_close(made, expected / expected.sum())


def test_no_width_is_no_blur_and_a_shift_moves_the_centre():
    delta = torch.zeros(1, 5, 5, dtype=torch.float64)
    delta[0, 2, 2] = 1
    for kernels in (gaussian_kernels(5, t(0.0)), plateau_kernels(5, t(0.0)), motion_kernels(5, t(0.0), t(1.0))):
        torch.testing.assert_close(kernels, delta, rtol=0, atol=1e-5)
    mean, covariance = moments(gaussian_kernels(41, t(2.0), shift=t(1.5))[0])
    torch.testing.assert_close(mean, t(1.5, 1.5), rtol=0, atol=1e-6)
    torch.testing.assert_close(covariance, 4 * torch.eye(2, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    narrow = gaussian_kernels(5, t(0.0), shift=t(0.5))[0]
    torch.testing.assert_close(narrow[2:4, 2:4], torch.full((2, 2), 0.25, dtype=torch.float64))


def test_sinc_is_its_formula_and_cuts_off_where_it_says():
    omega, radius = 1.2, np.hypot(*np.mgrid[-4:5, -4:5])
    expected = omega * special.j1(omega * radius) / (2 * np.pi * np.where(radius, radius, 1))
    expected[4, 4] = omega**2 / (4 * np.pi)
    np.testing.assert_allclose(sinc_kernels(9, t(omega))[0], expected / expected.sum(), atol=1e-7)
    spectrum = torch.fft.fft2(sinc_kernels(201, t(omega))[0]).abs()
    frequency = 2 * torch.pi * torch.fft.fftfreq(201, dtype=torch.float64)
    radial = (frequency**2 + frequency[:, None] ** 2).sqrt()
    assert (spectrum[radial < omega - 0.15] - 1).abs().max() < 0.06
    assert spectrum[radial > omega + 0.15].max() < 0.06


@pytest.mark.parametrize(("length", "angle"), [(4.0, 0.0), (9.0, math.pi / 2), (12.0, 0.5), (15.0, -2.3)])
def test_motion_along_a_line_has_its_length_and_direction(length, angle):
    mean, covariance = moments(motion_kernels(31, t(length), t(angle))[0])
    torch.testing.assert_close(mean, t(0.0, 0.0), rtol=0, atol=1e-9)
    along = t(math.cos(angle), math.sin(angle))
    across = t(-math.sin(angle), math.cos(angle))
    # Points between pixels are spread over them, by up to a quarter of a square pixel on each axis.
    assert length**2 / 12 - 1e-3 <= along @ covariance @ along <= length**2 / 12 + 0.26
    assert across @ covariance @ across <= 0.26
    torch.testing.assert_close(along @ covariance @ across, t(0.0)[0], rtol=0, atol=0.05)


def test_motion_that_bends_follows_its_path():
    """A path of two straight halves at a right angle, by numbers."""
    bends = torch.zeros(1, 2, dtype=torch.float64)
    bends[0, 1] = math.pi / 2
    kernel = motion_kernels(21, t(12.0), t(0.0), bends)[0]
    # Six pixels to the right, then six down; the centre of mass is at (4.5, 1.5) from the start.
    place = torch.linspace(0, 6, 100001, dtype=torch.float64)[:-1] + 3e-5
    x = torch.cat([place, torch.full_like(place, 6.0)]) - 4.5
    y = torch.cat([torch.zeros_like(place), place]) - 1.5
    expected = torch.zeros(21, 21, dtype=torch.float64)
    for i in (0, 1):
        for j in (0, 1):
            column, row = x.floor() + j, y.floor() + i
            weight = (1 - (x - column).abs()) * (1 - (y - row).abs())
            expected.index_put_(((row + 10).long(), (column + 10).long()), weight, accumulate=True)
    torch.testing.assert_close(kernel, expected / expected.sum(), rtol=0, atol=1e-4)


def test_sides_must_be_odd():
    for make in (lambda: gaussian_kernels(4, t(1.0)), lambda: sinc_kernels(4, t(1.0))):
        with pytest.raises(ValueError, match="size must be an odd integer of at least 1, got 4"):
            make()
    with pytest.raises(ValueError, match="size must be an odd integer of at least 1, got 0"):
        motion_kernels(0, t(1.0), t(1.0))


# Blurring


def test_blur_is_correlation_with_reflection():
    image, kernels = normal((3, 2, 13, 17), dtype=torch.float64), normal((3, 7, 7), dtype=torch.float64, seed=1)
    blurred = blur(image, kernels)
    for sample in range(3):
        for channel in range(2):
            expected = ndimage.correlate(image[sample, channel].numpy(), kernels[sample].numpy(), mode="mirror")
            np.testing.assert_allclose(blurred[sample, channel], expected, atol=1e-12)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1), (3, 2)])
def test_images_smaller_than_the_kernel_repeat_their_edge(size):
    image, kernels = normal((2, 1, *size), dtype=torch.float64), normal((2, 9, 9), dtype=torch.float64, seed=1)

    def inside(place, side):
        if place < 0:
            return min(-place, side - 1)
        return place if place < side else max(2 * (side - 1) - place, 0)

    blurred = blur(image, kernels)
    for row in range(size[0]):
        for column in range(size[1]):
            expected = sum(
                kernels[:, i + 4, j + 4] * image[:, 0, inside(row + i, size[0]), inside(column + j, size[1])]
                for i in range(-4, 5)
                for j in range(-4, 5)
            )
            torch.testing.assert_close(blurred[:, 0, row, column], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_blur_of_half_precision_sums_in_float32(dtype):
    image, kernels = normal((2, 3, 16, 16), dtype=dtype), ALL["gaussian"]
    blurred = blur(image, kernels)
    assert blurred.dtype == dtype
    assert torch.equal(blurred, blur(image.float(), kernels).to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(blur(image.float(), kernels), blur(image.float(), kernels))
        assert blur(image.float(), kernels).dtype == torch.float32


def test_gradients_of_blur_sharpen_and_resize():
    image = normal((2, 2, 6, 5), dtype=torch.float64).sigmoid().requires_grad_()
    kernels = normal((2, 3, 3), dtype=torch.float64, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(blur, (image, kernels))
    assert torch.autograd.gradcheck(
        lambda x: sharpen(x, radius=5, threshold=0.02), (image.detach()[:1].requires_grad_(),)
    )
    for mode in RESIZE_MODES[:-1]:
        assert torch.autograd.gradcheck(lambda x, mode=mode: resize(x, (4, 7), mode), (image,))
    assert torch.autograd.gradcheck(lambda x: resize(x, (12, 10), "matlab"), (image,))


def test_sharpening_is_an_unsharp_mask_where_there_is_a_difference():
    image = normal((1, 2, 60, 70), dtype=torch.float64).mul(0.08).add(0.5).clamp(0, 1)
    planes = image[0].numpy()
    offsets = np.arange(51) - 25
    line = np.exp(-0.5 * (offsets / 8.0) ** 2)
    window = np.outer(line, line) / line.sum() ** 2

    def smoothed(plane):
        return ndimage.correlate(plane, window, mode="mirror")

    for plane, made in zip(planes, sharpen(image)[0], strict=True):
        residual = plane - smoothed(plane)
        mask = smoothed((np.abs(residual) > 10 / 255).astype(float))
        expected = mask * np.clip(plane + 0.5 * residual, 0, 1) + (1 - mask) * plane
        np.testing.assert_allclose(made, expected, atol=1e-12)
    assert torch.equal(sharpen(image.float()), sharpen(image.float()))
    half = image.half()
    torch.testing.assert_close(sharpen(half), sharpen(half.double()).half(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("image", "kernels", "error", "told"),
    [
        (torch.zeros(2, 3, 4, 4), torch.ones(3, 3, 3), ValueError, r"kernels must be \(2, k, k\)"),
        (torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 5), ValueError, r"kernels must be \(2, k, k\)"),
        (torch.zeros(2, 3, 4, 4), torch.ones(2, 4, 4), ValueError, "side of kernels must be an odd integer"),
        (torch.zeros(3, 4, 4), torch.ones(3, 3, 3), ValueError, r"image must be \(B, C, H, W\)"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.int32), torch.ones(1, 3, 3), TypeError, "must be floating point"),
    ],
)
def test_bad_kernels(image, kernels, error, told):
    with pytest.raises(error, match=told):
        blur(image, kernels)


# Resizing


def test_area_averages_and_matlab_is_imresize():
    image = normal((2, 3, 12, 20))
    expected = image.unflatten(3, (5, 4)).unflatten(2, (3, 4)).mean((3, 5))
    torch.testing.assert_close(resize(image, (3, 5), "area"), expected)
    assert torch.equal(resize(image, (3, 5), "matlab"), imresize(image, 0.25, intermediate="float"))
    assert torch.equal(resize(image, (24, 40), "nearest"), image.repeat_interleave(2, 2).repeat_interleave(2, 3))


def keys(distance, a=-0.75):
    d = abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


@pytest.mark.parametrize(("mode", "weight"), [("bilinear", lambda d: max(0.0, 1 - abs(d))), ("bicubic", keys)])
@pytest.mark.parametrize("width", [5, 11, 40])
def test_bilinear_and_bicubic_take_the_nearest_pixels_whatever_the_factor(mode, weight, width):
    image = normal((1, 1, 15, 15), dtype=torch.float64)
    resized = resize(image, (15, width), mode)
    for column in range(width):
        centre = (column + 0.5) * 15 / width - 0.5
        taps = range(math.floor(centre) - 1, math.floor(centre) + 3)
        expected = sum(weight(centre - tap) * image[..., min(max(tap, 0), 14)] for tap in taps)
        torch.testing.assert_close(resized[..., column], expected)


@pytest.mark.parametrize(("side", "wanted"), [(25, 14), (25, 7), (29, 15), (38, 21), (7, 29)])
def test_matlab_gives_the_size_that_is_asked_for(side, wanted):
    # The product of the side and the rounded factor lies above the whole number.
    assert side * (wanted / side) > wanted
    image = normal((1, 2, side, 2 * side))
    assert resize(image, (wanted, 2 * wanted), "matlab").shape == (1, 2, wanted, 2 * wanted)


@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_any_size_becomes_any_size(mode):
    torch.testing.assert_close(resize(torch.ones(2, 3, 1, 1), (3, 3), mode), torch.ones(2, 3, 3, 3))
    assert resize(normal((2, 1, 5, 5)), (1, 1), mode).isfinite().all()


@pytest.mark.parametrize(
    ("size", "mode", "told"),
    [
        ((4, 4), "lanczos", "mode must be one of area, bilinear, bicubic, nearest, matlab, got 'lanczos'"),
        ((0, 4), "area", "height must be an integer of at least 1, got 0"),
        ((4, 5), "matlab", "size of mode 'matlab' must keep the ratio of 8 x 8"),
    ],
)
def test_bad_sizes(size, mode, told):
    with pytest.raises(ValueError, match=told):
        resize(torch.zeros(1, 3, 8, 8), size, mode)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Blur(families=()), "families must be at least one with a share above 0"),
        (lambda: Blur(families=(("iso", 0.0),)), "families must be at least one with a share above 0"),
        (lambda: Blur(families=(("iso", 2.0), ("sinc", -1.0))), "share must be a range of at least 0"),
        (lambda: Blur(sizes=()), "sizes must be at least one"),
        (lambda: Resize(modes=()), "modes must be at least one"),
    ],
)
def test_a_stage_with_nothing_to_draw_from(make, told):
    with pytest.raises(ValueError, match=told):
        make()
