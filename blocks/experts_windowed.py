"""Experts that look at the cells of a map, each for itself: by attention, and by frequencies."""

import torch
from torch import Tensor, nn

from ..kernels.operand_rules import compute_dtype
from .checks import check_positive
from .experts import Expert
from .frequency_bands import dct_matrix
from .padding import cropped, pad_to_multiple
from .position_bias import PositionBias
from .precision import without_autocast
from .window_attention import WindowAttention2d


class AttentionExpert(Expert):
    r"""Structure: each pixel attends to those of its cell, :math:`y = \mathrm{attend}(x)` as `WindowAttention2d` does.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H, W)``, dtype and memory format kept.

    Args:
        channels: number of channels ``C``.
        num_heads: number of heads; it divides C.
        window_size: side of the cells; at level "window" those of `MoE2d` are multiples of it.
        bias: by offset, as in `WindowAttention2d`.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if ``num_heads`` does not divide ``channels``, a number is < 1, ``bias`` is another word, or the
            input has another number of channels.

    Source:
        Swin Transformer (arXiv:2103.14030), section 3.2.

    >>> AttentionExpert(8, 2, window_size=4)(torch.randn(1, 8, 5, 7)).shape
    torch.Size([1, 8, 5, 7])
    """

    def __init__(
        self, channels: int, num_heads: int, *, window_size: int = 8, bias: PositionBias | None = "table"
    ) -> None:
        super().__init__(channels)
        check_positive(window_size=window_size)
        self.tile_multiple = window_size
        self.attn = WindowAttention2d(channels, num_heads, window_size=window_size, bias=bias)

    def valid(self, x: Tensor) -> Tensor:
        return self.attn(x)


class FrequencyExpert(Expert):
    r"""Frequencies of each cell, weighted: :math:`y = W_o D^T \big(G \odot D (W_i x) D^T\big) D`.

    D is the orthonormal DCT-II of a cell, by matrix products alone, and G has a factor for every channel and frequency.
    A cell at the border that lies in the map in part is mirrored to its full size.

    Shape:
        ``(B, C, H, W)`` -> ``(B, C, H, W)``, dtype and memory format kept.

    Args:
        channels: number of channels ``C``.
        window_size: side of the cells; at level "window" those of `MoE2d` are multiples of it.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if a number is < 1, or the input has another number of channels.

    Source:
        The spectral gain of patches in FFTformer (arXiv:2211.12250), section 3.2, with the DCT, which has no seams.

    >>> FrequencyExpert(8, window_size=4)(torch.randn(1, 8, 5, 7)).shape
    torch.Size([1, 8, 5, 7])
    """

    def __init__(self, channels: int, *, window_size: int = 8) -> None:
        super().__init__(channels)
        check_positive(window_size=window_size)
        self.tile_multiple = window_size
        self.project_in = nn.Conv2d(channels, channels, 1)
        self.gain = nn.Parameter(torch.ones(channels, window_size, window_size))
        self.project_out = nn.Conv2d(channels, channels, 1)

    def valid(self, x: Tensor) -> Tensor:
        side = self.tile_multiple
        y = pad_to_multiple(self.project_in(x), side)
        with without_autocast(y):
            pixels = y.permute(0, 2, 3, 1).to(compute_dtype(y))
            transform, gain = dct_matrix(side, pixels), self.gain.permute(1, 2, 0)[:, None].to(pixels.dtype)
            rows = transform @ pixels.flatten(2).unflatten(1, (-1, side))
            spectra = transform @ rows.unflatten(3, (-1, side, self.channels)) * gain
            rows = (transform.mT @ spectra).flatten(3)
            pixels = (transform.mT @ rows).flatten(1, 2).unflatten(2, (-1, self.channels))
        y = pixels.permute(0, 3, 1, 2).to(y.dtype)
        return self.project_out(cropped(y, x.shape[2], x.shape[3]))
