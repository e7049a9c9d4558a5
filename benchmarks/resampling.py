"""PixelShuffleUp against the rearrangement written out, BicubicUp against two matrix products.

Neither has a peer: other libraries upsample by the very calls of torch that are used here.

python -m benchmarks.resampling
"""

import math

import torch
from einops import rearrange
from torch import Tensor

from claritycore.blocks import BicubicUp, PixelShuffleUp

from .runner import Benchmark, Case, Work, main

CASES = [{"channels": 64, "size": size, "scale": scale} for size in (48, 128) for scale in (2, 3)]


def feature_map(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"x": torch.randn(1, case["channels"], case["size"], case["size"], device=device, dtype=dtype)}


def image(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"x": torch.rand(1, 3, case["size"], case["size"], device=device, dtype=dtype)}


def shuffle_work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    c, pixels, cell = case["channels"], case["size"] ** 2, case["scale"] ** 2
    return Work(bytes=pixels * c * (1 + cell) * dtype.itemsize, flops=2 * 9 * pixels * c * c * cell)


def bicubic_work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    pixels, cell = case["size"] ** 2, case["scale"] ** 2
    return Work(bytes=3 * pixels * (1 + cell) * dtype.itemsize, flops=32 * 3 * pixels * cell)


def shuffle_by_hand(up: PixelShuffleUp, x: Tensor) -> Tensor:
    s = up.scale_factor
    return rearrange(up.conv(x), "b (c i j) h w -> b c (h i) (w j)", i=s, j=s)


def keys(distance: float, a: float = -0.75) -> float:
    d = abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def bicubic_matrix(size: int, scale: int) -> Tensor:
    """Row i holds the weights of output sample i, taps beyond the edge folded onto it."""
    matrix = torch.zeros(scale * size, size)
    for i, row in enumerate(matrix):
        centre = (i + 0.5) / scale - 0.5
        first = math.floor(centre) - 1
        for tap in range(first, first + 4):
            row[min(max(tap, 0), size - 1)] += keys(centre - tap)
    return matrix


def bicubic_by_hand(up: BicubicUp, x: Tensor) -> Tensor:
    rows, columns = (bicubic_matrix(side, up.scale_factor).to(x) for side in x.shape[2:])
    return rows @ x @ columns.T


SHUFFLE = Benchmark(
    name="pixel_shuffle_up",
    cases=CASES,
    inputs=feature_map,
    build=lambda case: PixelShuffleUp(case["channels"], scale_factor=case["scale"]),
    providers={"reference": lambda up: lambda x: shuffle_by_hand(up, x), "ours": lambda up: up},
    work=shuffle_work,
)

BICUBIC = Benchmark(
    name="bicubic_up",
    cases=CASES,
    inputs=image,
    build=lambda case: BicubicUp(case["scale"]),
    providers={"reference": lambda up: lambda x: bicubic_by_hand(up, x), "ours": lambda up: up},
    work=bicubic_work,
)

if __name__ == "__main__":
    raise SystemExit(main(SHUFFLE, BICUBIC))
