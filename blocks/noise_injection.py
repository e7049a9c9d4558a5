"""Noise that a net adds to its features, from a tensor, by coordinate, or drawn in training."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels import noise_bias_act, noise_field
from ..kernels.noise_field.operands import check_place
from .checks import check_feature_map, check_positive
from .precision import at_least_float32


@dataclass(frozen=True)
class NoiseField:
    """Names normal noise by seed and place: the same for a pixel in any batch, tile or crop.

    Args:
        seed: from 0 to 2^63 - 1.
        layer: which of a net's noises this is.
        samples: the number of each sample of a batch; None counts from 0.
        offset: row and column of the first pixel in the whole.

    Raises:
        ValueError: if a number is out of range.

    >>> NoiseField(7)(torch.zeros(2, 8, 5, 7)).shape
    torch.Size([2, 1, 5, 7])
    """

    seed: int
    layer: int = 0
    samples: tuple[int, ...] | Tensor | None = None
    offset: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        check_place(self.seed, self.layer, self.offset)

    def __call__(self, x: Tensor) -> Tensor:
        """Make the noise for a map: ``(B, 1, H, W)``, of its device, and no less precise than float32."""
        samples = torch.arange(x.shape[0], device=x.device) if self.samples is None else self.samples
        dtype = torch.promote_types(x.dtype, torch.float32)
        place = {"samples": samples, "layer": self.layer, "offset": self.offset}
        return noise_field(self.seed, x.shape[2:], device=x.device, dtype=dtype, **place)


class NoiseInjection(nn.Module):
    r"""Add noise, of a strength that is learned and starts at 0, as far as a gate lets it through.

    .. math:: y = x + a \, g \odot \mathrm{clamp}(n, -m, m)

    with n a map for all channels, :math:`g` in [0, 1] (router confidence, or what a prompt tells of blur; clamped to
    that range), and :math:`m` a bound. In training, noise that is not given is drawn from torch's generator; in eval
    there is none unless it is given, and a `NoiseField` makes it the same in every batch, tile and crop.

    Shape:
        - x: ``(B, C, H, W)``
        - noise: ``(B, 1, H, W)`` or ``(1, 1, H, W)``
        - gate: ``(B,)``, ``(B, 1, 1, 1)`` or ``(B, 1, H, W)``
        - returns: ``(B, C, H, W)``, dtype and memory format kept

    Args:
        channels: C for a strength of each channel, None for one of all.
        clamp: m, above 0, or None.

    Raises:
        TypeError: if the input is not floating point, noise no tensor or `NoiseField`, or a gate no tensor.
        ValueError: if noise or gate have another shape, ``channels`` is < 1, or ``clamp`` is not above 0.

    Source:
        StyleGAN2 (arXiv:1912.04958), figure 2; loads the ``weight`` of its ``NoiseInjection``.

    >>> x = torch.randn(1, 8, 5, 7)
    >>> NoiseInjection()(x, NoiseField(3)).equal(x)  # the strength starts at 0
    True
    """

    tile_safe = True
    receptive_radius = 0
    tile_multiple = 1

    def __init__(self, channels: int | None = None, *, clamp: float | None = None) -> None:
        super().__init__()
        if channels is not None:
            check_positive(channels=channels)
        if clamp is not None and not clamp > 0:
            raise ValueError(f"clamp must be above 0, got {clamp}")
        self.channels = channels
        self.clamp = clamp
        self.weight = nn.Parameter(torch.zeros(channels or 1))

    def forward(self, x: Tensor, noise: Tensor | NoiseField | None = None, gate: Tensor | None = None) -> Tensor:
        check_feature_map(x, self.channels, self)
        drawn = self.draw(x, noise, gate)
        return x if drawn is None else noise_bias_act(x, None, drawn, self.weight, activation="linear")

    def draw(self, x: Tensor, noise: Tensor | NoiseField | None, gate: Tensor | None = None) -> Tensor | None:
        """Make the gated noise of a map, which the strength is still to scale; None for none."""
        gate = None if gate is None else _checked_gate(gate, x)
        if noise is None and not self.training:
            return None
        if noise is None:
            noise = torch.randn_like(at_least_float32(x[:, :1]))
        elif isinstance(noise, NoiseField):
            noise = noise(x)
        elif not isinstance(noise, Tensor):
            raise TypeError(f"noise must be a tensor, a NoiseField or None, got {noise!r}")
        batch, _, height, width = x.shape
        if noise.shape not in ((batch, 1, height, width), (1, 1, height, width)):
            rule = f"(B, 1, H, W) = ({batch}, 1, {height}, {width}), or with 1 for B"
            raise ValueError(f"noise must be {rule}, got shape {tuple(noise.shape)}")
        if self.clamp is not None:
            noise = noise.clamp(-self.clamp, self.clamp)
        return noise if gate is None else noise * gate

    def extra_repr(self) -> str:
        return f"{self.channels}, clamp={self.clamp}"


def _checked_gate(gate: Tensor, x: Tensor) -> Tensor:
    """Bring a gate into [0, 1] and into a shape that spreads over the noise."""
    batch, _, height, width = x.shape
    if not isinstance(gate, Tensor):
        raise TypeError(f"gate must be a tensor, got {gate!r}")
    if gate.shape not in ((batch,), (batch, 1, 1, 1), (batch, 1, height, width)):
        rule = f"(B,), (B, 1, 1, 1) or (B, 1, H, W) with B = {batch}, H = {height}, W = {width}"
        raise ValueError(f"gate must be {rule}, got shape {tuple(gate.shape)}")
    gate = at_least_float32(gate).clamp(0, 1)
    return gate[:, None, None, None] if gate.ndim == 1 else gate
