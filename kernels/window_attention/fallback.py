"""Window attention in plain torch: windows of one extent at a time, through torch's fused attention.

Windows are copied to (B, windows, heads, pixels, d), a piece of the map at a time. Forward keeps no logits; backward
computes them anew, a piece at a time too, so that memory does not grow with them. Half precision is computed in
float32.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .fallback_windows import Group, border, groups
from .operands import EPSILON, Layout, Operands, expanded_bias, table_gradient

PIECE = 2**20
"""So many logits are held at once in backward, where one row of windows has no more."""

FORWARD_PIECE = 2**24
"""Windows of so many logits are copied at once in forward, which never holds the logits themselves."""


class Piece(NamedTuple):
    """Windows of one extent, of some images; `group` finds the same windows in other maps."""

    images: slice
    group: Group
    q: Tensor  # (B, windows, heads, pixels, d)
    k: Tensor  # (B, windows, heads, keys, d), the shared tokens last
    v: Tensor
    bias: Tensor | None  # (1, heads, pixels, keys); with one axis less torch's fused attention would keep logits


def forward(x: Operands, layout: Layout) -> tuple[Tensor, Tensor]:
    """Attend; see `Operands`. The second result is empty, since backward needs none."""
    y = torch.empty(x.queries.shape, dtype=x.qkv.dtype, device=x.qkv.device)
    for piece in _pieces(x, layout, FORWARD_PIECE):
        q, k = _directions(piece.q, layout), _directions(piece.k, layout)
        if x.logit_scale is not None:
            q = q * x.logit_scale[piece.images].to(x.dtype)[:, None, :, None, None]
        flat = (part.flatten(0, 1) for part in (q, k, piece.v))
        attended = F.scaled_dot_product_attention(*flat, attn_mask=piece.bias, scale=layout.scale)
        piece.group.write_queries(y[piece.images], attended)
    return y, y.new_empty(0)


def backward(
    x: Operands, layout: Layout, y: Tensor, _: Tensor, grad_y: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Differentiate; see `Operands`."""
    sums = _Gradients(x, layout)
    for piece in _pieces(x, layout, PIECE):
        of_y, result = (piece.group.queries(m[piece.images], layout.num_heads).to(x.dtype) for m in (grad_y, y))
        q = _directions(piece.q, layout) * _factor(x, layout, piece.images)
        k = _directions(piece.k, layout)
        logits = q @ k.transpose(-2, -1)
        weights = torch.softmax(logits if piece.bias is None else logits.add_(piece.bias), -1)
        of_v = weights.transpose(-2, -1) @ of_y
        of_weights = of_y @ piece.v.transpose(-2, -1)
        of_logits = of_weights.sub_((of_y * result).sum(-1, keepdim=True)).mul_(weights)
        sums.add(piece, of_logits, of_logits @ k, of_logits.transpose(-2, -1) @ q, of_v)
    return x.like({name: g for (name, g), needed in zip(sums.named(), wanted, strict=True) if needed and g is not None})


class _Gradients:
    """The gradients of all operands, summed over the pieces of the maps."""

    def __init__(self, x: Operands, layout: Layout) -> None:
        self.x, self.layout = x, layout
        self.maps = x._replace(qkv=_empty(x.qkv, x.dtype), kv=None if x.kv is None else _empty(x.kv, x.dtype))
        # Windows of keys that are those of the queries share no pixel: nothing need be added up.
        self.apart = list(layout.window) == list(layout.key_window) and not layout.zero_border
        keys = self.maps.keys_and_values
        self.keys = keys if self.apart else _bordered(keys.zero_(), layout)
        self.bias = None if x.bias_table is None else torch.zeros_like(expanded_bias(x.bias_table.to(x.dtype), layout))
        self.logit_scale, self.tokens = (None if t is None else torch.zeros_like(t, dtype=x.dtype) for t in x[3:])

    def add(self, piece: Piece, of_logits: Tensor, of_q: Tensor, of_k: Tensor, of_v: Tensor) -> None:
        """Add what comes from one piece; `of_q` and `of_k` belong to the vectors whose products are the logits."""
        images, group, q, k, *_ = piece
        keys = group.keys_per_window
        if self.bias is not None:
            part = group.crop(self.bias)
            part += of_logits[..., :keys].sum((0, 1)).view(part.shape)
        if self.logit_scale is not None:
            products = _directions(q, self.layout) * of_q
            self.logit_scale[images] += self.layout.scale * products.sum((1, 3, 4))
        of_q = of_q * _factor(self.x, self.layout, images)
        if self.layout.cosine:
            of_q, of_k = _through_directions(of_q, q), _through_directions(of_k, k)
        group.write_queries(self.maps.queries[images], of_q)
        put = group.write_queries if self.apart else group.add_keys
        for half, part in zip(self.keys[images].chunk(2, -1), (of_k, of_v), strict=True):
            put(half, part[..., :keys, :])
        if self.tokens is not None:
            of_kv = torch.cat([of_k[..., keys:, :], of_v[..., keys:, :]], 2)
            self.tokens[images] += of_kv.sum(1).transpose(1, 2).flatten(2)

    def named(self) -> Iterator[tuple[str, Tensor | None]]:
        """Return the gradients by the names of the operands."""
        if not self.apart:
            self.maps.keys_and_values.copy_(_within(self.keys, self.layout, self.x.qkv.shape[1:3]))
        table = None if self.bias is None else table_gradient(self.bias, self.layout)
        found = self.maps._replace(bias_table=table, logit_scale=self.logit_scale, tokens=self.tokens)
        return iter(found._asdict().items())


def _pieces(x: Operands, layout: Layout, most: int) -> Iterator[Piece]:
    heads, keys_and_values = layout.num_heads, _bordered(x.keys_and_values, layout)
    whole = None if x.bias_table is None else expanded_bias(x.bias_table.to(x.dtype), layout)
    shared = None
    if x.tokens is not None:
        shared = x.tokens.to(x.dtype).unflatten(-1, (2 * heads, -1)).transpose(1, 2)[:, None]
    for group in groups(layout, x.qkv.shape[1:3]):
        bias = None if whole is None else group.crop(whole).flatten(3).flatten(1, 2)[None]
        keys = group.keys_per_window + (0 if shared is None else shared.shape[3])
        if bias is not None:
            bias = F.pad(bias, (0, keys - bias.shape[-1]))
        logits = heads * group.rows.size * group.columns.size * keys
        for images, part in group.pieces(len(x.qkv), most // logits):
            q = part.queries(x.queries[images], heads).to(x.dtype)
            kv = part.keys(keys_and_values[images], 2 * heads).to(x.dtype)
            if shared is not None:
                kv = torch.cat([kv, shared[images].expand(-1, kv.shape[1], -1, -1, -1)], 3)
            k, v = kv.chunk(2, 2)
            yield Piece(images, part, q, k, v, bias)


def _factor(x: Operands, layout: Layout, images: slice) -> Tensor | float:
    if x.logit_scale is None:
        return layout.scale
    return layout.scale * x.logit_scale[images].to(x.dtype)[:, None, :, None, None]


def _directions(vectors: Tensor, layout: Layout) -> Tensor:
    return F.normalize(vectors, dim=-1, eps=EPSILON) if layout.cosine else vectors


def _through_directions(gradient: Tensor, vectors: Tensor) -> Tensor:
    """Differentiate `F.normalize`: what changes the length alone changes nothing, but of the shortest vectors."""
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    direction = (vectors / length.clamp_min(EPSILON)).masked_fill(length <= EPSILON, 0)
    return (gradient - direction * (direction * gradient).sum(-1, keepdim=True)) / length.clamp_min(EPSILON)


def _bordered(x: Tensor, layout: Layout) -> Tensor:
    """Surround a map with the zeros that keys reach, where such count as keys."""
    if not layout.zero_border:
        return x
    down, across = (border(axis) for axis in layout.axes(x.shape[1:3]))
    return F.pad(x, (0, 0, *across, *down))


def _within(x: Tensor, layout: Layout, size: Sequence[int]) -> Tensor:
    """View what `_bordered` surrounded."""
    if not layout.zero_border:
        return x
    (top, _), (left, _) = (border(axis) for axis in layout.axes(size))
    return x[:, top : top + size[0], left : left + size[1]]


def _empty(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)
