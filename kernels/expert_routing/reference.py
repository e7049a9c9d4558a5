"""The definitions of the routing: one expert after another is chosen, and one after another computes its tokens."""

import torch
from torch import Tensor

from ..activations import ACTIVATIONS, Activation
from ..operand_rules import compute_dtype
from .operands import lowest


def route_top_k_reference(logits: Tensor, k: int, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute `route_top_k` by its formula; see there for the contract. Differentiable any number of times."""
    wide = logits.to(compute_dtype(logits))
    probabilities = torch.softmax(wide, -1)
    scores = wide if bias is None else probabilities + bias.to(wide.dtype)
    scores = scores.detach().nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=lowest(wide.dtype))
    chosen = []
    for _ in range(k):
        chosen.append(scores.argmax(-1, keepdim=True))  # the first of equals
        scores = scores.scatter(-1, chosen[-1], -torch.inf)
    indices = torch.cat(chosen, -1)
    if k == 1:
        return probabilities.gather(-1, indices).to(logits.dtype), indices
    # The same as probabilities divided by their sum, where these would underflow too.
    weights = torch.softmax(wide.gather(-1, indices), -1)
    return weights.masked_fill(probabilities[:, :1].isnan(), torch.nan).to(logits.dtype), indices


def expert_mlp_reference(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    activation: Activation = "gelu",
) -> Tensor:
    """Compute `expert_mlp` by its formula; see there for the contract. Differentiable any number of times."""
    dtype = compute_dtype(x)
    tokens, gates, w1, b1, w2, b2 = (v.to(dtype) for v in (x, weights, w1, b1, w2, b2))
    y = torch.zeros_like(tokens)
    for e in range(len(w1)):
        token, slot = torch.where(indices == e)
        hidden = ACTIVATIONS[activation](tokens[token] @ w1[e].T + b1[e])
        expert = hidden @ w2[e].T + b2[e]
        y = y.index_put((token,), gates[token, slot][:, None] * expert, accumulate=True)
    return y.to(x.dtype)
