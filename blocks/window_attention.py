"""Attention within windows, of any map: plain, shifted, dilated and overlapping."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..kernels.memory_format import in_format_of
from ..kernels.window_attention import overlapping_window_attention, window_attention
from .checks import check_feature_map, check_heads, check_shift
from .position_bias import PositionBias, position_bias
from .precision import at_least_float32

Pair = int | Sequence[int]

LARGEST_SCALE = math.log(100)
"""Of cosine logits, in the logarithm."""


class Projections(nn.Module):
    """What window attention of every kind shares: projections to queries, keys and values, and of what comes back."""

    def __init__(self, channels: int, num_heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        check_heads(channels, num_heads)
        self.channels, self.num_heads = channels, num_heads
        self.qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias)
        self.proj = nn.Linear(channels, channels)

    def projected(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H, W, 3C)."""
        check_feature_map(x, self.channels, self)
        return self.qkv(x.permute(0, 2, 3, 1))

    def returned(self, y: Tensor, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, C, H, W), in the dtype and the memory format of `x`."""
        return in_format_of(self.proj(y).permute(0, 3, 1, 2).to(x.dtype), x)


class WindowAttention2d(Projections):
    r"""Let each pixel attend to the pixels of its window, with several heads: the attention of Swin, of any map.

    .. math::
        [q, k, v] = W_{qkv} x + b, \qquad
        y_i = W_o \sum_{j \in W(i)} \mathrm{softmax}_j\big(\lambda \, q_i \cdot k_j / \sqrt d + b_{i - j}\big) v_j + b_o

    Windows begin at `shift` + n * `window_size`; one at the border is as much of a window as lies in the map. For sizes
    that windows divide this is what Swin, SwinIR, HAT and SCUNet compute with rolls and masks, and at all others what
    they mean to. With `cosine`, :math:`q \cdot k / \sqrt d` is the cosine of the angle between q and k times a learned
    scale of each head, at most 100.

    Shape:
        - x: ``(B, C, H, W)``
        - logit_scale: ``(B, num_heads)``
        - returns: ``(B, C, H, W)``, dtype and memory format kept

    Args:
        channels: number of channels ``C``.
        num_heads: number of heads; it divides C.
        window_size: height and width of windows, or one number for both.
        shift: where windows begin, from 0 to `window_size` - 1; half a window in every second block, as a rule.
        dilation: distance of neighbours in a window: windows see `dilation` times as far, at as many pixels.
        bias: by offset: "table" learns a number each, "cpb" computes it from the logarithm of the offset, "dynamic"
            from the offset; None leaves it out; a module returns the table, as those of `position_bias` do.
        cosine: compare directions, as Swin V2 does.
        qkv_bias: whether queries, keys and values have one.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if ``num_heads`` does not divide ``channels``, a number is < 1, ``shift`` is not less than
            ``window_size``, ``bias`` is another word, the input has another number of channels, or ``logit_scale``
            another shape.

    Source:
        Swin Transformer (arXiv:2103.14030), section 3.2; `cosine` and "cpb": Swin Transformer V2 (arXiv:2111.09883),
        sections 3.2 and 3.3; "dynamic": CrossFormer (arXiv:2108.00154), section 3.3.

    >>> WindowAttention2d(8, 2, window_size=4, shift=2)(torch.randn(1, 8, 5, 7)).shape
    torch.Size([1, 8, 5, 7])
    """

    tile_safe = True

    def __init__(
        self,
        channels: int,
        num_heads: int,
        *,
        window_size: Pair = 8,
        shift: Pair = 0,
        dilation: Pair = 1,
        bias: PositionBias | nn.Module | None = "table",
        cosine: bool = False,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(channels, num_heads, qkv_bias=qkv_bias)
        self.window_size, self.dilation = pair("window_size", window_size), pair("dilation", dilation)
        self.shift = pair("shift", shift, least=0)
        check_shift(self.shift, self.window_size)
        self.position_bias = position_bias(bias, num_heads, self.window_size)
        self.log_scale = nn.Parameter(torch.full((num_heads,), math.log(10))) if cosine else None
        spans = [w * d for w, d in zip(self.window_size, self.dilation, strict=True)]
        self.receptive_radius = max(s - d for s, d in zip(spans, self.dilation, strict=True))
        self.tile_multiple = math.lcm(*spans)

    def forward(self, x: Tensor, logit_scale: Tensor | None = None) -> Tensor:
        y = window_attention(
            self.projected(x),
            None if self.position_bias is None else self.position_bias(),
            num_heads=self.num_heads,
            window_size=self.window_size,
            shift=self.shift,
            dilation=self.dilation,
            logit_scale=self._scale(logit_scale),
            cosine=self.log_scale is not None,
        )
        return self.returned(y, x)

    def _scale(self, logit_scale: Tensor | None) -> Tensor | None:
        if self.log_scale is None:
            return logit_scale
        learned = at_least_float32(self.log_scale).clamp(max=LARGEST_SCALE).exp()
        if logit_scale is None:
            return learned
        if not isinstance(logit_scale, Tensor) or logit_scale.shape[-1:] != learned.shape:  # which would be spread
            got = f"shape {tuple(logit_scale.shape)}" if isinstance(logit_scale, Tensor) else repr(logit_scale)
            raise ValueError(f"logit_scale must be (B, num_heads) for {self.num_heads} heads, got {got}")
        return learned * logit_scale

    def extra_repr(self) -> str:
        cosine = ", cosine=True" if self.log_scale is not None else ""
        dilation = f", dilation={self.dilation}" if max(self.dilation) > 1 else ""
        return (
            f"{self.channels}, {self.num_heads}, window_size={self.window_size}, shift={self.shift}{dilation}{cosine}"
        )


class OverlappingCrossAttention(Projections):
    r"""Let each pixel attend to a window larger than its own, so that windows learn of their neighbours: HAT's.

    As `WindowAttention2d`, but keys and values come from a window that is larger by `overlap_ratio`, around the same
    middle. It is the attention of HAT's OCAB; the whole block is
    ``SwinBlock(C, OverlappingCrossAttention(C, heads, zero_border=True), mlp_ratio=2)``.

    Shape:
        - x: ``(B, C, H, W)``
        - logit_scale: ``(B, num_heads)``
        - returns: ``(B, C, H, W)``, dtype and memory format kept

    Args:
        channels: number of channels ``C``.
        num_heads: number of heads; it divides C.
        window_size: height and width of the windows of queries, or one number for both.
        overlap_ratio: windows of keys are larger by ``int(overlap_ratio * window_size)``, which must be even.
        bias: by offset, as in `WindowAttention2d`.
        zero_border: let keys beyond the map count as zeros, as HAT does; else there are none.
        qkv_bias: whether queries, keys and values have one.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if ``num_heads`` does not divide ``channels``, a number is < 1, windows of keys are larger by an odd
            number or an infinite one, ``bias`` is another word, or the input has another number of channels.

    Source:
        HAT (arXiv:2205.04437), section 3.2.

    >>> OverlappingCrossAttention(8, 2, window_size=4)(torch.randn(1, 8, 5, 7)).shape
    torch.Size([1, 8, 5, 7])
    """

    tile_safe = True

    def __init__(
        self,
        channels: int,
        num_heads: int,
        *,
        window_size: Pair = 16,
        overlap_ratio: float = 0.5,
        bias: PositionBias | nn.Module | None = "table",
        zero_border: bool = False,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(channels, num_heads, qkv_bias=qkv_bias)
        self.window_size = pair("window_size", window_size)
        if not 0 <= overlap_ratio < math.inf:
            raise ValueError(f"overlap_ratio must be at least 0 and finite, got {overlap_ratio}")
        extra = [int(overlap_ratio * w) for w in self.window_size]
        if any(more % 2 for more in extra):
            raise ValueError(f"overlap_ratio must enlarge {self.window_size} by even numbers, got {overlap_ratio}")
        rows, columns = (w + more for w, more in zip(self.window_size, extra, strict=True))
        self.key_window_size, self.zero_border = (rows, columns), zero_border
        self.position_bias = position_bias(bias, num_heads, self.window_size, self.key_window_size)
        self.receptive_radius = max(w - 1 + more // 2 for w, more in zip(self.window_size, extra, strict=True))
        self.tile_multiple = math.lcm(*self.window_size)

    def forward(self, x: Tensor, logit_scale: Tensor | None = None) -> Tensor:
        y = overlapping_window_attention(
            self.projected(x),
            None if self.position_bias is None else self.position_bias(),
            num_heads=self.num_heads,
            window_size=self.window_size,
            key_window_size=self.key_window_size,
            logit_scale=logit_scale,
            zero_border=self.zero_border,
        )
        return self.returned(y, x)

    def extra_repr(self) -> str:
        sizes = f"window_size={self.window_size}, key_window_size={self.key_window_size}"
        return f"{self.channels}, {self.num_heads}, {sizes}{', zero_border=True' if self.zero_border else ''}"


def pair(name: str, value: Pair, *, least: int = 1) -> tuple[int, int]:
    """Return height and width; one number stands for both."""
    both = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(both) != 2 or any(type(v) is not int or v < least for v in both):
        raise ValueError(f"{name} must be one or two integers of at least {least}, got {value!r}")
    return both[0], both[1]
