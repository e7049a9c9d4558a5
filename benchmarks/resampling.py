"""PixelShuffleUp against the rearrangement written out, BicubicUp against two matrix products.

python -m benchmarks.resampling
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

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


def bicubic_by_hand(up: BicubicUp, x: Tensor) -> Tensor:
    """The interpolation is linear: its matrix is what it makes of unit vectors."""

    def matrix(size: int) -> Tensor:
        unit = torch.eye(size, dtype=x.dtype, device=x.device)[:, None, None, :].expand(-1, 1, 4, -1)
        return F.interpolate(unit, scale_factor=(1.0, float(up.scale_factor)), mode="bicubic")[:, 0, 0].T

    return matrix(x.shape[2]) @ x @ matrix(x.shape[3]).T


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
