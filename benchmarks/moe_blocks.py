"""MoE2d at its levels, forward and backward: what experts that were not chosen save.

The reference is the dense sum: every expert for everything, times a map of weights that is zero where it was not
chosen. The router (`TopKRouter`) is part of both. With `keep` < 1 a gate leaves the rest alone, which the dense sum
weighs with zero.

python -m benchmarks.moe_blocks
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from claritycore.blocks import DetailExpert, MoE2d, PointwiseExpert, TopKRouter
from claritycore.blocks.moe_dispatch import described

from .runner import Benchmark, Case, Work, main

WINDOWS = [
    {"experts": 4, "k": 1, "window": 32, "keep": 1.0, "channels": 64, "size": 96},
    {"experts": 4, "k": 2, "window": 32, "keep": 1.0, "channels": 64, "size": 96},
    {"experts": 4, "k": 2, "window": 32, "keep": 0.25, "channels": 64, "size": 128},
]
TOKENS = [
    {"experts": 8, "k": 2, "keep": 1.0, "channels": 64, "size": 128},
    {"experts": 16, "k": 2, "keep": 1.0, "channels": 64, "size": 128},
]


def feature_map(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"x": torch.randn(1, case["channels"], case["size"], case["size"], device=device, dtype=dtype)}


def windows(case: Case) -> MoE2d:
    experts = [DetailExpert(case["channels"]) for _ in range(case["experts"])]
    return _mixture(case, experts, 2 * case["channels"], level="window", window_size=case["window"])


def tokens(case: Case) -> MoE2d:
    experts = [PointwiseExpert(case["channels"]) for _ in range(case["experts"])]
    return _mixture(case, experts, case["channels"])


def _mixture(case: Case, experts: list[nn.Module], width: int, **options) -> MoE2d:
    router = TopKRouter(width, case["experts"], k=case["k"], keep=case["keep"])
    nn.init.normal_(router.linear.weight, std=0.2)  # regions of noise look alike: let them go to different experts
    return MoE2d(case["channels"], experts, router=router, **options)


def dense(moe: MoE2d):
    """Compute every expert for everything, and weigh."""

    def forward(x: Tensor) -> Tensor:
        if moe.level == "token":
            features = moe.prepare(x)
            route, side = moe.router(features), 1
        else:
            side = moe.window_size
            features = x
            route = moe.router(described(x, x.shape[2] // side, x.shape[3] // side))
        weights = route.weights if route.gate is None else route.weights * route.gate[:, None]
        table = weights.new_zeros(len(weights), moe.router.num_experts).scatter(1, route.indices, weights)
        if route.regions is not None:
            everywhere = table.new_zeros(route.grid[1] * route.grid[2], table.shape[1])
            table = everywhere.index_put((route.regions,), table)
        y = x
        for number in range(moe.router.num_experts):
            mask = table[:, number].view(1, 1, *route.grid[1:]).to(x.dtype)
            mask = mask.repeat_interleave(side, 2).repeat_interleave(side, 3)
            y = y + mask * one_expert(moe, number)(features)
        return y

    return forward


def one_expert(moe: MoE2d, number: int):
    if moe.level != "token":
        return moe.experts[number]
    w1, b1, w2, b2 = (getattr(moe.experts, name)[number] for name in ("w1", "b1", "w2", "b2"))
    return lambda x: F.linear(F.gelu(F.linear(x.permute(0, 2, 3, 1), w1, b1)), w2, b2).permute(0, 3, 1, 2)


def ours(moe: MoE2d):
    return lambda x: moe(x)[0]


def work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    """The map in and out, and the products of the experts that were chosen, without the surroundings of windows."""
    c, pixels = case["channels"], case["size"] ** 2
    products = pixels * case["k"] * case["keep"] * c * c * (18 if "window" in case else 4)
    return Work(bytes=(4 if backward else 2) * pixels * c * dtype.itemsize, flops=(6 if backward else 2) * products)


def benchmark(name: str, cases: list[Case], build) -> Benchmark:
    return Benchmark(
        name=name,
        cases=cases,
        inputs=feature_map,
        build=build,
        providers={"reference": dense, "ours": ours},
        backward=True,
        work=work,
    )


WINDOW_LEVEL = benchmark("moe_windows", WINDOWS, windows)
TOKEN_LEVEL = benchmark("moe_tokens", TOKENS, tokens)


if __name__ == "__main__":
    raise SystemExit(main(WINDOW_LEVEL, TOKEN_LEVEL))
