"""The Frechet distance between what a network sees in the patches of two sets of images."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

PATCH = 256
BATCH = 16  # patches that the network sees at once


@dataclass(frozen=True, eq=False)
class FeatureSums:
    """Sums of features and of their products over patches: those of two sets of patches add up.

    Args:
        count: of the patches.
        total: the sum of their features (D,), in float64.
        products: the sum of their outer products (D, D), in float64.

    >>> sums = FeatureSums.of(torch.tensor([[1.0], [3.0]])) + FeatureSums.of(torch.tensor([[5.0]]))
    >>> mean, covariance = sums.moments()
    >>> mean.item(), covariance.item()
    (3.0, 4.0)
    """

    count: int
    total: Tensor
    products: Tensor

    @staticmethod
    def of(features: Tensor) -> "FeatureSums":
        """Sum up features (N, D)."""
        features = features.double()
        return FeatureSums(len(features), features.sum(0), features.mT @ features)

    def __add__(self, other: "FeatureSums") -> "FeatureSums":
        return FeatureSums(self.count + other.count, self.total + other.total, self.products + other.products)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Give the mean and the unbiased covariance.

        Raises:
            ValueError: if there are fewer than two patches.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 patches, got {self.count}")
        mean = self.total / self.count
        return mean, (self.products - self.count * mean.outer(mean)) / (self.count - 1)


def frechet_distance(a: FeatureSums, b: FeatureSums) -> float:
    r"""Squared Frechet distance between the Gaussians that fit two sets of features.

    :math:`\|\mu_a - \mu_b\|^2 + \mathrm{tr}(S_a + S_b - 2 (S_a S_b)^{1/2})`; with roots :math:`S = F F^T` the trace
    of :math:`(S_a S_b)^{1/2}` is the sum of the singular values of :math:`F_a^T F_b`.

    Raises:
        ValueError: if there are fewer than two patches.

    Source: FID (arXiv:1706.08500), section 3.

    >>> a, b = FeatureSums.of(torch.tensor([[0.0], [2.0]])), FeatureSums.of(torch.tensor([[3.0], [9.0]]))
    >>> round(frechet_distance(a, b), 12)  # (1 - 6)^2 + 2 + 18 - 2 sqrt(2 * 18)
    33.0
    """
    (mean_a, covariance_a), (mean_b, covariance_b) = a.moments(), b.moments()
    shared = torch.linalg.svdvals(_root(covariance_a).mT @ _root(covariance_b)).sum()
    return ((mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * shared).item()


def patch_places(height: int, width: int) -> list[tuple[int, int]]:
    """Give the upper left corners of an image's patches of 256 x 256 pixels.

    They are those of a grid, and of the same grid shifted by half a patch both ways.

    Source: HiFiC (arXiv:2006.09965), appendix A.7.

    >>> patch_places(600, 520)
    [(0, 0), (0, 256), (256, 0), (256, 256), (128, 128)]
    """
    rows, columns = height // PATCH, width // PATCH
    grid = [(PATCH * row, PATCH * column) for row in range(rows) for column in range(columns)]
    half = PATCH // 2
    shifted = [(PATCH * row + half, PATCH * column + half) for row in range(rows - 1) for column in range(columns - 1)]
    return grid + shifted


def patch_features(net: nn.Module, image: Tensor) -> FeatureSums:
    """Sum up what a network sees in the patches of an image that has at least one.

    Args:
        net: makes features (N, D) of patches (N, C, 256, 256), on the device of its parameters.
        image: (1, C, H, W).

    >>> pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> patch_features(pool, torch.zeros(1, 3, 600, 300)).count
    2
    """
    anchor = next(net.parameters(), image)
    places = patch_places(*image.shape[2:])
    patches = torch.cat([image[..., top : top + PATCH, left : left + PATCH] for top, left in places])
    return FeatureSums.of(torch.cat([net(some.to(anchor)).cpu() for some in patches.split(BATCH)]))


def _root(covariance: Tensor) -> Tensor:
    """A matrix F with F F^T the covariance; what rounding makes of its zero eigenvalues is zero again."""
    values, vectors = torch.linalg.eigh(covariance)
    noise = values[-1].clamp(min=0) * len(values) * torch.finfo(values.dtype).eps
    return vectors * values.where(values > noise, 0).sqrt()
