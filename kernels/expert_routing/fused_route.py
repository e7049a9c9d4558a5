"""The choice of experts in Triton, and the grouping of what was chosen: nothing is read on the host, no atomics.

Grouping counts, for each chunk of assignments, how many each expert has; adds these up over chunks; and then places
each assignment by what came before it, so that the order is stable and the same each time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operand_rules import compute_dtype, like
from .operands import Groups, lowest

TILE = 2048
"""A program of the choice has so many logits at most, where a token has fewer; one of the grouping twice as many."""


@triton.jit
def _logits(logits_ptr, tokens, EXPERTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Read the logits of some tokens: the tokens, the experts, and (ROWS, BLOCK)."""
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, BLOCK)[None, :]
    there = (t < tokens)[:, None] & (e < EXPERTS)
    logits = tl.load(logits_ptr + t[:, None] * EXPERTS + e, mask=there, other=0.0)
    return t, e, logits.to(WIDE)


@triton.jit
def _softmax_of_chosen(logits, chosen):
    """Return exponentials of the chosen logits, zero for others, and their sum."""
    most = tl.max(tl.where(chosen, logits, float("-inf")), axis=1)[:, None]
    powers = tl.where(chosen, tl.exp(tl.where(chosen, logits - most, 0.0)), 0.0)
    return powers, tl.sum(powers, axis=1)


@triton.jit
def _route_kernel(
    logits_ptr, bias_ptr, weights_ptr, indices_ptr, tokens,
    K: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    LOWEST: tl.constexpr,
):  # fmt: skip
    t, e, logits = _logits(logits_ptr, tokens, EXPERTS, ROWS, BLOCK, WIDE)
    powers, total = _softmax_of_chosen(logits, e < EXPERTS)  # NaN where a logit is
    scores = logits
    if bias_ptr is not None:
        scores = powers / total[:, None] + tl.load(bias_ptr + e, mask=e < EXPERTS, other=0.0).to(WIDE)
    scores = tl.where(scores != scores, float("inf"), scores)
    scores = tl.where(scores == float("-inf"), tl.full([1, 1], LOWEST, WIDE), scores)
    scores = tl.where(e < EXPERTS, scores, float("-inf"))
    chosen = e < 0
    picks = ()
    for slot in tl.static_range(K):
        best = tl.max(scores, axis=1)[:, None]
        pick = tl.min(tl.where(scores == best, e, BLOCK), axis=1)  # the first of equals
        tl.store(indices_ptr + t * K + slot, pick, mask=t < tokens)
        chosen = chosen | (e == pick[:, None])
        scores = tl.where(e == pick[:, None], float("-inf"), scores)
        picks = picks + (pick,)  # noqa: RUF005  (Triton knows no unpacking here)
    if K > 1:
        powers, chosen_total = _softmax_of_chosen(logits, chosen)
        total = tl.where(total == total, chosen_total, total)
    for slot in tl.static_range(K):
        weight = tl.sum(tl.where(e == picks[slot][:, None], powers, 0.0), axis=1) / total
        tl.store(weights_ptr + t * K + slot, weight.to(weights_ptr.dtype.element_ty), mask=t < tokens)


@triton.jit
def _route_backward_kernel(
    logits_ptr, indices_ptr, grad_ptr, gradient_ptr, tokens,
    K: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    t, e, logits = _logits(logits_ptr, tokens, EXPERTS, ROWS, BLOCK, WIDE)
    chosen = e < 0
    pulls = tl.zeros([ROWS, BLOCK], WIDE)
    for slot in tl.static_range(K):
        pick = tl.load(indices_ptr + t * K + slot, mask=t < tokens, other=0)[:, None]
        pull = tl.load(grad_ptr + t * K + slot, mask=t < tokens, other=0.0).to(WIDE)[:, None]
        pulls = tl.where(e == pick, pull, pulls)
        chosen = chosen | (e == pick)
    if K == 1:
        chosen = e < EXPERTS
    powers, total = _softmax_of_chosen(logits, chosen)
    weights = powers / total[:, None]
    gradient = weights * (pulls - tl.sum(pulls * weights, axis=1)[:, None])
    gradient = tl.where(chosen, gradient, 0.0).to(gradient_ptr.dtype.element_ty)
    there = (t < tokens)[:, None] & (e < EXPERTS)
    tl.store(gradient_ptr + t[:, None] * EXPERTS + e, gradient, mask=there)


@triton.jit
def _keys(indices_ptr, assignments, EXPERTS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Return a chunk of assignments, and whose they are: (CHUNK, BLOCK). Column EXPERTS is nobody."""
    a = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    key = tl.load(indices_ptr + a, mask=a < assignments, other=-1)
    key = tl.where((key >= 0) & (key < EXPERTS), key, EXPERTS)
    owned = (key[:, None] == tl.arange(0, BLOCK)[None, :]) & (a < assignments)[:, None]
    return a, owned.to(tl.int32)


@triton.jit
def _count_kernel(
    indices_ptr, counts_ptr, assignments, EXPERTS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    _, owned = _keys(indices_ptr, assignments, EXPERTS, CHUNK, BLOCK)
    tl.store(counts_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.sum(owned, axis=0))


@triton.jit
def _scan_kernel(counts_ptr, offsets_ptr, chunks, EXPERTS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """Turn the counts of each chunk into those of all before it, and add up where each expert begins. One program."""
    e = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for first in range(0, chunks, CHUNKS):
        chunk = first + tl.arange(0, CHUNKS)
        at = counts_ptr + chunk[:, None] * BLOCK + e[None, :]
        counts = tl.load(at, mask=(chunk < chunks)[:, None], other=0)
        tl.store(at, total[None, :] + tl.cumsum(counts, axis=0) - counts, mask=(chunk < chunks)[:, None])
        total += tl.sum(counts, axis=0)
    tl.store(offsets_ptr + e, tl.cumsum(total, axis=0) - total, mask=e <= EXPERTS)


@triton.jit
def _place_kernel(
    indices_ptr, counts_ptr, offsets_ptr, order_ptr, assignments,
    EXPERTS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    a, owned = _keys(indices_ptr, assignments, EXPERTS, CHUNK, BLOCK)
    e = tl.arange(0, BLOCK)
    before = tl.load(counts_ptr + tl.program_id(0) * BLOCK + e)
    before += tl.load(offsets_ptr + e, mask=e <= EXPERTS, other=0).to(tl.int32)
    place = tl.sum(owned * (before[None, :] + tl.cumsum(owned, axis=0) - 1), axis=1)
    tl.store(order_ptr + place, a, mask=a < assignments)


def _tile(logits: Tensor) -> tuple[int, int]:
    """Return how many tokens and experts a program has."""
    block = triton.next_power_of_2(logits.shape[1])
    return max(1, min(TILE // block, triton.next_power_of_2(len(logits)))), block


def route(logits: Tensor, k: int, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Choose; see `route_top_k`."""
    (tokens, experts), (rows, block), wide = logits.shape, _tile(logits), compute_dtype(logits)
    weights = logits.new_empty(tokens, k)
    indices = logits.new_empty(tokens, k, dtype=torch.int64)
    with torch.cuda.device_of(logits):
        _route_kernel[(triton.cdiv(tokens, rows),)](
            *(logits.contiguous(), None if bias is None else bias.contiguous(), weights, indices, tokens),
            K=k, EXPERTS=experts, ROWS=rows, BLOCK=block, WIDE=WIDE[wide], LOWEST=lowest(wide),
        )  # fmt: skip
    return weights, indices


def route_backward(logits: Tensor, indices: Tensor, grad: Tensor) -> Tensor:
    """Differentiate the weights by the logits."""
    (tokens, experts), (rows, block) = logits.shape, _tile(logits)
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(logits):
        _route_backward_kernel[(triton.cdiv(tokens, rows),)](
            *(logits.contiguous(), indices.contiguous(), grad.contiguous(), gradient, tokens),
            K=indices.shape[1], EXPERTS=experts, ROWS=rows, BLOCK=block, WIDE=WIDE[compute_dtype(logits)],
        )  # fmt: skip
    return like(gradient, logits)


WIDE = {torch.float32: tl.float32, torch.float64: tl.float64}


def group(indices: Tensor, experts: int) -> Groups:
    """Do as `group_by_expert`; an index out of range counts as nobody, too."""
    assignments, block = indices.numel(), triton.next_power_of_2(experts + 1)
    chunk = max(16, 2 * TILE // block)
    chunks = triton.cdiv(assignments, chunk)
    counts = indices.new_empty(chunks, block, dtype=torch.int32)
    order, offsets = indices.new_empty(assignments), indices.new_empty(experts + 1)
    sizes = {"EXPERTS": experts, "BLOCK": block}
    with torch.cuda.device_of(indices):
        _count_kernel[(chunks,)](indices, counts, assignments, CHUNK=chunk, **sizes)
        _scan_kernel[(1,)](counts, offsets, chunks, CHUNKS=chunk, **sizes)
        _place_kernel[(chunks,)](indices, counts, offsets, order, assignments, CHUNK=chunk, **sizes)
    return Groups(order, offsets)
