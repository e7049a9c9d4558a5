"""Window attention in Triton, backward: logits are computed anew from what forward kept, block by block.

1. `_keys_kernel` takes a block of the keys of a window and goes over its queries: the gradients of keys and values. It
   walks over many windows of an image, since the gradient of the bias is a sum over all of them and stays in registers
   meanwhile. Where a window is one block, the gradient of its queries falls out too.
2. `_queries_kernel` takes a block of queries and goes over keys and tokens, where a window is several blocks.
3. `_tokens_kernel` takes a block of tokens and goes over the queries of many windows.

What several programs add to, the bias, tokens, the scale of logits, and keys that windows share, each writes apart, and
it is added up afterwards in a fixed order: no atomics, the same bits each time.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import processors
from .fused import (
    BLOCK,
    _bias,
    _block_of_keys,
    _block_of_queries,
    _factor,
    _inverse_length,
    _products,
    _read,
    _write,
    by_head,
    cut_of,
    in_one_dtype,
    map_of,
    maps_of,
    options,
    parameters,
    sizes_of,
    tokens_of,
)
from .operands import EPSILON, Layout, Operands, table_gradient

WARPS = 8
"""Of a program that goes over keys."""

WARPS_OF_WHOLE_WINDOWS = 16
"""The same in float32 where a window is one block: products without tensor cores hold their operands in registers,
which eight warps of a multiprocessor have too few of (`python -m benchmarks.hopper --only window_attention`)."""

PROGRAMS_PER_PROCESSOR = 4
"""The windows of an image are divided among programs until each multiprocessor has so many."""

BIAS_ELEMENTS = 16 * 32 * WARPS
"""So much of the gradient of the bias stays in the registers of a program; more would spill."""


@triton.jit
def _saved(grad, y, log_sum, batch, row, column, inside, head, wide: tl.constexpr, S: tl.constexpr):
    """Read the gradient of y, the part of it that the softmax takes off, and the logarithms of its sums."""
    g = _read(grad, batch, row, column, inside, head, S)
    delta = tl.sum(g.to(wide) * _read(y, batch, row, column, inside, head, S).to(wide), axis=1)
    address = log_sum.pointer + batch * log_sum.batch + head * log_sum.channel + row * log_sum.row + column
    return g, delta, tl.load(address, mask=inside, other=0.0)


@triton.jit
def _softmax_gradient(logits, log_sum, delta, grad, v, valid, wide: tl.constexpr):
    """Return the weights of values, and the gradient of the logits."""
    weights = tl.where(valid, tl.exp(logits - log_sum[:, None]), 0.0)
    of_weights = tl.dot(grad, tl.trans(v), input_precision="ieee", out_dtype=wide)
    # A key that has all the weight cannot get more: exactly zero, where the difference would be what was rounded off.
    return weights, tl.where(weights == 1.0, 0.0, weights * (of_weights - delta[:, None]))


@triton.jit
def _of_vectors(of_directions, vectors, inverse, wide: tl.constexpr, EPSILON: tl.constexpr, S: tl.constexpr):
    """Turn the gradient of directions into that of vectors; the shortest are divided by a constant."""
    if S.cosine:
        v = vectors.to(wide)
        longer = tl.where(inverse < 1.0 / EPSILON, inverse, 0.0)
        along = tl.sum(v * of_directions, axis=1) * longer * longer
        return (of_directions - v * along[:, None]) * inverse[:, None]
    else:
        return of_directions


@triton.jit
def _keys_kernel(
    q_map, k_map, v_map, y_map, grad_map, log_sum, table, logit_scale, rows, columns,
    of_q, of_k, of_v, of_bias, of_scale, per_program, programs_per_image,
    WITH_QUERIES: tl.constexpr, APART: tl.constexpr, QUERIES_BLOCKS: tl.constexpr, EPSILON: tl.constexpr,
    S: tl.constexpr,
):  # fmt: skip
    """Differentiate by one head of a block of keys, in some windows of an image."""
    wide: tl.constexpr = log_sum.pointer.dtype.element_ty
    QUERIES: tl.constexpr = S.queries_block
    KEYS: tl.constexpr = S.keys_block
    CHANNELS: tl.constexpr = S.channels_block
    keys_blocks: tl.constexpr = (S.key_rows * S.key_columns + S.keys_block - 1) // S.keys_block
    head, program = tl.program_id(0) % S.heads, tl.program_id(0) // S.heads
    block, part = program % keys_blocks, program // keys_blocks
    batch = (part // programs_per_image).to(tl.int64)
    first = part % programs_per_image * per_program
    factor = _factor(logit_scale, batch, head, wide, S)
    biases = ()
    for _ in tl.static_range(QUERIES_BLOCKS):
        biases = biases + (tl.zeros([QUERIES, KEYS], wide),)  # noqa: RUF005
    products_sum = tl.zeros([QUERIES, KEYS], wide)

    for window in range(first, tl.minimum(first + per_program, rows.windows * columns.windows)):
        key_i, key_j, y, x, there, seen = _block_of_keys(rows, columns, window, block, S)
        k = _read(k_map, batch, y, x, there, head, S)
        v = _read(v_map, batch, y, x, there, head, S)
        k_inverse = _inverse_length(k, wide, EPSILON, S)
        k_gradient = tl.zeros([KEYS, CHANNELS], wide)
        v_gradient = tl.zeros([KEYS, CHANNELS], wide)
        updated = ()
        for queries in tl.static_range(QUERIES_BLOCKS):
            i, j, row, column, inside = _block_of_queries(rows, columns, window, queries, S)
            q = _read(q_map, batch, row, column, inside, head, S)
            grad, delta, sums = _saved(grad_map, y_map, log_sum, batch, row, column, inside, head, wide, S)
            q_inverse = _inverse_length(q, wide, EPSILON, S)
            products = _products(q, k, q_inverse, k_inverse, wide, S)
            valid = inside[:, None] & seen[None, :]
            logits = factor * products
            if table is not None:
                logits += _bias(table, head, i, j, key_i, key_j, valid, wide, S)
            weights, of_logits = _softmax_gradient(logits, sums, delta, grad, v, valid, wide)
            if table is not None:
                updated = updated + (biases[queries] + of_logits,)  # noqa: RUF005
            if logit_scale is not None:
                products_sum += of_logits * products
            v_gradient += tl.dot(tl.trans(weights.to(grad.dtype)), grad, input_precision="ieee", out_dtype=wide)
            turned = (of_logits * q_inverse[:, None]).to(q.dtype) if S.cosine else of_logits.to(q.dtype)
            k_gradient += tl.dot(tl.trans(turned), q, input_precision="ieee", out_dtype=wide)
            if WITH_QUERIES:
                turned = (of_logits * k_inverse[None, :]).to(k.dtype) if S.cosine else of_logits.to(k.dtype)
                q_gradient = factor * tl.dot(turned, k, input_precision="ieee", out_dtype=wide)
                q_gradient = _of_vectors(q_gradient, q, q_inverse, wide, EPSILON, S)
                _write(of_q, q_gradient, batch, row, column, inside, head, S)
        if table is not None:
            biases = updated
        k_gradient = _of_vectors(factor * k_gradient, k, k_inverse, wide, EPSILON, S)
        if APART:
            slot = block * S.keys_block + tl.arange(0, S.keys_block)
            y, x, there = window + slot * 0, slot, slot < S.key_rows * S.key_columns
        _write(of_k, k_gradient, batch, y, x, there, head, S)
        _write(of_v, v_gradient, batch, y, x, there, head, S)

    if table is not None:
        key = block * S.keys_block + tl.arange(0, S.keys_block)[None, :]
        start = of_bias + (part.to(tl.int64) * S.heads + head) * S.rows * S.columns * S.key_rows * S.key_columns
        for queries in tl.static_range(QUERIES_BLOCKS):
            query = queries * S.queries_block + tl.arange(0, S.queries_block)[:, None]
            real = (query < S.rows * S.columns) & (key < S.key_rows * S.key_columns)
            tl.store(start + query * (S.key_rows * S.key_columns) + key, biases[queries], mask=real)
    if logit_scale is not None:
        total = tl.sum(tl.sum(products_sum, axis=1), axis=0) * S.scale
        tl.store(of_scale + (part * S.heads + head) * keys_blocks + block, total)


@triton.jit
def _queries_kernel(
    q_map, k_map, v_map, y_map, grad_map, log_sum, table, logit_scale, token_k, token_v, tokens, rows, columns,
    of_q, QUERIES_BLOCKS: tl.constexpr, EPSILON: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Differentiate by one head of a block of queries."""
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
    grad, delta, sums = _saved(grad_map, y_map, log_sum, batch, row, column, inside, head, wide, S)
    gradient = tl.zeros([QUERIES, CHANNELS], wide)
    for key_block in range(0, tl.cdiv(S.key_rows * S.key_columns, S.keys_block)):
        key_i, key_j, y, x, there, seen = _block_of_keys(rows, columns, window, key_block, S)
        k = _read(k_map, batch, y, x, there, head, S)
        v = _read(v_map, batch, y, x, there, head, S)
        k_inverse = _inverse_length(k, wide, EPSILON, S)
        logits = factor * _products(q, k, q_inverse, k_inverse, wide, S)
        valid = inside[:, None] & seen[None, :]
        if table is not None:
            logits += _bias(table, head, i, j, key_i, key_j, valid, wide, S)
        _, of_logits = _softmax_gradient(logits, sums, delta, grad, v, valid, wide)
        turned = (of_logits * k_inverse[None, :]).to(k.dtype) if S.cosine else of_logits.to(k.dtype)
        gradient += tl.dot(turned, k, input_precision="ieee", out_dtype=wide)
    if tokens is not None:
        for first in range(0, tokens, S.keys_block):
            token = first + tl.arange(0, S.keys_block)
            there = token < tokens
            k = _read(token_k, batch, token * 0, token, there, head, S)
            v = _read(token_v, batch, token * 0, token, there, head, S)
            k_inverse = _inverse_length(k, wide, EPSILON, S)
            logits = factor * _products(q, k, q_inverse, k_inverse, wide, S)
            valid = inside[:, None] & there[None, :]
            _, of_logits = _softmax_gradient(logits, sums, delta, grad, v, valid, wide)
            turned = (of_logits * k_inverse[None, :]).to(k.dtype) if S.cosine else of_logits.to(k.dtype)
            gradient += tl.dot(turned, k, input_precision="ieee", out_dtype=wide)
    gradient = _of_vectors(factor * gradient, q, q_inverse, wide, EPSILON, S)
    _write(of_q, gradient, batch, row, column, inside, head, S)


@triton.jit
def _tokens_kernel(
    q_map, y_map, grad_map, log_sum, logit_scale, token_k, token_v, tokens, rows, columns,
    of_k, of_v, of_scale, per_program, programs_per_image, QUERIES_BLOCKS: tl.constexpr, EPSILON: tl.constexpr,
    S: tl.constexpr,
):  # fmt: skip
    """Differentiate by one head of a block of tokens, as far as some windows of an image see them."""
    wide: tl.constexpr = log_sum.pointer.dtype.element_ty
    QUERIES: tl.constexpr = S.queries_block
    KEYS: tl.constexpr = S.keys_block
    CHANNELS: tl.constexpr = S.channels_block
    blocks = tl.cdiv(tokens, S.keys_block)
    head, program = tl.program_id(0) % S.heads, tl.program_id(0) // S.heads
    block, part = program % blocks, (program // blocks).to(tl.int64)
    batch = part // programs_per_image
    first = (part % programs_per_image).to(tl.int32) * per_program
    factor = _factor(logit_scale, batch, head, wide, S)
    token = block * S.keys_block + tl.arange(0, S.keys_block)
    there = token < tokens
    k = _read(token_k, batch, token * 0, token, there, head, S)
    v = _read(token_v, batch, token * 0, token, there, head, S)
    k_inverse = _inverse_length(k, wide, EPSILON, S)
    k_gradient = tl.zeros([KEYS, CHANNELS], wide)
    v_gradient = tl.zeros([KEYS, CHANNELS], wide)
    products_sum = tl.zeros([QUERIES, KEYS], wide)
    last = tl.minimum(first + per_program, rows.windows * columns.windows)
    for step in range(first * QUERIES_BLOCKS, last * QUERIES_BLOCKS):
        window, queries = step // QUERIES_BLOCKS, step % QUERIES_BLOCKS
        _, _, row, column, inside = _block_of_queries(rows, columns, window, queries, S)
        q = _read(q_map, batch, row, column, inside, head, S)
        grad, delta, sums = _saved(grad_map, y_map, log_sum, batch, row, column, inside, head, wide, S)
        q_inverse = _inverse_length(q, wide, EPSILON, S)
        products = _products(q, k, q_inverse, k_inverse, wide, S)
        valid = inside[:, None] & there[None, :]
        weights, of_logits = _softmax_gradient(factor * products, sums, delta, grad, v, valid, wide)
        products_sum += of_logits * products
        v_gradient += tl.dot(tl.trans(weights.to(grad.dtype)), grad, input_precision="ieee", out_dtype=wide)
        turned = (of_logits * q_inverse[:, None]).to(q.dtype) if S.cosine else of_logits.to(q.dtype)
        k_gradient += tl.dot(tl.trans(turned), q, input_precision="ieee", out_dtype=wide)
    k_gradient = _of_vectors(factor * k_gradient, k, k_inverse, wide, EPSILON, S)
    _write(of_k, k_gradient, part, token * 0, token, there, head, S)
    _write(of_v, v_gradient, part, token * 0, token, there, head, S)
    if logit_scale is not None:
        total = tl.sum(tl.sum(products_sum, axis=1), axis=0) * S.scale
        tl.store(of_scale + (part * S.heads + head) * blocks + block, total)


def backward(
    x: Operands, layout: Layout, y: Tensor, log_sum: Tensor, grad_y: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Differentiate; see `Operands`."""
    call = _Call(in_one_dtype(x), layout, y, log_sum, grad_y)
    with torch.cuda.device_of(x.qkv):
        found = call.differentiate()
    return x.like({name: found[name] for name, needed in zip(x._fields, wanted, strict=True) if needed})


class _Share(NamedTuple):
    """How the windows of an image are divided among programs."""

    windows: int
    programs: int

    @classmethod
    def of(cls, windows: int, others: int, device: torch.device) -> "_Share":
        """Divide, where each part of the windows takes `others` programs."""
        wanted = max(1, min(windows, PROGRAMS_PER_PROCESSOR * processors(device) // max(1, others)))
        each = triton.cdiv(windows, wanted)
        return cls(each, triton.cdiv(windows, each))


class _Call:
    """One backward call: what its kernels share."""

    def __init__(self, x: Operands, layout: Layout, y: Tensor, log_sum: Tensor, grad_y: Tensor) -> None:
        self.x, self.layout, self.device = x, layout, x.qkv.device
        self.batch, height, width, _ = x.qkv.shape
        self.axes = layout.axes((height, width))
        self.windows = self.axes[0].windows * self.axes[1].windows
        self.saved = map_of(y), map_of(grad_y), by_head(log_sum)
        self.parameters = parameters(x)
        self.cuts = cut_of(self.axes[0]), cut_of(self.axes[1])
        self.of_maps = x._replace(
            qkv=torch.empty(x.qkv.shape, dtype=x.qkv.dtype, device=self.device),
            kv=None if x.kv is None else torch.empty(x.kv.shape, dtype=x.kv.dtype, device=self.device),
        )

    def differentiate(self) -> dict[str, Tensor | None]:
        """Return the gradients by name."""
        table, scales = self._by_keys()
        tokens = None
        if self.x.tokens is not None:
            tokens, more = self._by_tokens()
            scales = scales if scales is None or more is None else scales + more
        found = self.of_maps._replace(bias_table=table, logit_scale=scales, tokens=tokens)
        return found._asdict()

    def _by_keys(self) -> tuple[Tensor | None, Tensor | None]:
        """Differentiate by queries, keys and values; return the gradients of the table and of the scale of logits."""
        x, layout = self.x, self.layout
        queries, keys = math.prod(layout.window), math.prod(layout.key_window)
        block = BLOCK
        while x.bias_table is not None and block > 16 and queries * block > BIAS_ELEMENTS:
            block //= 2
        sizes = sizes_of(x, layout, block)
        share = _Share.of(self.windows, self.batch * sizes.heads * sizes.keys_blocks, self.device)
        parts = self.batch * share.programs
        with_queries = sizes.queries_blocks == sizes.keys_blocks == 1 and x.tokens is None
        whole = with_queries and x.qkv.element_size() == 4
        apart = queries != keys
        bias = None if x.bias_table is None else self._new(parts, sizes.heads, queries, keys)
        scales = None if x.logit_scale is None else self._new(parts, sizes.heads, sizes.keys_blocks)
        of_kv = self._new(self.batch, self.windows, keys, 2 * x.channels) if apart else self.of_maps.keys_and_values
        _keys_kernel[(parts * sizes.keys_blocks * sizes.heads,)](
            *(*maps_of(x), *self.saved, *self.parameters, *self.cuts, map_of(self.of_maps.queries)),
            *(*(map_of(part) for part in of_kv.chunk(2, -1)), bias, scales, share.windows, share.programs),
            WITH_QUERIES=with_queries, APART=apart, QUERIES_BLOCKS=sizes.queries_blocks, EPSILON=EPSILON, S=sizes,
            num_warps=WARPS_OF_WHOLE_WINDOWS if whole else WARPS, num_stages=1,
        )  # fmt: skip
        if apart:
            self.of_maps.keys_and_values.copy_(self._together(of_kv))
        if not with_queries:
            self._by_queries()
        table = (
            None if bias is None else table_gradient(bias.sum(0).view(-1, *layout.window, *layout.key_window), layout)
        )
        return table, self._sum_of_image(scales)

    def _by_queries(self) -> None:
        x, sizes = self.x, sizes_of(self.x, self.layout)
        _queries_kernel[(self.batch * self.windows * sizes.queries_blocks * sizes.heads,)](
            *(*maps_of(x), *self.saved, *self.parameters, *tokens_of(x), *self.cuts, map_of(self.of_maps.queries)),
            QUERIES_BLOCKS=sizes.queries_blocks, EPSILON=EPSILON, S=sizes, **options(x),
        )  # fmt: skip

    def _by_tokens(self) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of tokens and of the scale of logits."""
        x, sizes = self.x, sizes_of(self.x, self.layout)
        token_k, token_v, count = tokens_of(x)
        blocks = triton.cdiv(count, sizes.keys_block)
        share = _Share.of(self.windows, self.batch * sizes.heads * blocks, self.device)
        parts = self.batch * share.programs
        of_tokens = self._new(parts, count, 2 * x.channels)
        scales = None if x.logit_scale is None else self._new(parts, sizes.heads, blocks)
        _tokens_kernel[(parts * blocks * sizes.heads,)](
            *(maps_of(x)[0], *self.saved, *self.parameters[1:], token_k, token_v, count, *self.cuts),
            *(*(map_of(part) for part in of_tokens.chunk(2, -1)), scales, share.windows, share.programs),
            QUERIES_BLOCKS=sizes.queries_blocks, EPSILON=EPSILON, S=sizes, **options(x),
        )  # fmt: skip
        return of_tokens.unflatten(0, (self.batch, -1)).sum(1), self._sum_of_image(scales)

    def _together(self, of_kv: Tensor) -> Tensor:
        """Add up what windows left of the keys that they share: (B, H, W, 2C)."""
        strides, sides = self.layout.window, self.layout.key_window
        counts = [axis.windows for axis in self.axes]
        size = [(n - 1) * stride + side for n, stride, side in zip(counts, strides, sides, strict=True)]
        columns = of_kv.permute(0, 3, 2, 1).flatten(1, 2)  # (B, 2C * keys, windows)
        total = F.fold(columns, size, tuple(sides), stride=tuple(strides))
        (top, left), (height, width) = (axis.origin + axis.margin for axis in self.axes), self.x.qkv.shape[1:3]
        return total[:, :, top : top + height, left : left + width].permute(0, 2, 3, 1)

    def _sum_of_image(self, scales: Tensor | None) -> Tensor | None:
        return None if scales is None else scales.unflatten(0, (self.batch, -1)).sum((1, 3))

    def _new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.x.dtype, device=self.device)
