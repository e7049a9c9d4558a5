"""Noise and the camera: each draw against its definition, by moments, explicit formulas and scipy."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from skimage import data

from claritycore.images import psnr
from claritycore.training import camera as camera_module
from claritycore.training.camera import Camera, demosaic, draw_camera, mosaic, through_camera, unprocess
from claritycore.training.noise import (
    _poisson_counts,
    correlated_noise,
    draw_covariance,
    gaussian_noise,
    mix_channels,
    normal_fields,
    poisson_noise,
)
from tests.strategies import normal


def rngs(count, seed=0):
    return [np.random.default_rng(seed + i) for i in range(count)]


# Gaussian


@pytest.mark.parametrize("sigma", [0.0, 1 / 255, 0.1, 0.5])
def test_gaussian_noise_has_its_mean_and_deviation_at_every_level(sigma):
    image = torch.linspace(0, 1, 4)[:, None, None, None].expand(4, 3, 150, 150)
    noise = gaussian_noise(image, rngs(4), torch.full((4,), sigma)) - image
    count = noise[0].numel()
    assert (noise.mean((1, 2, 3)).abs() <= 4 * sigma / math.sqrt(count) + 1e-7).all()
    assert ((noise.std((1, 2, 3)) - sigma).abs() <= 4 * sigma / math.sqrt(2 * count) + 1e-7).all()


def test_gaussian_noise_is_normal_and_white():
    noise = normal_fields(rngs(1), torch.zeros(1, 1, 200, 200))[0, 0]
    assert stats.kstest(noise.flatten(), "norm").pvalue > 1e-4
    for shifted in (noise.roll(1, 0), noise.roll(1, 1)):
        assert abs((noise * shifted).mean()) < 4 / 200


def test_each_sample_has_its_sigma_and_colour():
    noise = gaussian_noise(
        torch.zeros(3, 3, 100, 100), rngs(3), torch.tensor([0.1, 0.2, 0.3]), grey=torch.tensor([False, True, False])
    )
    torch.testing.assert_close(noise.std((1, 2, 3)), torch.tensor([0.1, 0.2, 0.3]), rtol=0.03, atol=0)
    assert torch.equal(noise[1, 0], noise[1, 2])
    correlation = torch.corrcoef(noise[0].flatten(1))
    assert (correlation - torch.eye(3)).abs().max() < 0.05


def test_correlated_noise_has_its_covariance():
    covariance = torch.from_numpy(np.stack([draw_covariance(rng, 3, 25 / 255) for rng in rngs(2)]))
    noise = correlated_noise(torch.zeros(2, 3, 300, 300, dtype=torch.float64), rngs(2, seed=7), covariance)
    for sample in range(2):
        measured = torch.cov(noise[sample].flatten(1))
        assert (measured - covariance[sample]).abs().max() < 0.02 * covariance[sample].abs().max()


@pytest.mark.parametrize("channels", [1, 3])
def test_covariances_are_drawn_as_bsrgan_says(channels):
    """The absolute values of a rotated diagonal: still a covariance for up to 3 channels, of the given strength."""
    for rng in rngs(50):
        covariance = draw_covariance(rng, channels, 0.1)
        assert (covariance >= 0).all()
        assert np.allclose(covariance, covariance.T)
        values = np.linalg.eigvalsh(covariance)
        assert values.min() > -1e-12
        assert np.trace(covariance) <= channels * 0.1**2


def test_channels_are_mixed_by_the_matrix_of_the_sample():
    image, matrices = normal((2, 3, 4, 5), dtype=torch.float64), normal((2, 4, 3), dtype=torch.float64, seed=1)
    expected = torch.einsum("bij,bjhw->bihw", matrices, image)
    torch.testing.assert_close(mix_channels(image, matrices), expected)


# Poisson


def test_counts_are_the_inverse_of_the_distribution():
    levels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 20000))
    uniform = torch.from_numpy(np.random.default_rng(1).random(20000))
    for peak in (1.0, 8.0, 256.0):
        rates = torch.arange(256, dtype=torch.float64) / 255 * peak
        counts = _poisson_counts(levels, uniform, rates)
        assert np.array_equal(counts, stats.poisson.ppf(uniform, rates[levels]).clip(0))
    # Even the smallest number that can be drawn gives no count that never occurs.
    lowest = _poisson_counts(torch.tensor([0, 255]), torch.zeros(2, dtype=torch.float64), rates)
    assert lowest[0] == 0
    assert stats.poisson.cdf(lowest[1].item(), 256) > 1e-15


def test_poisson_noise_counts_256_photons_where_all_levels_occur():
    image = (torch.arange(256) / 255).repeat(600, 1)[None, None]
    counts = 256 * poisson_noise(image, rngs(1), torch.ones(1))[0, 0]
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-2)
    expected = torch.arange(256) * 256 / 255
    mean, variance = counts.mean(0), counts.var(0)
    assert ((mean - expected).abs() < 5 * (expected / 600).sqrt() + 1e-2).all()
    # The variance of a sample variance, 2 / (n - 1) of a normal one, is a little larger for small counts.
    assert ((variance - expected).abs() < 6 * expected * math.sqrt(2 / 599) * (1 + 1 / expected.clamp(1)) + 1e-2).all()
    assert variance[0] < 1e-6  # black


@pytest.mark.parametrize(("levels", "peak"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 16), (130, 256)])
def test_poisson_noise_rounds_the_number_of_levels_up_to_a_power_of_two(levels, peak):
    image = (torch.linspace(0.3, 0.9, levels).mul(255).round() / 255).repeat(40 * 256 // levels)[None, None, None]
    counts = peak * poisson_noise(image, rngs(1), torch.ones(1))
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=2e-4 * peak)
    if peak > 1:
        halves = counts / 2
        assert (halves - halves.round()).abs().max() > 0.4


def test_poisson_noise_is_multiplied_by_its_factor_and_counts_rounded_levels():
    image = normal((2, 3, 32, 32)).sigmoid()
    single = poisson_noise(image, rngs(2), torch.ones(2)) - image
    scaled = poisson_noise(image, rngs(2), torch.tensor([0.5, 3.0])) - image
    torch.testing.assert_close(scaled[0], 0.5 * single[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(scaled[1], 3 * single[1], rtol=0, atol=1e-6)
    # What is added is the noise of the 8-bit image.
    rounded = (255 * image).round() / 255
    torch.testing.assert_close(poisson_noise(rounded, rngs(2), torch.ones(2)) - rounded, single, rtol=0, atol=1e-6)


def test_grey_poisson_noise_is_that_of_the_luma():
    colour = torch.tensor([0.9, 0.2, 0.4])[None, :, None, None].expand(1, 3, 300, 300)
    noise = (poisson_noise(colour, rngs(1), torch.ones(1), grey=torch.tensor([True])) - colour)[0]
    torch.testing.assert_close(noise[0], noise[2], rtol=0, atol=1e-6)
    luma = round(255 * (0.299 * 0.9 + 0.587 * 0.2 + 0.114 * 0.4)) / 255
    assert abs(noise[0].mean()) < 4 * math.sqrt(luma) / 300
    assert abs(noise[0].var() - luma) < 0.02  # one level: one photon at white
    other = poisson_noise(colour[:, :2], rngs(1), torch.ones(1), grey=torch.tensor([True])) - colour[:, :2]
    torch.testing.assert_close(other[0, 0], other[0, 1], rtol=0, atol=1e-6)


def test_noise_lets_gradients_pass():
    for noise in (gaussian_noise, poisson_noise):
        image = normal((1, 3, 8, 8)).sigmoid().requires_grad_()
        upstream = normal((1, 3, 8, 8), seed=1)
        noise(image, rngs(1), torch.ones(1)).backward(upstream)
        assert torch.equal(image.grad, upstream)


# Camera


def drawn_camera(seed, *, noise=False):
    drawn = draw_camera(np.random.default_rng(seed))
    matrix = torch.from_numpy(drawn["matrix"])[None]
    gains = drawn["brightness"] * torch.tensor([[drawn["red_gain"], 1, drawn["blue_gain"]]], dtype=torch.float64)
    levels = [torch.tensor([drawn[name]], dtype=torch.float64) for name in ("shot", "read")]
    return Camera(matrix, gains, *(level if noise else 0 * level for level in levels))


@pytest.mark.parametrize("seed", range(4))
def test_curves_matrix_and_gains_are_undone(seed, monkeypatch):
    """Without mosaic, on colours that all of the cameras can hold: to rounding."""
    image = 0.3 + 0.4 * normal((1, 3, 20, 30), dtype=torch.float64).sigmoid()
    camera = drawn_camera(seed)
    monkeypatch.setattr(camera_module, "mosaic", lambda image: image)
    monkeypatch.setattr(camera_module, "demosaic", lambda raw: raw[..., 2:-2, 2:-2])
    torch.testing.assert_close(through_camera(image, None, camera), image, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("name", "least"), [("astronaut", 31), ("coffee", 29), ("chelsea", 35)])
def test_a_photograph_comes_back_but_for_what_the_mosaic_lost(name, least):
    image = torch.from_numpy(getattr(data, name)().copy()).permute(2, 0, 1)[None] / 255
    for seed in range(2):
        back = through_camera(image, None, drawn_camera(seed))
        assert psnr(back, image).item() > least
        assert (back - image).abs().median() < 2 / 255


def test_a_grey_ramp_comes_back_up_to_the_saturated_end():
    image = torch.linspace(0, 1, 256)[None, None, None].expand(1, 3, 16, 256)
    error = (through_camera(image, None, drawn_camera(0)) - image).abs()
    assert error[..., :250].max() < 0.5 / 255
    assert error.max() < 2 / 255


def test_a_sensor_without_colours_only_saturates():
    image = torch.linspace(0, 1, 256, dtype=torch.float64)[None, None, None].expand(1, 1, 3, 256)
    back = through_camera(image, None, drawn_camera(0))
    torch.testing.assert_close(back[..., :230], image[..., :230], rtol=0, atol=1e-6)
    assert (back - image).abs().max() < 2 / 255
    assert through_camera(image.expand(1, 5, 3, 256), None, drawn_camera(0)).shape == (1, 5, 3, 256)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 3), (5, 4)])
def test_flat_colours_of_any_size_come_back(size):
    image = torch.tensor([0.6, 0.4, 0.5])[None, :, None, None].expand(1, 3, *size)
    torch.testing.assert_close(through_camera(image, None, drawn_camera(1)), image, rtol=0, atol=2e-5)


def test_the_noise_of_the_sensor_has_variance_shot_x_plus_read(monkeypatch):
    raws = []
    monkeypatch.setattr(camera_module, "process", lambda raw, matrix, gains: raws.append(raw) or raw)
    levels = torch.linspace(0.1, 0.95, 5, dtype=torch.float64)
    image = levels[:, None, None, None].expand(5, 3, 300, 300)
    gains = torch.ones(5, 3, dtype=torch.float64)
    shot, read = torch.linspace(1e-4, 1e-2, 5), torch.linspace(3e-4, 1e-6, 5)
    camera = Camera(torch.eye(3).expand(5, 3, 3), gains, shot, read)
    clean = unprocess(image, camera.matrix, gains[..., None, None])
    through_camera(image, rngs(5), camera)
    noise = raws[0] - clean[:, :1, :1, :1]
    expected = shot * clean[:, 0, 0, 0] + read
    torch.testing.assert_close(noise.var((1, 2, 3)), expected, rtol=4 * math.sqrt(2) / 304, atol=0)
    assert (noise.mean((1, 2, 3)).abs() < 4 * expected.sqrt() / 304).all()


def test_cameras_are_drawn_as_brooks_et_al_say():
    drawn = [draw_camera(rng) for rng in rngs(3000)]
    column = {name: np.array([camera[name] for camera in drawn]) for name in drawn[0]}
    log_shot = np.log(column["shot"])
    bounds = math.log(1e-4), math.log(1.2e-2)
    assert stats.kstest(log_shot, "uniform", (bounds[0], bounds[1] - bounds[0])).pvalue > 1e-4
    rest = np.log(column["read"]) - (2.18 * log_shot + 1.20)
    assert stats.kstest(rest, "norm", (0, 0.26)).pvalue > 1e-4
    assert stats.kstest(1 / column["brightness"], "norm", (0.8, 0.1)).pvalue > 1e-4
    assert stats.kstest(column["red_gain"], "uniform", (1.9, 0.5)).pvalue > 1e-4
    assert stats.kstest(column["blue_gain"], "uniform", (1.5, 0.4)).pvalue > 1e-4
    np.testing.assert_allclose(column["matrix"].sum(2), 1)


def malvar(raw, row, column):
    """The paper's words at one pixel of a mosaic: bilinear interpolation and a share of the pixel's own Laplacian."""

    def around(*offsets):
        return sum(raw[row + i, column + j] for i, j in offsets) / len(offsets)

    here = raw[row, column]
    cross, far = around((0, 1), (0, -1), (1, 0), (-1, 0)), around((0, 2), (0, -2), (2, 0), (-2, 0))
    diagonal = around((1, 1), (1, -1), (-1, 1), (-1, -1))
    sideways, upright = around((0, 2), (0, -2)), around((2, 0), (-2, 0))
    even_row, even_column = row % 2 == 0, column % 2 == 0
    if even_row == even_column:  # red or blue
        green, other = cross + (here - far) / 2, diagonal + 3 / 4 * (here - far)
        return (here, green, other) if even_row else (other, green, here)
    in_row = around((0, 1), (0, -1)) + (5 * here - 4 * diagonal - 2 * sideways + upright) / 8
    in_column = around((1, 0), (-1, 0)) + (5 * here - 4 * diagonal - 2 * upright + sideways) / 8
    return (in_row, here, in_column) if even_row else (in_column, here, in_row)


def test_demosaicing_is_that_of_malvar():
    raw = normal((1, 1, 11, 13), dtype=torch.float64)
    made = demosaic(raw)[0]
    for row in range(2, 9):
        for column in range(2, 11):
            expected = torch.stack(malvar(raw[0, 0], row, column))
            torch.testing.assert_close(made[:, row - 2, column - 2], expected)


def test_demosaicing_is_exact_on_slopes_that_all_colours_share():
    rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(10.0), indexing="ij")
    slope = (0.01 * rows + 0.02 * columns).expand(1, 3, 12, 10)
    torch.testing.assert_close(demosaic(mosaic(slope)), slope[..., 2:-2, 2:-2])
