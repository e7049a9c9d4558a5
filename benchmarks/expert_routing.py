"""Experts that compute the tokens that chose them, against experts that all compute all tokens and are masked.

`dense` is what routing often is in code for maps: every expert runs on every token, and is multiplied by its weight,
which is 0 where it was not chosen.

python -m benchmarks.expert_routing
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from claritycore.kernels.expert_routing import (
    expert_mlp,
    expert_mlp_bytes,
    expert_mlp_flops,
    route_top_k,
    route_top_k_flops,
)

from .runner import Benchmark, Case, Work, main

SIZES = [(16384, 64, 128), (131072, 96, 192)] if torch.cuda.is_available() else [(16384, 64, 128)]
CASES = [
    {"tokens": tokens, "channels": channels, "hidden": hidden, "experts": experts, "k": k}
    for tokens, channels, hidden in SIZES
    for experts, k in ((8, 2), (16, 2), (8, 1), (4, 2))
]


def inputs(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    tokens, channels, hidden, experts, _ = case.values()

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    logits, x = draw(tokens, experts), draw(tokens, channels)
    return {
        "x": x,
        "logits": logits,
        "w1": draw(experts, hidden, channels) / channels**0.5,
        "b1": draw(experts, hidden),
        "w2": draw(experts, channels, hidden) / hidden**0.5,
        "b2": draw(experts, channels),
        "k": torch.tensor(case["k"]),
    }


def work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    tokens, channels, hidden, experts, k = case.values()
    flops = expert_mlp_flops(tokens, channels, hidden, k) * (3 if backward else 1)
    sizes = tokens, channels, hidden, k, experts
    return Work(
        bytes=expert_mlp_bytes(*sizes, itemsize=dtype.itemsize, backward=backward),
        flops=flops + route_top_k_flops(tokens, experts, k),
    )


def routed(x: Tensor, logits: Tensor, k: Tensor, *, backend: str, **experts: Tensor) -> Tensor:
    weights, indices = route_top_k(logits, int(k), backend=backend)
    return expert_mlp(x, weights, indices, **experts, backend=backend)


def dense(x: Tensor, logits: Tensor, k: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """What a user can write: all experts on all tokens, weighed by a mask."""
    values, indices = (logits.softmax(-1) if k == 1 else logits).topk(int(k), -1)
    weights = values if k == 1 else values.softmax(-1)
    gates = torch.zeros_like(logits).scatter(-1, indices, weights)
    y = torch.zeros_like(x)
    for e in range(len(w1)):
        hidden = F.gelu(F.linear(x, w1[e], b1[e]))
        y = y + gates[:, e : e + 1] * F.linear(hidden, w2[e], b2[e])
    return y


EXPERT_ROUTING = Benchmark(
    name="expert_routing",
    cases=CASES,
    inputs=inputs,
    providers={
        "reference": partial(routed, backend="reference"),
        "torch": partial(routed, backend="torch"),
        "triton": partial(routed, backend="triton"),
        "dense": dense,
    },
    peer="dense",
    cuda_only=["triton"],
    backward=True,
    work=work,
)

if __name__ == "__main__":
    raise SystemExit(main(EXPERT_ROUTING))
