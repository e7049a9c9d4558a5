"""Noise of a strength per sample: Gaussian, correlated over the channels, and Poisson.

The random fields are drawn by numpy on the CPU, from a generator per sample, and then moved: what a sample gets depends
neither on its batch nor on the device.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

# The luma of BT.601, which grey Poisson noise is drawn for.
LUMA = (0.299, 0.587, 0.114)
LEVELS = 256


def normal_fields(rngs: Sequence[np.random.Generator], image: Tensor, *, grey: Tensor | None = None) -> Tensor:
    """Draw normal noise of the shape, dtype and device of the image.

    Shape: as ``image``, ``(B, C, H, W)``; ``grey`` is ``(B,)``.

    Args:
        rngs: a generator for each sample.
        image: what the noise is for.
        grey: which samples get the same noise in all channels; None for none of them.

    >>> normal_fields([np.random.default_rng(0)], torch.zeros(1, 3, 4, 6)).shape
    torch.Size([1, 3, 4, 6])
    """
    _, channels, height, width = image.shape
    fields = torch.empty(image.shape, dtype=torch.float32)
    for sample, rng in enumerate(rngs):
        planes = 1 if grey is not None and bool(grey[sample]) else channels
        drawn = rng.standard_normal((planes, height, width), dtype=np.float32)
        fields[sample] = torch.from_numpy(drawn)
    return fields.to(image)


def gaussian_noise(
    image: Tensor, rngs: Sequence[np.random.Generator], sigma: Tensor, *, grey: Tensor | None = None
) -> Tensor:
    """Add Gaussian noise; nothing is clamped.

    Shape: ``image`` ``(B, C, H, W)`` -> the same; ``sigma`` and ``grey`` are ``(B,)``.

    Args:
        image: floating-point images.
        rngs: a generator for each sample.
        sigma: the standard deviation of each sample.
        grey: which samples get the same noise in all channels.

    >>> noisy = gaussian_noise(torch.zeros(1, 1, 64, 64), [np.random.default_rng(0)], torch.tensor([0.1]))
    >>> round(noisy.std().item(), 2)
    0.1
    """
    return image + normal_fields(rngs, image, grey=grey) * _by_sample(sigma, image)


def correlated_noise(image: Tensor, rngs: Sequence[np.random.Generator], covariance: Tensor) -> Tensor:
    """Add Gaussian noise that is correlated over the channels, and not over the pixels.

    Shape: ``image`` ``(B, C, H, W)`` -> the same; ``covariance`` is ``(B, C, C)``, symmetric and positive semidefinite.

    >>> covariance = torch.full((1, 3, 3), 0.01)  # the same in all channels
    >>> noisy = correlated_noise(torch.zeros(1, 3, 4, 6), [np.random.default_rng(0)], covariance)
    >>> torch.allclose(noisy[:, 0], noisy[:, 2], atol=1e-6)
    True
    """
    values, vectors = torch.linalg.eigh(covariance.double().cpu())
    roots = (vectors * values.clamp(min=0).sqrt()[:, None]) @ vectors.mT
    return image + mix_channels(normal_fields(rngs, image), roots)


def mix_channels(image: Tensor, matrices: Tensor) -> Tensor:
    """Multiply the channels of each sample by its matrix; no matrix product, which a GPU may round to TF32.

    Shape: ``(B, C, H, W)``, ``(B, D, C)`` -> ``(B, D, H, W)``.

    >>> mix_channels(torch.ones(1, 2, 1, 1), torch.tensor([[[1.0, 2.0]]]))
    tensor([[[[3.]]]])
    """
    return (matrices.to(image)[..., None, None] * image[:, None]).sum(2)


def draw_covariance(rng: np.random.Generator, channels: int, strength: float) -> np.ndarray:
    """Draw the covariance of BSRGAN's correlated noise: |strength^2 U^T D U|, of a random rotation and diagonal.

    >>> draw_covariance(np.random.default_rng(0), 3, 0.1).shape
    (3, 3)
    """
    variances = np.diag(rng.random(channels))
    basis = np.linalg.svd(rng.random((channels, channels)))[0]
    return np.abs(strength**2 * basis.T @ variances @ basis)


def poisson_noise(
    image: Tensor, rngs: Sequence[np.random.Generator], scale: Tensor, *, grey: Tensor | None = None
) -> Tensor:
    r"""Add Poisson noise: :math:`y = x + s (P(v \bar x) / v - \bar x)`; nothing is clamped.

    :math:`\bar x` is the image rounded to 8 bits, or its luma where the noise is grey, and :math:`v` is the number of
    levels that occur in it, rounded up to a power of 2: an image with all 256 levels counts 256 photons at white.
    Counts come from one uniform number a pixel through the inverse of the distribution, so that a small change of the
    image changes few of them. Gradients pass to ``image`` as if the noise did not depend on it.

    Shape: ``image`` ``(B, C, H, W)`` -> the same; ``scale`` and ``grey`` are ``(B,)``.

    Args:
        image: floating-point images in [0, 1].
        rngs: a generator for each sample.
        scale: the factor of the noise of each sample.
        grey: which samples get the same noise in all channels.

    Source: Wang et al., Real-ESRGAN (arXiv:2107.10833); the rule for the levels is that of scikit-image.

    >>> noisy = poisson_noise(torch.ones(1, 1, 64, 64), [np.random.default_rng(0)], torch.ones(1))
    >>> sorted(set(noisy.flatten().tolist()))[:3]  # one level: v = 1
    [0.0, 1.0, 2.0]
    """
    noise = torch.empty_like(image)
    for sample, rng in enumerate(rngs):
        x = image[sample].detach()
        grey_here = grey is not None and bool(grey[sample])
        if grey_here and x.shape[0] == 3:
            x = (x * x.new_tensor(LUMA)[:, None, None]).sum(0, keepdim=True)
        elif grey_here:
            x = x.mean(0, keepdim=True)
        noise[sample] = _poisson_field(x, rng)
    return image + noise * _by_sample(scale, image)


def _poisson_field(x: Tensor, rng: np.random.Generator) -> Tensor:
    """The noise for one sample, in steps of 1 / v."""
    levels = (255 * x.clamp(0, 1)).round().long()
    # Sums of float64 probabilities, which Apple's GPUs do not have.
    place = torch.device("cpu") if x.device.type == "mps" else x.device
    used = torch.zeros(LEVELS, device=place).index_fill_(0, levels.flatten().to(place), 1)
    v = torch.exp2(used.sum().log2().ceil()).double()
    uniform = torch.from_numpy(rng.random(x.shape)).to(place)
    rates = torch.arange(LEVELS, device=place, dtype=torch.float64) / 255 * v
    counts = _poisson_counts(levels.to(place), uniform, rates)
    return (counts / v - levels.to(place) / 255).to(x)


def _poisson_counts(levels: Tensor, uniform: Tensor, rates: Tensor) -> Tensor:
    """The smallest counts whose cumulative probability, at the rate of each pixel's level, exceeds `uniform`."""
    # No rate is above 256: at twice as much nothing is left in float64.
    counts = torch.arange(2 * LEVELS, device=rates.device, dtype=torch.float64)
    rates = rates[:, None]
    cumulative = (torch.xlogy(counts, rates) - rates - torch.lgamma(counts + 1)).exp().cumsum(1)
    cumulative = cumulative / cumulative[:, -1:]
    # One sorted table for all levels: the row of a level is moved up by its number.
    table = (cumulative + torch.arange(LEVELS, device=rates.device)[:, None]).flatten()
    found = torch.searchsorted(table, uniform + levels, right=True)
    return (found - levels * len(counts)).clamp(0, len(counts) - 1)


def _by_sample(values: Tensor, image: Tensor) -> Tensor:
    return values.to(image)[:, None, None, None]
