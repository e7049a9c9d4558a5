"""Attention within windows that reaches further: over a grid through the map, and with tokens that stand for it."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from ..kernels.window_attention import window_attention
from .checks import check_choice, check_not_negative, check_shift
from .position_bias import PositionBias, position_bias
from .window_attention import Pair, Projections, pair


class GridAttention(Projections):
    r"""Let each pixel attend to a coarse grid through it, over the whole map: the grid attention of MaxViT, of any map.

    Every s-th pixel along an axis belongs together, with :math:`s = \lceil H / G \rceil` along the height and likewise
    across, so that a grid has G x G pixels at most: the cost is that of a window, the reach the whole map.

    It is not `tile_safe`: the grid of a tile is another than that of its image.

    Shape:
        - x: ``(B, C, H, W)``
        - logit_scale: ``(B, num_heads)``
        - returns: ``(B, C, H, W)``, dtype and memory format kept

    Args:
        channels: number of channels ``C``.
        num_heads: number of heads; it divides C.
        grid_size: height and width ``G`` of grids, or one number for both.
        bias: by offset in steps of the grid, as in `WindowAttention2d`.
        qkv_bias: whether queries, keys and values have one.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if ``num_heads`` does not divide ``channels``, a number is < 1, ``bias`` is another word, or the
            input has another number of channels.

    Source:
        MaxViT (arXiv:2204.01697), section 3.2; grids that do not divide the map are ours.

    >>> GridAttention(8, 2, grid_size=4)(torch.randn(1, 8, 5, 7)).shape
    torch.Size([1, 8, 5, 7])
    """

    tile_safe = False
    receptive_radius = 0
    tile_multiple = 1

    def __init__(
        self,
        channels: int,
        num_heads: int,
        *,
        grid_size: Pair = 8,
        bias: PositionBias | nn.Module | None = "table",
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(channels, num_heads, qkv_bias=qkv_bias)
        self.grid_size = pair("grid_size", grid_size)
        self.position_bias = position_bias(bias, num_heads, self.grid_size)

    def forward(self, x: Tensor, logit_scale: Tensor | None = None) -> Tensor:
        y = window_attention(
            self.projected(x),
            None if self.position_bias is None else self.position_bias(),
            num_heads=self.num_heads,
            window_size=self.grid_size,
            dilation=grid_steps(x, self.grid_size),
            logit_scale=logit_scale,
        )
        return self.returned(y, x)

    def extra_repr(self) -> str:
        return f"{self.channels}, {self.num_heads}, grid_size={self.grid_size}"


class HybridAttention(Projections):
    r"""Let each pixel attend to its window and, in the same softmax, to a few tokens that stand for the whole map.

    The tokens are the means of x over a g x g partition of the map, projected to keys and values as pixels are; they
    have no position bias. Windows are plain, or in some blocks of a net dilated or a grid, for reach in between.

    It is not `tile_safe`: the tokens of a tile are others than those of its image.

    Shape:
        - x: ``(B, C, H, W)``
        - logit_scale: ``(B, num_heads)``
        - returns: ``(B, C, H, W)``, dtype and memory format kept

    Args:
        channels: number of channels ``C``.
        num_heads: number of heads; it divides C.
        window_size: height and width of windows or grids, or one number for both.
        shift: where windows begin, from 0 to `window_size` - 1; 0 for a grid.
        form: "window", "dilated" (every second pixel, windows twice as wide) or "grid" (as in `GridAttention`).
        global_size: side ``g`` of the partition; 0 for no tokens.
        bias: by offset, as in `WindowAttention2d`.
        qkv_bias: whether queries, keys and values have one.

    Raises:
        TypeError: if the input is not floating point.
        ValueError: if ``num_heads`` does not divide ``channels``, a number is < 1 (``global_size`` < 0), ``shift`` is
            not less than ``window_size`` or given for a grid, ``form`` or ``bias`` is another word, or the input has
            another number of channels.

    Source:
        The combination is ours; pooled keys as in PVTv2 (arXiv:2106.13797), section 3.2, grids as in MaxViT
        (arXiv:2204.01697), section 3.2.

    >>> HybridAttention(8, 2, window_size=4, global_size=2)(torch.randn(1, 8, 5, 7)).shape
    torch.Size([1, 8, 5, 7])
    """

    tile_safe = False
    receptive_radius = 0

    def __init__(
        self,
        channels: int,
        num_heads: int,
        *,
        window_size: Pair = 8,
        shift: Pair = 0,
        form: Literal["window", "dilated", "grid"] = "window",
        global_size: int = 8,
        bias: PositionBias | nn.Module | None = "table",
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(channels, num_heads, qkv_bias=qkv_bias)
        check_choice("form", form, ("window", "dilated", "grid"))
        self.window_size, self.shift = pair("window_size", window_size), pair("shift", shift, least=0)
        if form == "grid" and any(self.shift):
            raise ValueError(f"shift must be 0 for a grid, got {self.shift}")
        check_shift(self.shift, self.window_size)
        check_not_negative(global_size=global_size)
        self.form, self.global_size = form, global_size
        # Windows of a tile are those of its image; a grid spans each anew.
        steps = {"window": 1, "dilated": 2, "grid": None}[form]
        self.tile_multiple = steps * math.lcm(*self.window_size) if steps else 1
        self.position_bias = position_bias(bias, num_heads, self.window_size)

    def forward(self, x: Tensor, logit_scale: Tensor | None = None) -> Tensor:
        qkv = self.projected(x)
        dilation = {"window": (1, 1), "dilated": (2, 2)}.get(self.form) or grid_steps(x, self.window_size)
        y = window_attention(
            qkv,
            None if self.position_bias is None else self.position_bias(),
            num_heads=self.num_heads,
            window_size=self.window_size,
            shift=self.shift,
            dilation=dilation,
            logit_scale=logit_scale,
            # The projection of a mean is the mean of projections.
            tokens=means_of_parts(qkv[..., self.channels :], self.global_size) if self.global_size else None,
        )
        return self.returned(y, x)

    def extra_repr(self) -> str:
        sizes = f"window_size={self.window_size}, shift={self.shift}, form={self.form!r}"
        return f"{self.channels}, {self.num_heads}, {sizes}, global_size={self.global_size}"


def grid_steps(x: Tensor, grid_size: tuple[int, int]) -> tuple[int, int]:
    """Return how far apart the pixels of a grid over a map (B, C, H, W) are."""
    rows, columns = ((n + g - 1) // g for n, g in zip(x.shape[2:], grid_size, strict=True))
    return rows, columns


def means_of_parts(x: Tensor, parts: int) -> Tensor:
    """Average (B, H, W, F) over each of parts x parts rectangles that cover it: (B, parts ** 2, F).

    As `F.adaptive_avg_pool2d`, whose exported form and whose gradient on a GPU are no match for two small products.
    """
    rows, columns = (_averages(n, parts, x) for n in x.shape[1:3])
    means = torch.einsum("ph,bhwf->bpwf", rows, x)
    return torch.einsum("qw,bpwf->bpqf", columns, means).flatten(1, 2)


def _averages(length: int, parts: int, like: Tensor) -> Tensor:
    """Return the weights of the pixels of an axis in each part: (parts, length)."""
    part, pixel = torch.arange(parts, device=like.device)[:, None], torch.arange(length, device=like.device)
    first, last = part * length // parts, ((part + 1) * length + parts - 1) // parts
    inside = (pixel >= first) & (pixel < last)
    return inside.to(like.dtype) / (last - first)
