"""Attention over channels: which of them matter, and which belong together, judged from the whole map."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..kernels.memory_format import in_format_of
from ..kernels.operand_rules import compute_dtype
from .checks import check_choice, check_feature_map, check_heads, check_odd, check_positive
from .precision import at_least_float32

AttentionForm = Literal["squeeze_excite", "efficient"]

# What lengths are at least: F.normalize's.
SHORTEST = 1e-12


class ChannelAttention(nn.Module):
    r"""Scale each channel by a number between 0 and 1 that follows from the means of all channels over the map.

    :math:`y_c = x_c \, \sigma(f(m))_c` with :math:`m_c` the mean of channel c over all pixels.
    "squeeze_excite": :math:`f(m) = W_2 \, \mathrm{relu}(W_1 m + b_1) + b_2` through C / r numbers.
    "efficient": :math:`f(m) = w * m`, a convolution of k weights along the channels. Parameters have the names and
    shapes of RCAN's `CALayer` and of ECA-Net's `eca_layer`.

    Means are taken in float32 for half-precision inputs. It is not `tile_safe`: a tile has other means than its image.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H, W)``, dtype and memory format kept.

    Args:
        channels: number of channels ``C``.
        form: "squeeze_excite" or "efficient".
        reduction: divisor ``r`` of the channels in between, of which at least one is left; "squeeze_excite" alone.
        kernel_size: odd number ``k`` of weights, "efficient" alone; without it, it grows with the logarithm of C:
            the odd number at or above the whole part of (log2(C) + 1) / 2.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if a number is < 1, ``form`` is another word, ``kernel_size`` is even or given for
            "squeeze_excite", or the input has another number of channels.

    Source:
        Squeeze-and-Excitation (arXiv:1709.01507), section 3, as in RCAN (arXiv:1807.02758), section 3.3; ECA-Net
        (arXiv:1910.03151), section 3.2.

    >>> ChannelAttention(32)(torch.randn(1, 32, 5, 7)).shape
    torch.Size([1, 32, 5, 7])
    """

    tile_safe = False
    receptive_radius = 0
    tile_multiple = 1

    def __init__(
        self,
        channels: int,
        *,
        form: AttentionForm = "squeeze_excite",
        reduction: int = 16,
        kernel_size: int | None = None,
    ) -> None:
        super().__init__()
        check_positive(channels=channels, reduction=reduction)
        check_choice("form", form, get_args(AttentionForm))
        self.channels = channels
        self.form = form
        if form == "efficient":
            kernel_size = int((math.log2(channels) + 1) / 2) | 1 if kernel_size is None else kernel_size
            check_odd(kernel_size=kernel_size)
            self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)
        elif kernel_size is not None:
            raise ValueError(f'kernel_size must be None unless form is "efficient", got {kernel_size}')
        else:
            hidden = max(channels // reduction, 1)
            self.conv_du = nn.Sequential(nn.Conv2d(channels, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map(x, self.channels, self)
        means = mean_of_map(x)
        if self.form == "efficient":
            scores = self.conv(means.flatten(2).mT).mT.unflatten(2, (1, 1))
        else:
            scores = self.conv_du(means)
        return x * torch.sigmoid(scores).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.channels}, form={self.form!r}"


class TransposedAttention(nn.Module):
    r"""Attention whose tokens are channels, at a cost linear in H W: the MDTA of Restormer, without norm and residual.

    .. math::
        [q, k, v] = W_d *_{dw} (W_{qkv} x), \qquad
        y = W_{out} \, \mathrm{softmax}\Big(\tau \frac{q k^T}{\lVert q \rVert \lVert k \rVert^T}\Big) v

    with q, k and v of C / heads channels by H W pixels for each head, the lengths of their channels taken over all
    pixels, and a learned :math:`\tau` for each head. Parameters have the names and shapes of Restormer's `Attention`.

    Lengths, cosines and softmax are float32 for half-precision inputs. It is not `tile_safe`: a tile has other cosines
    than its image, and `receptive_radius` is that of the convolution alone, the least overlap that tiles need.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H, W)``, dtype and memory format kept.

    Args:
        channels: number of channels ``C``.
        num_heads: heads that the channels are shared out to, one after the other.
        bias: whether the three convolutions have one.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if a number is < 1, ``num_heads`` does not divide ``channels``, or the input has another number of
            channels.

    Source:
        Restormer (arXiv:2111.09881), section 3.1.

    >>> TransposedAttention(8, num_heads=2)(torch.randn(1, 8, 5, 7)).shape
    torch.Size([1, 8, 5, 7])
    """

    tile_safe = False
    receptive_radius = 1
    tile_multiple = 1

    def __init__(self, channels: int, *, num_heads: int = 1, bias: bool = False) -> None:
        super().__init__()
        check_heads(channels, num_heads)
        self.channels = channels
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=bias)
        self.qkv_dwconv = nn.Conv2d(3 * channels, 3 * channels, 3, padding=1, groups=3 * channels, bias=bias)
        self.project_out = nn.Conv2d(channels, channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        check_feature_map(x, self.channels, self)
        qkv = self.qkv_dwconv(self.qkv(x))
        q, k, v = qkv.flatten(2).unflatten(1, (3, self.num_heads, -1)).unbind(1)  # (B, heads, C / heads, H W)
        logits = at_least_float32(self.temperature) * _cosines(q, k)
        y = logits.softmax(dim=-1).to(v.dtype) @ v
        y = y.flatten(1, 2).unflatten(2, x.shape[2:])
        return self.project_out(in_format_of(y, qkv)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.channels}, num_heads={self.num_heads}"


def _cosines(q: Tensor, k: Tensor) -> Tensor:
    """Cosines (..., c, c) of the rows of q and k (..., c, n), at least in float32."""
    wide = compute_dtype(q)
    lengths = [torch.linalg.vector_norm(t, dim=-1, keepdim=True, dtype=wide).clamp(min=SHORTEST) for t in (q, k)]
    if q.dtype == wide:
        # The products are divided, not q and k: two maps less are written, and kept for the gradient.
        return q @ k.mT / (lengths[0] * lengths[1].mT)
    # Sums of products of a large map are beyond float16, those of unit vectors are not.
    q, k = ((t / length).to(t.dtype) for t, length in zip((q, k), lengths, strict=True))
    return at_least_float32(q @ k.mT)


def mean_of_map(x: Tensor) -> Tensor:
    """Means (B, C, 1, 1) over all pixels, summed in float32 for half-precision maps."""
    # The gradient of a mean is a map of its own, and one of planes whatever the format of x; that of a sum is a view.
    total = x.sum((2, 3), keepdim=True, dtype=compute_dtype(x))
    return (total / (x.shape[2] * x.shape[3])).to(x.dtype)
