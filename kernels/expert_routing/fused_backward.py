"""The experts in Triton, backward.

The hidden layer is computed again, and never written. One kernel has the gradients of the tokens and of their weights,
block by block as forward has them. Another has those of the experts: a program takes a block of the hidden layer of one
expert and goes over some of the assignments of that expert. Programs write their sums apart, and these are added up
afterwards in a fixed order: no atomics, the same bits each time, and zeros for an expert without tokens.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import processors
from ..fused_activations import activated, slope_at
from .fused import (
    Launch,
    _block_of_assignments,
    _first_layer,
    _preactivation,
    _rows_of,
    _second_layer,
    _store_rows,
    launch_of,
)
from .operands import DIFFERENTIABLE, Groups, Operands

PROGRAMS_PER_PROCESSOR = 4
"""The assignments of an expert are divided among programs until each multiprocessor has so many."""


@triton.jit
def _tokens_kernel(
    x_ptr, weights_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, grad_ptr, order_ptr, offsets_ptr, rows_ptr, gates_ptr,
    S: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Write the gradient of each assignment: of its token, and of its weight."""
    wide: tl.constexpr = rows_ptr.dtype.element_ty
    R: tl.constexpr = S.rows_block
    C: tl.constexpr = S.channels_block
    expert, a, there = _block_of_assignments(order_ptr, offsets_ptr, S)
    if expert >= S.experts:
        return
    x = _rows_of(x_ptr, a // S.slots, there, S)
    pull = _rows_of(grad_ptr, a // S.slots, there, S)
    c = tl.arange(0, S.channels_block)
    b2 = tl.load(b2_ptr + expert * S.channels + c, mask=c < S.channels, other=0.0).to(wide)
    of_gate = tl.sum(pull.to(wide) * b2[None, :], axis=1)
    sums = tl.zeros([R, C], wide)
    for start in range(0, S.hidden, S.hidden_block):
        h = start + tl.arange(0, S.hidden_block)
        w1 = _first_layer(w1_ptr, expert, h, S).to(x.dtype)
        w2 = _second_layer(w2_ptr, expert, h, S).to(x.dtype)
        z = _preactivation(x, w1, b1_ptr, expert, h, wide, S)
        of_hidden = tl.dot(pull, w2, input_precision="ieee", out_dtype=wide)
        of_gate += tl.sum(activated(z, ACTIVATION) * of_hidden, axis=1)
        of_z = (of_hidden * slope_at(z, ACTIVATION)).to(x.dtype)
        sums += tl.dot(of_z, w1, input_precision="ieee", out_dtype=wide)
    gate = tl.load(weights_ptr + a, mask=there, other=0.0).to(wide)
    _store_rows(rows_ptr, a, there, gate[:, None] * sums, S)
    tl.store(gates_ptr + a, of_gate, mask=there)


@triton.jit
def _parameters_kernel(
    x_ptr, weights_ptr, w1_ptr, b1_ptr, w2_ptr, grad_ptr, order_ptr, offsets_ptr, sums_ptr, parts,
    S: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Add up, over every `parts`-th block of the assignments of an expert, what its parameters get."""
    wide: tl.constexpr = sums_ptr.dtype.element_ty
    H: tl.constexpr = S.hidden_block
    C: tl.constexpr = S.channels_block
    across: tl.constexpr = (S.hidden + S.hidden_block - 1) // S.hidden_block
    program = tl.program_id(0)
    h = program % across * S.hidden_block + tl.arange(0, S.hidden_block)
    expert = (program // across % S.experts).to(tl.int64)
    part = (program // (across * S.experts)).to(tl.int64)
    c = tl.arange(0, S.channels_block)
    w1 = _first_layer(w1_ptr, expert, h, S).to(x_ptr.dtype.element_ty)
    w2 = _second_layer(w2_ptr, expert, h, S).to(x_ptr.dtype.element_ty)

    of_w1 = tl.zeros([H, C], wide)
    of_w2 = tl.zeros([H, C], wide)
    of_b1 = tl.zeros([H], wide)
    of_b2 = tl.zeros([C], wide)
    last = tl.load(offsets_ptr + expert + 1)
    for first in range(tl.load(offsets_ptr + expert) + part * S.rows_block, last, parts * S.rows_block):
        place = first + tl.arange(0, S.rows_block)
        a = tl.load(order_ptr + place, mask=place < last, other=0)
        x = _rows_of(x_ptr, a // S.slots, place < last, S)
        pull = _rows_of(grad_ptr, a // S.slots, place < last, S)
        gate = tl.load(weights_ptr + a, mask=place < last, other=0.0).to(wide)[:, None]
        z = _preactivation(x, w1, b1_ptr, expert, h, wide, S)
        of_z = gate * tl.dot(pull, w2, input_precision="ieee", out_dtype=wide) * slope_at(z, ACTIVATION)
        hidden = gate * activated(z, ACTIVATION)
        of_w1 += tl.dot(tl.trans(of_z.to(x.dtype)), x, input_precision="ieee", out_dtype=wide)
        of_w2 += tl.dot(tl.trans(hidden.to(x.dtype)), pull, input_precision="ieee", out_dtype=wide)
        of_b1 += tl.sum(of_z, axis=0)
        of_b2 += tl.sum(gate * pull.to(wide), axis=0)

    size: tl.constexpr = S.experts * S.hidden * S.channels
    sums_ptr += part * (2 * size + S.experts * (S.hidden + S.channels))
    at = (expert * S.hidden + h)[:, None] * S.channels + c[None, :]
    inside = (h < S.hidden)[:, None] & (c < S.channels)[None, :]
    tl.store(sums_ptr + at, of_w1, mask=inside)
    tl.store(sums_ptr + size + at, of_w2, mask=inside)
    tl.store(sums_ptr + 2 * size + expert * S.hidden + h, of_b1, mask=h < S.hidden)
    if program % across == 0:
        at_bias = sums_ptr + 2 * size + S.experts * S.hidden + expert * S.channels
        tl.store(at_bias + c, of_b2, mask=c < S.channels)


def _of_tokens(launch: Launch, groups: Groups, grad_y: Tensor, activation: str) -> dict[str, Tensor]:
    x, weights, indices, *experts = launch.operands
    rows = x.new_empty(indices.numel(), x.shape[1], dtype=launch.operands.dtype)
    gates = torch.zeros_like(weights, dtype=rows.dtype)
    _tokens_kernel[(launch.blocks,)](
        *(x, weights, *experts, grad_y, *groups, rows, gates, launch.sizes, activation), num_warps=launch.num_warps
    )
    return {"x": launch.combine(rows), "weights": gates}


def _of_parameters(launch: Launch, groups: Groups, grad_y: Tensor, activation: str) -> dict[str, Tensor]:
    x, weights, indices, w1, b1, w2, b2 = launch.operands
    sizes = launch.sizes
    programs = sizes.experts * triton.cdiv(sizes.hidden, sizes.hidden_block)
    blocks = triton.cdiv(indices.numel(), sizes.rows_block * sizes.experts)
    parts = max(1, min(blocks, triton.cdiv(PROGRAMS_PER_PROCESSOR * processors(x.device), programs)))
    counts = [v.numel() for v in (w1, w2, b1, b2)]
    sums = x.new_empty(parts, sum(counts), dtype=launch.operands.dtype)
    _parameters_kernel[(parts * programs,)](
        *(x, weights, w1, b1, w2, grad_y, *groups, sums, parts, sizes, activation), num_warps=launch.num_warps
    )
    of_w1, of_w2, of_b1, of_b2 = (part.sum(0) for part in sums.split(counts, 1))
    return {
        "w1": of_w1.view(w1.shape),
        "b1": of_b1.view(b1.shape),
        "w2": of_w2.view(w1.shape).mT,
        "b2": of_b2.view(b2.shape),
    }


def backward(
    x: Operands, groups: Groups, grad_y: Tensor, activation: str, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Differentiate; see `Operands`."""
    launch, pulls = launch_of(x), grad_y.to(x.x.dtype).contiguous()
    gradients: dict[str, Tensor] = {}
    with torch.cuda.device_of(x.x):
        if any(wanted[:2]):
            gradients |= _of_tokens(launch, groups, pulls, activation)
        if any(wanted[2:]):
            gradients |= _of_parameters(launch, groups, pulls, activation)
    asked = dict(zip(DIFFERENTIABLE, wanted, strict=True))
    return x.like({name: value for name, value in gradients.items() if asked[name]})
