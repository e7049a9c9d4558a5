"""Prompts, modulation, cross attention, local statistics, estimates of degradation and codes of blur.

References: the formulas as they are usually written. The prompts are copied for each image, the scores of attention
stay in memory, windows are unfolded, the noise formulas convolve and sort, and cells are averaged by reshaping.

python -m benchmarks.conditioning
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from claritycore.blocks import (
    CrossAttention2d,
    DegradationEstimator,
    FiLM,
    KernelPrior,
    LocalStatistics,
    PromptGenerator,
    edge_width,
    haar_sigma,
    immerkaer_sigma,
)
from claritycore.blocks.degradation_features import blockiness

from .runner import Benchmark, Case, Work, main

CASES = [{"channels": 48, "size": 64}, {"channels": 48, "size": 128}]
CONDITION, TOKENS = 64, 77


def feature_map(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"x": torch.randn(4, case["channels"], case["size"], case["size"], device=device, dtype=dtype)}


def image(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"x": torch.rand(4, 3, 4 * case["size"], 4 * case["size"], device=device, dtype=dtype)}


def map_and_condition(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    return feature_map(case, device, dtype) | {"condition": torch.randn(4, CONDITION, device=device, dtype=dtype)}


def map_and_tokens(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    return feature_map(case, device, dtype) | {"tokens": torch.randn(4, TOKENS, CONDITION, device=device, dtype=dtype)}


def work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    """The map in and out, and with backward the gradients of both."""
    size = 2 * 4 * case["channels"] * case["size"] ** 2 * dtype.itemsize
    return Work(bytes=(2 if backward else 1) * size)


def film_by_hand(block: FiLM, x: Tensor, condition: Tensor) -> Tensor:
    gamma, beta = block.linear(condition * condition.sigmoid()).chunk(2, dim=1)
    return x + gamma[:, :, None, None] * x + beta[:, :, None, None]


def prompt_by_copies(block: PromptGenerator, x: Tensor) -> Tensor:
    weights = F.softmax(block.linear_layer(x.mean((2, 3))), dim=1)
    prompts = block.prompt_param.repeat(len(x), 1, 1, 1, 1)
    prompt = (weights[:, :, None, None, None] * prompts).sum(1)
    return block.conv3x3(F.interpolate(prompt, x.shape[2:], mode="bilinear"))


def attention_by_hand(block: CrossAttention2d, x: Tensor, tokens: Tensor) -> Tensor:
    pixels, (k, v) = block.norm(x).flatten(2).mT, block.kv(tokens).chunk(2, dim=2)
    q, k, v = (t.unflatten(2, (block.num_heads, -1)).transpose(1, 2) for t in (block.q(pixels), k, v))
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    return x + block.proj((weights @ v).transpose(1, 2).flatten(2)).mT.unflatten(2, x.shape[2:])


def statistics_by_unfolding(block: LocalStatistics, x: Tensor) -> Tensor:
    side, radius = block.window_size, block.window_size // 2
    padded = F.pad(x, (radius,) * 4, value=math.nan).unfold(2, side, 1).unfold(3, side, 1).flatten(4)
    mean = padded.nanmean(-1)
    return torch.cat([mean, (padded - mean[..., None]).square().nanmean(-1).log1p()], dim=1)


def formulas_by_hand(x: Tensor) -> Tensor:
    c = x.shape[1]
    mask = torch.tensor([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]]).to(x).repeat(c, 1, 1, 1)
    haar = (torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).to(x) / 2).repeat(c, 1, 1, 1)
    immerkaer = math.sqrt(math.pi / 2) / 6 * F.conv2d(x, mask, groups=c).abs().mean((1, 2, 3))
    details = F.conv2d(x, haar, groups=c, stride=2).abs().flatten(1)
    return torch.stack([immerkaer, details.median(1).values / 0.6744897501960817, edge_width(x), blockiness(x)])


def formulas(x: Tensor) -> Tensor:
    return torch.stack([immerkaer_sigma(x), haar_sigma(x), edge_width(x), blockiness(x)])


def prior_by_reshaping(block: KernelPrior, x: Tensor) -> Tensor:
    features = F.gelu(block.conv(x))
    cells = features.unflatten(3, (-1, block.cell)).unflatten(2, (-1, block.cell)).mean((3, 5))
    return block.to_code(F.gelu(block.around(cells)))


def of_map(name: str, build, reference, inputs=feature_map, *, backward: bool = True) -> Benchmark:
    providers = {"reference": lambda block: lambda **maps: reference(block, **maps), "ours": lambda block: block}
    return Benchmark(
        name=name, cases=CASES, inputs=inputs, build=build, providers=providers, backward=backward, work=work
    )


BENCHMARKS = [
    of_map("film", lambda case: FiLM(case["channels"], CONDITION), film_by_hand, map_and_condition),
    of_map(
        "prompt_generator",
        lambda case: PromptGenerator(case["channels"], CONDITION, form="grid", size=32),
        prompt_by_copies,
    ),
    of_map(
        "cross_attention_2d",
        lambda case: CrossAttention2d(case["channels"], CONDITION, num_heads=4),
        attention_by_hand,
        map_and_tokens,
    ),
    of_map("local_statistics", lambda case: LocalStatistics(), statistics_by_unfolding, backward=False),
    of_map("kernel_prior", lambda case: KernelPrior(case["channels"]), prior_by_reshaping),
    Benchmark(
        name="degradation_features",
        cases=CASES,
        inputs=image,
        providers={"reference": formulas_by_hand, "ours": formulas},
    ),
    Benchmark(
        name="degradation_estimator",
        cases=CASES,
        inputs=image,
        build=lambda case: DegradationEstimator(),
        providers={"reference": lambda block: lambda x: block(x).condition()},
    ),
]

if __name__ == "__main__":
    raise SystemExit(main(*BENCHMARKS))
