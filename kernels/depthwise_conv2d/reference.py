"""The definition of the depthwise convolution: one loop over the taps of the kernel."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import ACTIVATIONS, Activation
from ..operand_rules import compute_dtype


def depthwise_conv2d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: Activation | None = None
) -> Tensor:
    """Compute `depthwise_conv2d` by its formula; see there for the contract. Differentiable any number of times."""
    dtype = compute_dtype(x)
    height, width = x.shape[2:]
    rows, columns = weight.shape[2:]
    padded = F.pad(x.to(dtype), (columns // 2, columns // 2, rows // 2, rows // 2))
    y = torch.zeros_like(x, dtype=dtype)
    for i in range(rows):
        for j in range(columns):
            y = y + weight[:, 0, i, j].to(dtype)[:, None, None] * padded[:, :, i : i + height, j : j + width]
    if bias is not None:
        y = y + bias.to(dtype)[:, None, None]
    return ACTIVATIONS[activation](y).to(x.dtype)
