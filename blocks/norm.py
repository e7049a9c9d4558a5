"""Normalisation over the channels of each pixel: no batch statistics, no spatial ones, so every tile is right."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.memory_format import is_channels_last
from .checks import check_feature_map, check_positive
from .precision import at_least_float32


class LayerNorm2d(nn.Module):
    r"""Normalise the channels of each pixel to mean 0 and variance 1, then scale and shift them.

    :math:`y_c = \gamma_c \, (x_c - \mu) / \sqrt{\sigma^2 + \epsilon} + \beta_c`, with :math:`\mu, \sigma^2` the mean
    and the (biased) variance over the channels of one pixel. Statistics are float32 for half-precision inputs.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H, W)``, dtype and memory format kept.

    Args:
        channels: number of channels ``C``.
        eps: added to the variance.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if ``channels`` < 1, or the input has another number of channels.

    Source:
        Layer Normalization (arXiv:1607.06450), over channels as in NAFNet (arXiv:2204.04676).

    >>> LayerNorm2d(8)(torch.randn(1, 8, 5, 7)).shape
    torch.Size([1, 8, 5, 7])
    """

    tile_safe = True
    receptive_radius = 0
    tile_multiple = 1

    def __init__(self, channels: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        check_positive(channels=channels)
        self.channels = channels
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map(x, self.channels, self)
        wide = at_least_float32(x)
        if is_channels_last(wide):
            weight, bias = self.weight.to(wide.dtype), self.bias.to(wide.dtype)
            y = F.layer_norm(wide.permute(0, 2, 3, 1), (self.channels,), weight, bias, self.eps)
            return y.permute(0, 3, 1, 2).to(x.dtype)
        y = _normalised_planes(wide, self.eps)
        return torch.addcmul(self.bias[:, None, None], y, self.weight[:, None, None]).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}"


class RMSNorm2d(nn.Module):
    r"""Scale the channels of each pixel to a root mean square of 1, then by a learned weight.

    :math:`y_c = \gamma_c \, x_c / \sqrt{\frac{1}{C} \sum_k x_k^2 + \epsilon}`. The statistic is float32 for
    half-precision inputs.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H, W)``, dtype and memory format kept.

    Args:
        channels: number of channels ``C``.
        eps: added to the mean square.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if ``channels`` < 1, or the input has another number of channels.

    Source:
        Root Mean Square Layer Normalization (arXiv:1910.07467), section 4.

    >>> RMSNorm2d(8)(torch.randn(1, 8, 5, 7)).shape
    torch.Size([1, 8, 5, 7])
    """

    tile_safe = True
    receptive_radius = 0
    tile_multiple = 1

    def __init__(self, channels: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        check_positive(channels=channels)
        self.channels = channels
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map(x, self.channels, self)
        wide = at_least_float32(x)
        if is_channels_last(wide):
            weight = self.weight.to(wide.dtype)
            y = F.rms_norm(wide.permute(0, 2, 3, 1), (self.channels,), weight, self.eps)
            return y.permute(0, 3, 1, 2).to(x.dtype)
        mean_square = wide.square().mean(dim=1, keepdim=True)
        return (wide * torch.rsqrt(mean_square + self.eps) * self.weight[:, None, None]).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}"


def _normalised_planes(x: Tensor, eps: float) -> Tensor:
    """Mean 0 and variance 1 over the channels of maps that hold plane after plane."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        # A batch norm over the channels, each pixel a feature of its own: it reads the planes as they lie and keeps no
        # map but its input for the gradient. On one core it takes a fifth to three quarters of the time of moving the
        # channels last and back for F.layer_norm, with or without the gradient.
        planes = x.transpose(0, 1)
        y = torch.batch_norm(planes.reshape(x.shape[1], -1), None, None, None, None, True, 0.0, eps, False)
        return y.view(planes.shape).transpose(0, 1).contiguous()
    # The mean of squares is taken after the mean is gone: no difference of two large numbers.
    centred = x - x.mean(dim=1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(dim=1, keepdim=True) + eps)
