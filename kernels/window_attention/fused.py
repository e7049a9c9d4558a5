"""Window attention in Triton: forward, and what backward shares with it.

A program takes one head and a block of the queries of one window, and goes over the keys of that window, then over the
tokens that every window sees, with a running softmax: logits never leave the registers. Pixels are addressed where they
lie in the map, the bias where it lies in the table, both by arithmetic on their places in the window; a place beyond
the map is neither read nor written. Products are summed in float32, those of float64 in float64.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .operands import EPSILON, Axis, Layout, Operands

BLOCK = 64
"""A block has so many queries or keys at most."""

BYTES = 8192
"""A block of vectors takes so much at most, where it has more than 16."""

HIDDEN = tl.constexpr(-1e30)
"""The logit of a key that is not there; finite, since a block may hold no other."""


class Map(NamedTuple):
    """A map as the kernels read it: its strides along batch, rows, columns and channels. Tokens are one row."""

    pointer: Tensor
    batch: int
    row: int
    column: int
    channel: int


class Cut(NamedTuple):
    """How windows cut an axis; see `Axis`."""

    length: int
    windows: int
    origin: int
    dilation: int


class Sizes(NamedTuple):
    """What a kernel is compiled for."""

    rows: int
    columns: int
    key_rows: int
    key_columns: int
    heads: int
    head_dim: int
    queries_block: int
    keys_block: int
    channels_block: int
    scale: float  # which as an argument would be rounded to float32
    cosine: bool
    zero_border: bool

    @property
    def queries_blocks(self) -> int:
        """How many blocks of queries a window has."""
        return triton.cdiv(self.rows * self.columns, self.queries_block)

    @property
    def keys_blocks(self) -> int:
        """How many blocks of keys a window has."""
        return triton.cdiv(self.key_rows * self.key_columns, self.keys_block)


@triton.jit
def _pixels(cut, window, place, WINDOW: tl.constexpr):
    """Return the pixels at some places of a window along an axis, and which of them are in the map."""
    token = window // cut.dilation * WINDOW - cut.origin + place
    pixel = token * cut.dilation + window % cut.dilation
    return pixel, (token >= 0) & (pixel < cut.length)


@triton.jit
def _block_of_queries(rows, columns, window, block, S: tl.constexpr):
    """Return the places of a block in its window, their pixels, and which of these are in the map."""
    slot = block * S.queries_block + tl.arange(0, S.queries_block)
    i, j = slot // S.columns, slot % S.columns
    y, y_inside = _pixels(rows, window // columns.windows, i, S.rows)
    x, x_inside = _pixels(columns, window % columns.windows, j, S.columns)
    return i, j, y, x, (slot < S.rows * S.columns) & y_inside & x_inside


@triton.jit
def _block_of_keys(rows, columns, window, block, S: tl.constexpr):
    """Return the same of keys, and which of them count."""
    slot = block * S.keys_block + tl.arange(0, S.keys_block)
    i, j = slot // S.key_columns, slot % S.key_columns
    y, y_inside = _pixels(rows, window // columns.windows, i - (S.key_rows - S.rows) // 2, S.rows)
    x, x_inside = _pixels(columns, window % columns.windows, j - (S.key_columns - S.columns) // 2, S.columns)
    real = slot < S.key_rows * S.key_columns
    inside = real & y_inside & x_inside
    if S.zero_border:
        return i, j, y, x, inside, real
    else:
        return i, j, y, x, inside, inside


@triton.jit
def _at(map, batch, y, x, head, S: tl.constexpr):
    """Return the addresses of a head of some pixels, and which of its channels there are."""
    channel = tl.arange(0, S.channels_block)
    pixel = y.to(tl.int64) * map.row + x.to(tl.int64) * map.column
    first = map.pointer + batch * map.batch + (head * S.head_dim).to(tl.int64) * map.channel
    return first + pixel[:, None] + (channel.to(tl.int64) * map.channel)[None, :], (channel < S.head_dim)[None, :]


@triton.jit
def _read(map, batch, y, x, inside, head, S: tl.constexpr):
    """Read a head of some pixels: (pixels, d), zero beyond the map."""
    address, channels = _at(map, batch, y, x, head, S)
    return tl.load(address, mask=inside[:, None] & channels, other=0.0)


@triton.jit
def _write(map, value, batch, y, x, inside, head, S: tl.constexpr):
    """Write a head of some pixels."""
    address, channels = _at(map, batch, y, x, head, S)
    tl.store(address, value.to(map.pointer.dtype.element_ty), mask=inside[:, None] & channels)


@triton.jit
def _inverse_length(vectors, wide: tl.constexpr, EPSILON: tl.constexpr, S: tl.constexpr):
    """Return 1 / max(length, EPSILON) where directions are compared, else 1."""
    if S.cosine:
        v = vectors.to(wide)
        return 1.0 / tl.maximum(tl.sqrt(tl.sum(v * v, axis=1)), EPSILON)
    else:
        return tl.full([vectors.shape[0]], 1.0, wide)


@triton.jit
def _products(q, k, q_inverse, k_inverse, wide: tl.constexpr, S: tl.constexpr):
    """Return what the factor of the logits multiplies."""
    products = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=wide)
    if S.cosine:
        products = products * q_inverse[:, None] * k_inverse[None, :]
    return products


@triton.jit
def _bias(table, head, i, j, key_i, key_j, seen, wide: tl.constexpr, S: tl.constexpr):
    """Look up the bias of a block of queries and keys in the table, (offsets, heads)."""
    offset = (i[:, None] - key_i[None, :] + (S.key_rows - 1)) * (S.columns + S.key_columns - 1)
    offset += j[:, None] - key_j[None, :] + (S.key_columns - 1)
    return tl.load(table + offset * S.heads + head, mask=seen, other=0.0).to(wide)


@triton.jit
def _factor(logit_scale, batch, head, wide: tl.constexpr, S: tl.constexpr):
    """Return what multiplies the products of an image and a head."""
    factor = tl.full([], S.scale, wide)
    if logit_scale is not None:
        factor = factor * tl.load(logit_scale + batch * S.heads + head).to(wide)
    return factor


@triton.jit
def _absorb(state, logits, v, wide: tl.constexpr):
    """Take a block of keys into the running softmax: largest logit, sum of exponentials, and their sum with values."""
    largest, total, y = state
    new = tl.maximum(largest, tl.max(logits, axis=1))
    weights = tl.exp(logits - new[:, None])
    decay = tl.exp(largest - new)
    total = total * decay + tl.sum(weights, axis=1)
    y = y * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee", out_dtype=wide)
    return new, total, y


@triton.jit
def _forward_kernel(
    q_map, k_map, v_map, y_map, log_sum, table, logit_scale, token_k, token_v, tokens, rows, columns,
    QUERIES_BLOCKS: tl.constexpr, EPSILON: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Attend for one head of a block of queries."""
    wide: tl.constexpr = log_sum.pointer.dtype.element_ty
    QUERIES: tl.constexpr = S.queries_block
    CHANNELS: tl.constexpr = S.channels_block
    head, program = tl.program_id(0) % S.heads, tl.program_id(0) // S.heads
    block, program = program % QUERIES_BLOCKS, program // QUERIES_BLOCKS
    windows = rows.windows * columns.windows
    window, batch = program % windows, (program // windows).to(tl.int64)
    factor = _factor(logit_scale, batch, head, wide, S)

    i, j, row, column, inside = _block_of_queries(rows, columns, window, block, S)
    q = _read(q_map, batch, row, column, inside, head, S)
    q_inverse = _inverse_length(q, wide, EPSILON, S)
    state = (
        tl.full([QUERIES], HIDDEN, wide),
        tl.zeros([QUERIES], wide),
        tl.zeros([QUERIES, CHANNELS], wide),
    )
    for key_block in range(0, tl.cdiv(S.key_rows * S.key_columns, S.keys_block)):
        key_i, key_j, y, x, there, seen = _block_of_keys(rows, columns, window, key_block, S)
        k = _read(k_map, batch, y, x, there, head, S)
        logits = factor * _products(q, k, q_inverse, _inverse_length(k, wide, EPSILON, S), wide, S)
        if table is not None:
            logits += _bias(table, head, i, j, key_i, key_j, inside[:, None] & seen[None, :], wide, S)
        logits = tl.where(seen[None, :], logits, HIDDEN)
        state = _absorb(state, logits, _read(v_map, batch, y, x, there, head, S), wide)
    if tokens is not None:
        for first in range(0, tokens, S.keys_block):
            token = first + tl.arange(0, S.keys_block)
            k = _read(token_k, batch, token * 0, token, token < tokens, head, S)
            logits = factor * _products(q, k, q_inverse, _inverse_length(k, wide, EPSILON, S), wide, S)
            logits = tl.where((token < tokens)[None, :], logits, HIDDEN)
            state = _absorb(state, logits, _read(token_v, batch, token * 0, token, token < tokens, head, S), wide)

    largest, total, y = state
    _write(y_map, y / total[:, None], batch, row, column, inside, head, S)
    address = log_sum.pointer + batch * log_sum.batch + head * log_sum.channel + row * log_sum.row + column
    tl.store(address, largest + tl.log(total), mask=inside)


def map_of(x: Tensor) -> Map:
    """Read (B, H, W, F), or tokens (B, G, F)."""
    if x.ndim == 3:
        return Map(x, x.stride(0), 0, x.stride(1), x.stride(2))
    return Map(x, *x.stride())


def by_head(x: Tensor) -> Map:
    """Read (B, heads, H, W)."""
    batch, head, row, column = x.stride()
    return Map(x, batch, row, column, head)


def cut_of(axis: Axis) -> Cut:
    """Read how windows cut an axis."""
    return Cut(axis.length, axis.windows, axis.origin, axis.dilation)


def sizes_of(x: Operands, layout: Layout, block: int = BLOCK) -> Sizes:
    """Choose what a kernel is compiled for: whole windows in a block where they fit, else blocks of so many places.

    Blocks of long vectors have fewer, so that shared memory holds them on small cards too; `block` bounds the keys.
    """
    (rows, columns), (key_rows, key_columns) = layout.window, layout.key_window
    head_dim = x.channels // layout.num_heads
    queries, keys, channels = (
        max(16, triton.next_power_of_2(n)) for n in (rows * columns, key_rows * key_columns, head_dim)
    )
    most = max(16, min(BLOCK, BYTES // (channels * x.qkv.element_size())))
    return Sizes(
        *(rows, columns, key_rows, key_columns, layout.num_heads, head_dim),
        *(min(most, queries), min(most, block, keys), channels, layout.scale, layout.cosine, layout.zero_border),
    )


def options(x: Operands) -> dict[str, int]:
    """Choose the warps of a program: so many that nothing spills, nor does it with one stage, at the usual sizes."""
    return {"num_warps": 4 if x.qkv.element_size() == 2 else 8, "num_stages": 1}


def parameters(x: Operands) -> tuple[Tensor | None, Tensor | None]:
    """Return what the kernels read by arithmetic: the table and the scale of logits."""
    table, logit_scale = (None if t is None else t.contiguous() for t in (x.bias_table, x.logit_scale))
    return table, logit_scale


def in_one_dtype(x: Operands) -> Operands:
    """Cast what is multiplied to the dtype of the queries, where it has another."""
    return x._replace(
        **{name: None if t is None else t.to(x.qkv.dtype) for name, t in (("kv", x.kv), ("tokens", x.tokens))}
    )


def maps_of(x: Operands) -> tuple[Map, Map, Map]:
    """Read queries, keys and values."""
    return map_of(x.queries), *(map_of(part) for part in x.keys_and_values.chunk(2, -1))


def tokens_of(x: Operands) -> tuple[Map | None, Map | None, int | None]:
    """Read the keys and the values of tokens, and how many there are."""
    if x.tokens is None:
        return None, None, None
    k, v = x.tokens.chunk(2, -1)
    return map_of(k), map_of(v), x.tokens.shape[1]


def forward(x: Operands, layout: Layout) -> tuple[Tensor, Tensor]:
    """Attend; see `Operands`."""
    x = in_one_dtype(x)
    batch, height, width, channels = x.queries.shape
    y = torch.empty(batch, height, width, channels, dtype=x.qkv.dtype, device=x.qkv.device)
    log_sum = torch.empty(batch, layout.num_heads, height, width, dtype=x.dtype, device=x.qkv.device)
    rows, columns = layout.axes((height, width))
    sizes = sizes_of(x, layout)
    programs = batch * rows.windows * columns.windows * sizes.queries_blocks * sizes.heads
    with torch.cuda.device_of(x.qkv):
        _forward_kernel[(programs,)](
            *(*maps_of(x), map_of(y), by_head(log_sum), *parameters(x), *tokens_of(x)),
            *(cut_of(rows), cut_of(columns)),
            QUERIES_BLOCKS=sizes.queries_blocks, EPSILON=EPSILON, S=sizes, **options(x),
        )  # fmt: skip
    return y, log_sum


def backward(
    x: Operands, layout: Layout, y: Tensor, log_sum: Tensor, grad_y: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Differentiate; see `Operands`."""
    from . import fused_backward

    return fused_backward.backward(x, layout, y, log_sum, grad_y, wanted)
