"""The definitions: a kernel of its own for each sample, and the epilogue step by step."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operand_rules import compute_dtype
from .operands import SLOPES, Operands


def modulated_conv2d_reference(
    x: Tensor, weight: Tensor, style: Tensor, *, demodulate: bool = True, eps: float = 1e-8
) -> Tensor:
    """Compute `modulated_conv2d` by its formula, sample by sample; see there for the contract."""
    dtype = compute_dtype(x)
    maps = []
    for one, scale in zip(x.to(dtype), style.to(dtype), strict=True):
        kernel = weight.to(dtype) * scale[:, None, None]
        if demodulate:
            total = kernel.square().sum((1, 2, 3), keepdim=True)
            expected = weight.to(dtype).square().sum((1, 2, 3), keepdim=True) * scale.square().mean()
            kernel = kernel * torch.where(expected > 0, total + eps * expected, 1).rsqrt()
        maps.append(F.conv2d(one[None], kernel, padding=weight.shape[2] // 2))
    return torch.cat(maps).to(x.dtype) if maps else x.new_empty(0, weight.shape[0], *x.shape[2:])


def noise_bias_act_reference(x: Operands, activation: str, gain: float, clamp: float | None) -> Tensor:
    """Compute `noise_bias_act` by its formula. Differentiable any number of times."""
    y, bias, noise, strength, demodulation = x.wide()
    if demodulation is not None:
        y = y * demodulation
    if noise is not None and strength is not None:
        y = y + strength * noise
    if bias is not None:
        y = y + bias
    y = gain * F.leaky_relu(y, SLOPES[activation])
    if clamp is not None:
        y = y.clamp(-clamp, clamp)
    return y.to(x.x.dtype)
