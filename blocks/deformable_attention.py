"""Attention to few samples of the map, at places that follow from its content: for maps of low resolution."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.memory_format import channels_last, in_format_of
from .checks import check_feature_map, check_heads, check_odd, check_positive
from .norm import LayerNorm2d
from .precision import at_least_float32
from .sampling import bilinear_samples

BIAS_WIDTH = 64
"""Numbers between the two layers of the position bias."""


class DeformableAttention2d(nn.Module):
    r"""Attend from each pixel to samples of the whole map, whose places the map itself moves off a regular grid.

    .. math::
        y = W_{out} \, \mathrm{softmax}(q k^T / \sqrt{d} + b) \, v, \qquad q = W_q x, \quad
        [k, v] = [W_k, W_v] \, x(p), \qquad p = \mathrm{clamp}(r + s \tanh(f(q)))

    The grid has a place for every `stride` x `stride` pixels, N = ceil(H / stride) ceil(W / stride) in all, in the
    middle of equal cells: :math:`r_i = (i + 1/2) H / H_k - 1/2` in pixels along a column, and so along a row. Each
    group of channels has offsets of its own, from the shared f: a depthwise convolution of that stride, LayerNorm,
    GELU and a 1x1 convolution. They reach s = `offset_range` cells at the most, and places are clamped to [0, H - 1]
    and [0, W - 1]: no sample lies outside the map, whatever is learned. :math:`x(p)` is bilinear. Offsets start at
    zero: a fresh block attends to the regular grid.

    The bias b is an MLP of :math:`\mathrm{sign}(\delta) \log_2(1 + |\delta|)`, with :math:`\delta` the pixels from
    sample to query along both axes: it holds for maps of any size. It is evaluated at whole pixels and interpolated
    between them, since samples lie between.

    Scores are H W x N for each head: this is for maps of low resolution. Places and bias are float32 for half-precision
    inputs. It is not `tile_safe`: `receptive_radius` is that of the depthwise convolution alone. Exported programs take
    maps with sides longer than `stride`: of one sample along a side torch makes a program of its own.

    Shape:
        - x: ``(B, C, H, W)``
        - logit_scale: ``(B, num_heads)``, by which q . k is multiplied
        - returns: ``(B, C, H, W)``, dtype and memory format kept

    Args:
        channels: number of channels ``C``.
        num_heads: heads that the channels are shared out to, one after the other, with ``d = C / num_heads``.
        groups: groups of channels that are sampled at places of their own, each of whole heads.
        stride: pixels between the places of the grid.
        kernel_size: odd size of the depthwise convolution.
        offset_range: how far a sample may move, in cells of the grid.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if a number is < 1, ``kernel_size`` is even, ``offset_range`` is not positive and finite,
            ``num_heads`` does not divide ``channels`` or is no multiple of ``groups``, the input has another number of
            channels, or ``logit_scale`` another shape.

    Source:
        Vision Transformer with Deformable Attention (arXiv:2201.00520), section 3.2, with places in the middle of
        cells; the bias interpolated as there, and its MLP of logarithms as in Swin Transformer V2 (arXiv:2111.09883),
        section 3.3.

    >>> DeformableAttention2d(8, num_heads=4, groups=2, stride=2)(torch.randn(1, 8, 5, 7)).shape
    torch.Size([1, 8, 5, 7])
    """

    tile_safe = False

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int = 1,
        groups: int = 1,
        stride: int = 1,
        kernel_size: int = 5,
        offset_range: float = 2.0,
    ) -> None:
        super().__init__()
        check_heads(channels, num_heads)
        check_positive(groups=groups, stride=stride)
        check_odd(kernel_size=kernel_size)
        if num_heads % groups:
            raise ValueError(f"num_heads must be a multiple of groups = {groups}, got {num_heads}")
        if not 0 < offset_range < math.inf:
            raise ValueError(f"offset_range must be positive and finite, got {offset_range}")
        self.channels = channels
        self.num_heads = num_heads
        self.groups = groups
        self.offset_range = offset_range
        self.tile_multiple = stride
        self.receptive_radius = kernel_size // 2
        inside = channels // groups
        last = nn.Conv2d(inside, 2, 1, bias=False)
        nn.init.zeros_(last.weight)
        self.proj_q = nn.Conv2d(channels, channels, 1)
        self.conv_offset = nn.Sequential(
            nn.Conv2d(inside, inside, kernel_size, stride=stride, padding=kernel_size // 2, groups=inside),
            LayerNorm2d(inside),
            nn.GELU(),
            last,
        )
        self.proj_kv = nn.Conv2d(channels, 2 * channels, 1)
        self.bias_mlp = nn.Sequential(nn.Linear(2, BIAS_WIDTH), nn.ReLU(), nn.Linear(BIAS_WIDTH, num_heads, bias=False))
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, logit_scale: Tensor | None = None) -> Tensor:
        check_feature_map(x, self.channels, self)
        q = self.proj_q(x)
        places = self._places(q)
        origin = places.new_zeros(())
        kv = self.proj_kv(bilinear_samples(x, places, origin, origin).to(x.dtype))
        (q_tokens,), (k, v) = self._tokens(q), self._tokens(kv)
        if logit_scale is not None:
            q_tokens = self._scaled(q_tokens, logit_scale)
        bias = self._bias(places, *x.shape[2:]).to(q.dtype)
        y = F.scaled_dot_product_attention(q_tokens, k, v, attn_mask=bias)
        # A copy, whichever kernel ran and whatever layout it left: exported, the view after it holds for all of them.
        y = y.transpose(1, 2).clone(memory_format=torch.contiguous_format).flatten(2)
        return in_format_of(self.proj_out(y.mT.unflatten(2, x.shape[2:])).to(x.dtype), x)

    def _tokens(self, x: Tensor) -> tuple[Tensor, ...]:
        """Part a map (B, n C, H, W) into n times (B, heads, H W, d)."""
        # Channels last, so that d lies close: CUDA's fused attention asks for it, a CPU's takes a third of the time.
        pixels = channels_last(x).permute(0, 2, 3, 1).flatten(1, 2)
        parts = pixels.unflatten(2, (-1, self.num_heads, self.channels // self.num_heads))
        return parts.permute(2, 0, 3, 1, 4).unbind()

    def _scaled(self, q: Tensor, logit_scale: Tensor) -> Tensor:
        """Queries (B, heads, H W, d) times a number for each image and head."""
        if logit_scale.shape != q.shape[:2]:
            wanted = f"(B, num_heads) = {tuple(q.shape[:2])}"
            raise ValueError(f"logit_scale must be {wanted}, got shape {tuple(logit_scale.shape)}")
        return (q * logit_scale[..., None, None]).to(q.dtype)

    def _places(self, q: Tensor) -> Tensor:
        """Where the samples lie, in pixels: (B, 2, g, Hk, Wk), along rows of pixels and then along columns."""
        offsets = self.conv_offset(q.unflatten(1, (self.groups, -1)).flatten(0, 1))
        offsets = self.offset_range * at_least_float32(offsets).tanh().unflatten(0, (-1, self.groups))
        across, down = offsets.unbind(2)
        rows, columns = (torch.arange(cells, device=q.device).to(offsets.dtype) + 0.5 for cells in offsets.shape[3:])
        columns = _in_pixels(columns + across, columns.shape[0], q.shape[3])
        rows = _in_pixels(rows[:, None] + down, rows.shape[0], q.shape[2])
        return torch.stack([columns, rows], dim=1)

    def _bias(self, places: Tensor, height: int, width: int) -> Tensor:
        """What is added to the scores (B, heads, H W, N) for the way from each sample to each query."""
        table = self.bias_mlp(_logarithms(height, width, places).to(self.proj_q.weight.dtype))
        table = at_least_float32(table).permute(2, 0, 1).expand(places.shape[0], -1, -1, -1)
        pixels = torch.arange(height * width, device=places.device)[:, None]
        row = pixels // width
        column = pixels - row * width
        origins = ((axis + side - 1).to(places.dtype) for axis, side in ((row, height), (column, width)))
        return bilinear_samples(table, -places.flatten(3)[:, :, :, None], *origins)

    def extra_repr(self) -> str:
        return f"{self.channels}, num_heads={self.num_heads}, groups={self.groups}, offset_range={self.offset_range}"


def _in_pixels(places: Tensor, cells: int, side: int) -> Tensor:
    """Bring places among so many cells to pixels of a map, and none to where it has no pixel."""
    return (places * side / cells - 0.5).clamp(0, side - 1)


def _logarithms(height: int, width: int, like: Tensor) -> Tensor:
    """Logarithms of all ways between two pixels (2 H - 1, 2 W - 1, 2), with their signs: down and across."""
    axes = [torch.arange(1 - side, side, device=like.device).to(like.dtype) for side in (height, width)]
    ways = torch.stack(torch.meshgrid(axes, indexing="ij"), dim=-1)
    return ways.sign() * (1 + ways.abs()).log2()
