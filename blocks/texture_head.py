"""A head that adds texture to an image, as far as noise and sharpness let it, and leaves structure alone."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import blur_split
from ..kernels.memory_format import in_format_of
from .checks import check_feature_map, check_positive
from .degradation_features import immerkaer_sigma
from .modulated import ModulatedNoiseConv2d
from .noise_injection import NoiseField
from .precision import at_least_float32, without_autocast

STEEPNESS = 20.0
"""Of the gate at the start: noise of 0.1, where an image reaches from 0 to 1, takes two from its logit."""


class TextureHead(nn.Module):
    r"""Add generated texture to an image: a modulated convolution with noise, of which only high frequencies pass.

    .. math::
        m &= (\hat\sigma, \kappa)(x), \qquad g = \sigma\big(b - \textstyle\sum_j e^{a_j} m_j\big), \\
        t &= l \tanh\big(W * \mathrm{ModNoiseConv}(f, m; g n)\big), \qquad y = x + g \, (t - G t)

    with f features, x the image, n noise, and G a Gaussian blur. The metrics of an image are its noise
    :math:`\hat\sigma` (Immerkaer's estimate) and its sharpness :math:`\kappa`, the mean magnitude of x - G x: the more
    of either, the less texture. Of what is added, the part that G lets pass is at most 0.53 l in any pixel, whatever
    the weights: :math:`|G (t - G t)| \le \|G - G^2\|_1 \, l`, which is l / 2 for a Gaussian in two dimensions, and a
    little more for one that is sampled; and none of it where t is flat. W starts at zero, and y is x. Metrics are
    float32 for half inputs. They are of the whole map: not `tile_safe`.

    Shape:
        - features: ``(B, C, H, W)``
        - image: ``(B, C_img, H, W)``
        - noise: as for `NoiseInjection`
        - returns: ``(B, C_img, H, W)``, dtype and memory format of the image kept

    Args:
        channels: number of channels ``C`` of the features.
        out_channels: number of channels ``C_img`` of the image.
        limit: l, the largest magnitude of t.
        sigma: deviation of G, in pixels.
        noise_clamp: the largest magnitude of noise, or None.

    Raises:
        TypeError: if an input is not floating point.
        ValueError: if a number is not above 0, an input has another number of channels, or image and features have
            different sizes.

    Source:
        The style-based noise of StyleGAN2 (arXiv:1912.04958), section 2, on one layer; noise: Immerkaer, Fast Noise
        Variance Estimation (CVIU 64, 1996).

    >>> features, image = torch.randn(1, 8, 5, 7), torch.rand(1, 3, 5, 7)
    >>> TextureHead(8)(features, image, NoiseField(3)).equal(image)
    True
    """

    tile_safe = False
    tile_multiple = 1

    def __init__(
        self,
        channels: int,
        out_channels: int = 3,
        *,
        limit: float = 0.1,
        sigma: float = 1.5,
        noise_clamp: float | None = 3.0,
    ) -> None:
        super().__init__()
        check_positive(channels=channels, out_channels=out_channels)
        if not limit > 0 or not sigma > 0:
            name, value = ("sigma", sigma) if limit > 0 else ("limit", limit)
            raise ValueError(f"{name} must be above 0, got {value}")
        self.channels, self.out_channels, self.limit, self.sigma = channels, out_channels, limit, sigma
        self.receptive_radius = 2 + math.ceil(3 * sigma)
        self.texture = ModulatedNoiseConv2d(channels, channels, style_channels=2, noise_clamp=noise_clamp)
        self.to_image = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.gate_steepness = nn.Parameter(torch.full((2,), STEEPNESS).log())
        self.gate_bias = nn.Parameter(torch.full((1,), 2.0))
        for parameter in self.to_image.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor, image: Tensor, noise: Tensor | NoiseField | None = None) -> Tensor:
        check_feature_map(features, self.channels, self)
        check_feature_map(image, self.out_channels, self)
        if image.shape[2:] != features.shape[2:] or image.shape[0] != features.shape[0]:
            rule = f"the batch and size of features, {tuple(features.shape)}"
            raise ValueError(f"image must have {rule}, got shape {tuple(image.shape)}")
        metrics = self.metrics(image)
        gate = self.gate(metrics)
        texture = self.to_image(self.texture(features, metrics, noise, gate))
        _, high = blur_split(self.limit * torch.tanh(at_least_float32(texture)), self.sigma)
        return in_format_of((image + gate[:, None, None, None] * high).to(image.dtype), image)

    def metrics(self, image: Tensor) -> Tensor:
        """Noise and sharpness of each image: ``(B, 2)``, no less precise than float32."""
        with without_autocast(image):
            wide = at_least_float32(image)
            sigma = immerkaer_sigma(F.pad(wide, (1, 1, 1, 1), mode="replicate"))
            _, high = blur_split(wide, self.sigma)
            return torch.stack([sigma, high.abs().mean((1, 2, 3))], dim=1)

    def gate(self, metrics: Tensor) -> Tensor:
        """How much texture an image of such metrics gets: ``(B,)``, in (0, 1)."""
        steepness = at_least_float32(self.gate_steepness).exp()
        return torch.sigmoid(at_least_float32(self.gate_bias) - (metrics * steepness).sum(1))

    def extra_repr(self) -> str:
        return f"{self.channels}, {self.out_channels}, limit={self.limit}, sigma={self.sigma}"
