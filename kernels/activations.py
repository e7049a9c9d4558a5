"""The activations that kernels compute in the same pass as what comes before them, and their slopes."""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["relu", "leaky_relu", "gelu", "silu"]

LEAKY_SLOPE = 0.2

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "relu": F.relu,
    "leaky_relu": lambda z: F.leaky_relu(z, LEAKY_SLOPE),
    "gelu": F.gelu,
    "silu": F.silu,
}
"""By name; GELU is the exact one."""


def slope(z: Tensor, activation: str | None) -> Tensor | float:
    """Differentiate an activation at `z`, or where its sign suffices at its output."""
    if activation == "relu":
        return (z > 0).to(z.dtype)
    if activation == "leaky_relu":
        return torch.full_like(z, LEAKY_SLOPE).masked_fill_(z > 0, 1.0)
    if activation == "gelu":
        return 0.5 * (1 + torch.erf(z * math.sqrt(0.5))) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    if activation == "silu":
        gate = torch.sigmoid(z)
        return gate * (1 + z * (1 - gate))
    return 1.0
