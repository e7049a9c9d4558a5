"""What formulas and networks say of degradations: against loops, scikit-image, and images degraded on purpose."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from torch.nn import functional as F

from claritycore.blocks import (
    DegradationEstimate,
    DegradationEstimator,
    KernelPrior,
    blockiness,
    edge_width,
    haar_sigma,
    immerkaer_sigma,
)
from claritycore.images import read_image
from claritycore.training import degrade
from claritycore.training.blur_kernels import blur, gaussian_kernels
from tests.strategies import feature_maps, normal

DATA = os.environ.get("CLARITYCORE_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="CLARITYCORE_DATA names no folder of images")
FORMULAS = [immerkaer_sigma, haar_sigma, edge_width, blockiness]


def mirrored(x):
    """Three pixels at least, as the formulas see maps of one or two."""
    for axis in (2, 3):
        if x.shape[axis] < 3:
            x = np.take(x, np.arange(3) % x.shape[axis], axis=axis)
    return x


@given(x=feature_maps(2, dtype=torch.float64))
def test_the_noise_formulas_are_those_of_loops(x):
    image, mask = mirrored(x.numpy()), np.outer([1, -2, 1], [1, -2, 1])
    rows, columns = image.shape[2:]
    for b in range(len(image)):
        sums, details = [], []
        for plane in image[b]:
            for i in range(rows - 2):
                sums += [abs((plane[i : i + 3, j : j + 3] * mask).sum()) for j in range(columns - 2)]
            for i in range(0, rows - 1, 2):
                cells = [plane[i : i + 2, j : j + 2] for j in range(0, columns - 1, 2)]
                details += [abs(c[0, 0] - c[0, 1] - c[1, 0] + c[1, 1]) / 2 for c in cells]
        wanted = math.sqrt(math.pi / 2) * sum(sums) / (6 * (rows - 2) * (columns - 2) * image.shape[1])
        assert immerkaer_sigma(x)[b].item() == pytest.approx(wanted, abs=1e-12)
        middle = sorted(details)[(len(details) - 1) // 2]
        assert haar_sigma(x)[b].item() == pytest.approx(middle / 0.6744897501960817, abs=1e-12)


@pytest.mark.parametrize("sigma", [0.01, 0.05, 0.1])
def test_noise_on_a_smooth_image_is_found(sigma):
    """With waves of 64 pixels beneath."""
    place = torch.arange(256) * (2 * math.pi / 64)
    smooth = 0.5 + 0.2 * place.sin()[:, None] * place.cos()
    image = (smooth + sigma * normal((1, 1, 256, 256))).float()
    for estimate in (immerkaer_sigma, haar_sigma):
        assert estimate(image).item() == pytest.approx(sigma, rel=0.03)


@pytest.fixture(scope="module")
def photographs():
    return [read_image(path).pixels for path in sorted(Path(DATA or "", "val").glob("*.jpg"))]


@needs_data
@pytest.mark.parametrize("estimate", [immerkaer_sigma, haar_sigma])
@pytest.mark.parametrize("sigma", [0.05, 0.1])
def test_noise_on_photographs_is_found_within_15_percent(photographs, estimate, sigma):
    found = [estimate(image + sigma * normal(image.shape, seed=i)).item() for i, image in enumerate(photographs)]
    assert np.median(found) == pytest.approx(sigma, rel=0.15)


@needs_data
def test_texture_is_mistaken_for_noise(photographs):
    """Of little noise the formulas read too much: what a network has to learn."""
    for estimate in (immerkaer_sigma, haar_sigma):
        found = [estimate(image + 0.01 * normal(image.shape, seed=i)).item() for i, image in enumerate(photographs)]
        assert np.median(found) > 0.015


@pytest.mark.parametrize("sigma", [1.5, 2.0, 3.0])
@pytest.mark.parametrize("contrast", [0.1, 1.0])
def test_the_width_of_blurred_edges_is_found(sigma, contrast):
    squares = torch.zeros(1, 1, 96, 96)
    squares[..., 32:64, 24:72] = contrast
    kernel = gaussian_kernels(25, torch.tensor([sigma])).float()
    assert edge_width(blur(squares, kernel)).item() == pytest.approx(sigma, rel=0.06)


@needs_data
def test_blur_and_jpeg_are_told_apart_by_degree(photographs):
    image = photographs[0][..., :160, :240]
    widths = [
        edge_width(blur(image, gaussian_kernels(21, torch.tensor([sigma])).float())).item() for sigma in (0, 1, 2)
    ]
    assert widths == sorted(widths)
    steps = [blockiness(degrade(image, f"jpeg{quality}", [0]).image).item() for quality in (40, 20, 10)]
    assert blockiness(image).item() < 1.1
    assert steps == sorted(steps)
    assert steps[0] > 1.05


def test_blockiness_is_the_ratio_of_differences():
    x = normal((1, 2, 19, 26), dtype=torch.float64)
    ratio = []
    for dim in (2, 3):
        steps = x.diff(dim=dim).abs().movedim(dim, 0).flatten(1).mean(1)
        border = torch.arange(1, len(steps) + 1) % 8 == 0
        ratio.append([steps[border].mean(), steps[~border].mean()])
    wanted = (ratio[0][0] + ratio[1][0]) / (ratio[0][1] + ratio[1][1])
    assert blockiness(x).item() == pytest.approx(wanted.item(), rel=1e-3)
    assert blockiness(x[..., :8, :8]).item() == 1


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3), (7, 1)])
def test_formulas_of_tiny_and_flat_images_are_finite(formula, size):
    flat = torch.full((2, 3, *size), 0.3, requires_grad=True)
    value = formula(flat)
    value.sum().backward()
    assert value.isfinite().all()
    assert flat.grad.isfinite().all()
    half = formula(torch.rand(1, 3, *size).half())
    assert half.dtype == torch.float32
    assert half.isfinite().all()


@pytest.mark.parametrize("formula", FORMULAS)
def test_formulas_take_images_in_batches_alone(formula):
    with pytest.raises(TypeError, match=r"image must be floating-point, in \[0, 1\], got torch\.uint8"):
        formula(torch.zeros(1, 3, 9, 9, dtype=torch.uint8))
    for shape in [(3, 9, 9), (1, 3, 0, 9), (1, 0, 9, 9)]:
        with pytest.raises(ValueError, match=r"image must be \(B, C, H, W\) with C, H, W >= 1, got shape"):
            formula(torch.zeros(shape))
    assert formula(torch.zeros(0, 3, 9, 9)).shape == (0,)


def test_contrast_scales_noise_and_leaves_width_and_blocks():
    x = normal((1, 1, 40, 40), dtype=torch.float64)
    for formula, factor in zip(FORMULAS, (3, 3, 1, 1), strict=True):
        assert formula(3 * x).item() == pytest.approx(factor * formula(x).item(), rel=1e-3)


# The estimator


def test_an_estimate_is_in_range_and_a_condition():
    estimate = DegradationEstimator(hidden=8)(100 * normal((4, 3, 20, 9)))
    assert (estimate.noise >= 0).all()
    assert (estimate.blur >= 0).all()
    assert ((estimate.quality >= 0) & (estimate.quality <= 1)).all()
    condition = torch.stack([estimate.noise * 10, estimate.blur / 2, estimate.quality], 1)
    torch.testing.assert_close(estimate.condition(), condition)
    assert isinstance(estimate, DegradationEstimate)


def test_the_estimator_is_its_formula():
    block = DegradationEstimator(2, widths=(3, 4), hidden=5).double()
    image = torch.rand(2, 2, 9, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    details = torch.empty_like(image)
    for i, j in np.ndindex(9, 11):
        around = image[..., max(0, i - 1) : i + 2, max(0, j - 1) : j + 2]
        details[..., i, j] = 8 * (image[..., i, j] - around.mean((2, 3)))
    x = torch.cat([image, details], 1)
    for conv in block.convs:
        x = F.gelu(F.conv2d(x, conv.weight, conv.bias, stride=2, padding=1))
    fixed = torch.stack([
        (immerkaer_sigma(image) + 0.1 / 255).log(), (haar_sigma(image) + 0.1 / 255).log(),
        edge_width(image).log(), blockiness(image).log(),
    ], 1)  # fmt: skip
    spread = (x.var((2, 3), unbiased=False) + (0.1 / 255) ** 2).sqrt().log()
    hidden = F.gelu(block.hidden(torch.cat([fixed, x.mean((2, 3)), spread], 1)))
    noise, blurred, quality = block.head(hidden).unbind(1)
    wanted = 0.1 * F.softplus(noise), 2 * F.softplus(blurred), quality.sigmoid()
    for found, expected in zip(block(image), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_bad_arguments_of_estimators_raise():
    with pytest.raises(ValueError, match="widths must have at least one number, got none"):
        DegradationEstimator(widths=())
    with pytest.raises(ValueError, match=r"widths\[1\] must be an integer of at least 1, got 0"):
        DegradationEstimator(widths=(4, 0))
    with pytest.raises(ValueError, match="in_channels must be an integer of at least 1, got 0"):
        DegradationEstimator(0)


# The prior


def test_codes_of_ragged_cells_are_those_of_the_mirrored_map():
    prior, x = KernelPrior(3, cell=4).double().eval(), normal((1, 3, 8, 12), dtype=torch.float64)
    features = torch.nn.functional.gelu(prior.conv(x))
    cells = features.unflatten(2, (2, 4)).unflatten(4, (3, 4)).mean((3, 5))
    expected = prior.to_code(torch.nn.functional.gelu(prior.around(cells)))
    torch.testing.assert_close(prior(x), expected)
    assert prior(x[..., :7, :9]).shape == (1, 8, 2, 3)


def test_the_prior_is_deterministic_in_training_too():
    prior, x = KernelPrior(4).train(), normal((1, 4, 9, 17))
    assert torch.equal(prior(x), prior(x))


def test_kernels_sum_to_one_and_start_with_their_peak_in_the_middle():
    prior = KernelPrior(4, code_channels=16, kernel_size=21)
    kernels = prior.reconstruct(prior(normal((3, 4, 20, 9))))
    torch.testing.assert_close(kernels.sum((1, 2)), torch.ones(3))
    assert (kernels.flatten(1).argmax(1) == 21 * 21 // 2).all()
    assert (kernels.flatten(1).amax(1) > 0.05).all()
    code = normal((3, 16))
    torch.testing.assert_close(prior.reconstruct(code[:, :, None, None].expand(-1, -1, 2, 5)), prior.reconstruct(code))


def test_codes_can_stand_for_every_gaussian():
    """Three numbers and a constant are enough: the decoder is set by hand."""
    prior = KernelPrior(4, kernel_size=11).double()
    offsets = torch.arange(-5.0, 6).double()
    down, across = torch.meshgrid(offsets, offsets, indexing="ij")
    with torch.no_grad():
        for parameter in prior.to_kernel.parameters():
            parameter.zero_()
        prior.to_kernel.weight[:, 0] = -0.5 * across.flatten() ** 2
        prior.to_kernel.weight[:, 1] = -0.5 * down.flatten() ** 2
    sigmas = torch.tensor([[0.8, 2.0], [1.5, 1.0]]).double()
    code = torch.zeros(2, 8).double()
    code[:, :2] = sigmas**-2
    torch.testing.assert_close(prior.reconstruct(code), gaussian_kernels(11, sigmas[:, 0], sigmas[:, 1]))


def test_bad_arguments_of_priors_raise():
    with pytest.raises(RuntimeError, match="KernelPrior must have a kernel_size to reconstruct kernels, got None"):
        KernelPrior(4).reconstruct(torch.zeros(1, 8))
    prior = KernelPrior(4, kernel_size=3)
    for shape in [(1, 7), (1, 8, 2)]:
        with pytest.raises(ValueError, match=r"code must be \(B, 8\) or \(B, 8, h, w\), got shape"):
            prior.reconstruct(torch.zeros(shape))
    with pytest.raises(TypeError, match=r"code must be floating-point, got torch\.int64"):
        prior.reconstruct(torch.zeros(1, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="kernel_size must be an odd integer of at least 1, got 4"):
        KernelPrior(4, kernel_size=4)
    for name in ("code_channels", "cell"):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got 0"):
            KernelPrior(4, **{name: 0})
    assert "KernelPrior(\n  4, code_channels=8, cell=8, kernel_size=3\n" in repr(prior)
