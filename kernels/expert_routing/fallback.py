"""The routing in plain torch: sort by expert, products over the tokens of each, and back by the inverse permutation.

Backward computes the hidden layer again, a seventh of the products of a step, and nothing of its size is kept. The same
bits come out whenever a call is repeated. On a GPU this form reads how many tokens each expert has; the Triton form
does not.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import LEAKY_SLOPE
from ..operand_rules import compute_dtype, like
from .operands import DIFFERENTIABLE, Groups, Operands, group_by_expert, in_range, lowest

ROWS = 2048
"""So many tokens of an expert are computed at once, in buffers that all of them share, which so do not grow with the
number of tokens. From 512 to 8192 the time is the same (one core with AVX-512, torch 2.13)."""

aten = torch.ops.aten
# Into the second argument, and of the gradient in its place: fresh memory costs a fifth of the time of a GELU.
ACTIVATE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda z, out: aten.relu.out(z, out=out),
    "leaky_relu": lambda z, out: aten.leaky_relu.out(z, LEAKY_SLOPE, out=out),
    "gelu": lambda z, out: aten.gelu.out(z, out=out),
    "silu": lambda z, out: aten.silu.out(z, out=out),
}
DIFFERENTIATE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda grad, z: aten.threshold_backward.grad_input(grad, z, 0, grad_input=grad),
    "leaky_relu": lambda grad, z: aten.leaky_relu_backward.grad_input(grad, z, LEAKY_SLOPE, False, grad_input=grad),
    "gelu": lambda grad, z: aten.gelu_backward.grad_input(grad, z, grad_input=grad),
    "silu": lambda grad, z: aten.silu_backward.grad_input(grad, z, grad_input=grad),
}


def route(logits: Tensor, k: int, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Choose; see `route_top_k`. Tokens lie side by side, since reductions over few experts are slow."""
    wide = logits.to(compute_dtype(logits)).T.contiguous()  # (E, T)
    probabilities = torch.softmax(wide, 0) if bias is not None or k == 1 else None
    scores = wide if bias is None or probabilities is None else probabilities + bias.to(wide.dtype)[:, None]
    scores = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=lowest(wide.dtype))
    experts = len(scores)
    backwards = torch.arange(experts, 0, -1, dtype=torch.int32, device=logits.device)[:, None]
    chosen = []
    for _ in range(k):
        best = ((scores == scores.amax(0)) * backwards).amax(0)  # the first of equals
        chosen.append((experts - best).long())
        scores.scatter_(0, chosen[-1][None], -torch.inf)
    indices = torch.stack(chosen)
    if k == 1 and probabilities is not None:
        weights = probabilities.gather(0, indices)
    else:
        weights = torch.softmax(wide.gather(0, indices), 0)
        if probabilities is not None:
            weights.masked_fill_(probabilities[0].isnan(), torch.nan)
    return weights.T.to(logits.dtype).contiguous(), indices.T.contiguous()


def route_backward(logits: Tensor, indices: Tensor, grad: Tensor) -> Tensor:
    """Differentiate the weights by the logits."""
    dtype = compute_dtype(logits)
    wide, chosen, pull = (v.T.contiguous() for v in (logits.to(dtype), indices, grad.to(dtype)))
    if len(chosen) == 1:
        probabilities = torch.softmax(wide, 0)
        picked = probabilities.gather(0, chosen)
        pull = pull * picked
        gradient = (-pull * probabilities).scatter_(0, chosen, pull * (1 - picked))
    else:
        weights = torch.softmax(wide.gather(0, chosen), 0)
        gradient = torch.zeros_like(wide).scatter_(0, chosen, weights * (pull - (pull * weights).sum(0)))
    return like(gradient.T, logits)


def forward(x: Operands, activation: str) -> tuple[Tensor, Groups]:
    """Compute the experts; see `Operands`."""
    _, channels, slots, experts, hidden = x.sizes
    groups = group_by_expert(in_range(x.indices, experts), experts)
    offsets = groups.offsets.tolist()
    rows, token = _side_by_side(x.x, x), groups.order // slots
    w1, b1, w2, b2 = (v.to(x.dtype) for v in x[3:])
    buffer = rows.new_empty(min(ROWS, len(token)), hidden)
    out = rows.new_empty(len(token), channels)
    out[offsets[-1] :] = 0
    for e, piece in _pieces(offsets):
        z = torch.addmm(b1[e], rows.index_select(0, token[piece]), w1[e].T, out=buffer[: piece.stop - piece.start])
        torch.addmm(b2[e], ACTIVATE[activation](z, z), w2[e].T, out=out[piece])
    return like(_combined(out, groups, x), x.x), groups


def backward(
    x: Operands, groups: Groups, grad_y: Tensor, activation: str, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Differentiate; see `Operands`."""
    _, channels, slots, _, hidden = x.sizes
    wants = dict(zip(DIFFERENTIABLE, wanted, strict=True))
    w1, b1, w2, b2 = (v.to(x.dtype) for v in x[3:])
    rows, pulls, token = _side_by_side(x.x, x), _side_by_side(grad_y, x), groups.order // slots
    gates = x.weights.to(x.dtype).flatten().index_select(0, groups.order)
    offsets = groups.offsets.tolist()
    of_row, of_gate = rows.new_empty(len(token), channels), rows.new_empty(len(token))
    of_row[offsets[-1] :] = 0
    of_gate[offsets[-1] :] = 0
    summed = {name: torch.zeros_like(v) for name, v in zip(DIFFERENTIABLE[2:], (w1, b1, w2, b2), strict=True)}
    buffers = rows.new_empty(3, min(ROWS, len(token)), hidden)
    for e, piece in _pieces(offsets):
        row, pull = (v.index_select(0, token[piece]) for v in (rows, pulls))
        gate = gates[piece]
        z, h, of_hidden = buffers[:, : len(gate)]
        torch.addmm(b1[e], row, w1[e].T, out=z)
        ACTIVATE[activation](z, h)
        torch.mm(pull, w2[e], out=of_hidden)
        torch.add(torch.linalg.vecdot(h, of_hidden), pull @ b2[e], out=of_gate[piece])
        of_z = DIFFERENTIATE[activation](of_hidden, z)
        torch.mm(of_z, w1[e], out=of_row[piece])
        if wants["b1"]:
            summed["b1"][e].addmv_(of_z.T, gate)
        if wants["b2"]:
            summed["b2"][e].addmv_(pull.T, gate)
        if wants["w1"]:
            summed["w1"][e].addmm_(of_z.T, row.mul_(gate[:, None]))
        if wants["w2"]:
            summed["w2"][e].addmm_(pull.mul_(gate[:, None]).T, h)
    gradients = {name: value for name, value in summed.items() if wants[name]}
    if wants["x"]:
        gradients["x"] = _combined(of_row, groups, x)
    if wants["weights"]:
        gradients["weights"] = of_gate.index_select(0, groups.inverse()).view(x.weights.shape)
    return x.like(gradients)


def _side_by_side(rows: Tensor, x: Operands) -> Tensor:
    """The channels of each token beside each other: in a map they lie far apart, and gathering costs many copies."""
    return rows.to(x.dtype).contiguous()


def _pieces(offsets: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Cut the assignments of each expert into pieces of at most ROWS."""
    for e, (start, stop) in enumerate(pairwise(offsets)):
        for first in range(start, stop, ROWS):
            yield e, slice(first, min(first + ROWS, stop))


def _combined(rows: Tensor, groups: Groups, x: Operands) -> Tensor:
    """Add up what the experts of each token have, times its weights: gathers and sums in one pass."""
    gates = x.weights.to(rows.dtype).masked_fill(x.indices < 0, 0)
    place = groups.inverse().view(x.indices.shape)
    return F.embedding_bag(place, rows, per_sample_weights=gates, mode="sum")
