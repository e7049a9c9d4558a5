"""Convolutions that a style modulates (StyleGAN2), and a head that adds texture and leaves structure alone."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import modulate, modulated_conv2d, noise_bias_act
from ..kernels.memory_format import in_format_of
from .checks import check_choice, check_feature_map, check_odd, check_positive
from .initialisation import fill
from .noise_injection import NoiseField, NoiseInjection
from .precision import at_least_float32, without_autocast

Resample = Literal["up", "down"]
TAPS = 1.0, 3.0, 3.0, 1.0


class ModulatedConv2d(nn.Module):
    r"""Convolve each sample with a kernel that its style scales, and demodulate: StyleGAN2's convolution.

    :math:`y_{bo} = d_{bo} \sum_i (w_{oi} s_{bi}) * x_{bi}` with :math:`s = A v / \sqrt{S} + b` for a style vector v, b
    starting at 1, and d as `modulated_conv2d` says. "up" doubles the map by a transposed convolution and a blur with
    the taps 1, 3, 3, 1; "down" blurs and convolves in steps of two.

    Shape:
        - x: ``(B, C_in, H, W)``
        - style: ``(B, S)``
        - returns: ``(B, C_out, H, W)``; "up" ``(2 H, 2 W)``, "down" ``(ceil(H / 2), ceil(W / 2))``

    Args:
        in_channels: number of channels ``C_in``.
        out_channels: number of channels ``C_out``.
        style_channels: length of a style vector ``S``.
        kernel_size: odd.
        demodulate: False for convolutions to RGB.
        resample: "up", "down" or None.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if a number is < 1, ``kernel_size`` is even, ``resample`` is another word, the input has another
            number of channels, or the style another width.

    Source:
        StyleGAN2 (arXiv:1912.04958), sections 2.2 and B. State dicts in the layout of rosinality's ``ModulatedConv2d``
        and BasicSR's load: a kernel ``(1, C_out, C_in, k, k)``, ``modulation``, and a kernel of ``blur`` or
        ``smooth``, which is dropped.

    >>> x, style = torch.randn(1, 8, 5, 7), torch.randn(1, 4)
    >>> ModulatedConv2d(8, 16, style_channels=4, resample="up")(x, style).shape
    torch.Size([1, 16, 10, 14])
    """

    tile_safe = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        style_channels: int,
        kernel_size: int = 3,
        demodulate: bool = True,
        resample: Resample | None = None,
    ) -> None:
        super().__init__()
        check_positive(in_channels=in_channels, out_channels=out_channels, style_channels=style_channels)
        check_odd(kernel_size=kernel_size)
        check_choice("resample", resample, (None, "up", "down"))
        self.in_channels, self.style_channels, self.kernel_size = in_channels, style_channels, kernel_size
        self.demodulate = demodulate
        self.resample: Resample | None = resample
        half = kernel_size // 2
        self.receptive_radius = {None: half, "up": max(1, half), "down": half + 1}[resample]
        self.tile_multiple = 2 if resample == "down" else 1
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        fill(self.weight, nn.init.normal_)
        self.modulation = nn.Linear(style_channels, in_channels)
        fill(self.modulation.weight, nn.init.normal_)
        fill(self.modulation.bias, nn.init.ones_)
        self.register_load_state_dict_pre_hook(_in_our_layout)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        check_feature_map(x, self.in_channels, self)
        if self.resample is None:
            y = modulated_conv2d(x, self.weight, self.styles(x, style), demodulate=self.demodulate)
        else:
            y, out_scale = self.convolve(x, style)
            y = (y * out_scale[:, :, None, None]).to(y.dtype)
        return in_format_of(y, x)

    def styles(self, x: Tensor, style: Tensor) -> Tensor:
        """What scales each input channel, the kernel's gain included: ``(B, C_in)``, no less precise than float32."""
        if style.ndim != 2 or style.shape[1] != self.style_channels or style.shape[0] != x.shape[0]:
            rule = f"(B, {self.style_channels}) with B = {x.shape[0]}"
            raise ValueError(f"style must be {rule}, got shape {tuple(style.shape)}")
        with without_autocast(x):
            dtype = torch.promote_types(at_least_float32(style).dtype, self.weight.dtype)
            weight, bias = self.modulation.weight.to(dtype), self.modulation.bias.to(dtype)
            return F.linear(style.to(dtype), weight * self.style_channels**-0.5, bias) * self.weight[0].numel() ** -0.5

    def convolve(self, x: Tensor, style: Tensor) -> tuple[Tensor, Tensor]:
        """Convolve, and return beside it the demodulation ``(B, C_out)`` that is left to what follows."""
        scales = modulate(self.weight, self.styles(x, style), demodulate=self.demodulate)
        if not x.is_meta and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        kernel, half = scales.weight.to(x.dtype), self.kernel_size // 2
        x = x * scales.in_scale.to(x.dtype)[:, :, None, None]
        if self.resample == "up":
            y = F.conv_transpose2d(x, kernel.transpose(0, 1), stride=2)
            y = _blurred(y, 2 - half, 2 - half, gain=4.0)
        elif self.resample == "down":
            # A row more below, so that an odd side rounds up. A column more than is kept: torch 2.13 on processors with
            # AMX reads beyond the map where a strided bfloat16 convolution is one pixel wide.
            y = F.conv2d(_blurred(x, half + 1, half + 2, right=half + 4), kernel, stride=2)[..., :-1]
        else:
            y = F.conv2d(x, kernel, padding=half)
        return y, scales.out_scale

    def extra_repr(self) -> str:
        out_channels = self.weight.shape[0]
        return f"{self.in_channels}, {out_channels}, {self.kernel_size}, {self.demodulate}, resample={self.resample!r}"


class ModulatedNoiseConv2d(nn.Module):
    r"""Modulated convolution, noise, bias and leaky ReLU: a layer of StyleGAN2's synthesis network.

    :math:`y = \sqrt{2} \, \mathrm{lrelu}(\mathrm{ModConv}(x, v) + a g n + b)`, what follows the convolution in one pass
    (`noise_bias_act`). Noise as `NoiseInjection` takes it.

    Shape:
        - x: ``(B, C_in, H, W)``
        - style: ``(B, S)``
        - noise, gate: as for `NoiseInjection`, of the size of what is returned
        - returns: as for `ModulatedConv2d`

    Args:
        in_channels: number of channels ``C_in``.
        out_channels: number of channels ``C_out``.
        style_channels: length of a style vector ``S``.
        kernel_size: odd.
        resample: "up", "down" or None.
        clamp: the largest magnitude of what is returned, or None.
        noise_clamp: the largest magnitude of noise, or None.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: as for `ModulatedConv2d` and `NoiseInjection`.

    Source:
        StyleGAN2 (arXiv:1912.04958), figure 2. State dicts in the layouts of rosinality's ``StyledConv`` load
        (``conv``, ``noise.weight``, ``activate.bias``) and of BasicSR's ``StyleConv`` (``modulated_conv``, ``weight``).

    >>> x, style = torch.randn(1, 8, 5, 7), torch.randn(1, 4)
    >>> ModulatedNoiseConv2d(8, 16, style_channels=4)(x, style, NoiseField(3)).shape
    torch.Size([1, 16, 5, 7])
    """

    tile_safe = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        style_channels: int,
        kernel_size: int = 3,
        resample: Resample | None = None,
        clamp: float | None = None,
        noise_clamp: float | None = None,
    ) -> None:
        super().__init__()
        if clamp is not None and not clamp > 0:
            raise ValueError(f"clamp must be above 0, got {clamp}")
        self.in_channels, self.clamp = in_channels, clamp
        options: dict[str, Any] = {"style_channels": style_channels, "kernel_size": kernel_size, "resample": resample}
        self.conv = ModulatedConv2d(in_channels, out_channels, **options)
        self.noise = NoiseInjection(clamp=noise_clamp)
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.receptive_radius, self.tile_multiple = self.conv.receptive_radius, self.conv.tile_multiple
        self.register_load_state_dict_pre_hook(_with_our_names)

    def forward(
        self, x: Tensor, style: Tensor, noise: Tensor | NoiseField | None = None, gate: Tensor | None = None
    ) -> Tensor:
        check_feature_map(x, self.in_channels, self)
        y, demodulation = self.conv.convolve(x, style)
        y = in_format_of(y, x)
        drawn = self.noise.draw(y, noise, gate)
        strength = None if drawn is None else self.noise.weight
        return noise_bias_act(y, self.bias, drawn, strength, demodulation, clamp=self.clamp)

    def extra_repr(self) -> str:
        return f"clamp={self.clamp}"


def _blurred(x: Tensor, before: int, after: int, *, right: int | None = None, gain: float = 1.0) -> Tensor:
    """Blur by 1, 3, 3, 1 along each side, with zeros, or with what a negative number crops, around the map."""
    taps = torch.tensor(TAPS, dtype=x.dtype, device=x.device) * (gain**0.5 / sum(TAPS))
    kernel = (taps[:, None] * taps).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(F.pad(x, (before, after if right is None else right, before, after)), kernel, groups=x.shape[1])


def _in_our_layout(block: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    weight = state.get(f"{prefix}weight")
    if weight is not None and weight.ndim == 5 and weight.shape[0] == 1:
        state[f"{prefix}weight"] = weight[0]
    for resampler in ("blur", "smooth"):
        state.pop(f"{prefix}{resampler}.kernel", None)


def _with_our_names(block: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for theirs in [key for key in state if key.startswith(f"{prefix}modulated_conv.")]:
        state[f"{prefix}conv.{theirs.removeprefix(f'{prefix}modulated_conv.')}"] = state.pop(theirs)
    for theirs, ours in {"activate.bias": "bias", "weight": "noise.weight"}.items():
        if f"{prefix}{theirs}" in state:
            state[f"{prefix}{ours}"] = state.pop(f"{prefix}{theirs}")
