"""PixelShuffleUp, BicubicUp and DySample against a rearrangement, two matrix products and an index of four pixels.

The first two have no peer: other libraries upsample by the very calls of torch that are used here. That of DySample
is the public way to write it, with a permuted copy of all coordinates for grid_sample.

python -m benchmarks.resampling
"""

import math

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from claritycore.blocks import BicubicUp, DySample, PixelShuffleUp

from .runner import Benchmark, Case, Work, main

CASES = [{"channels": 64, "size": size, "scale": scale} for size in (48, 128) for scale in (2, 3)]
# No odd scale: their middle samples lie on pixels, where rounding alone decides between two gradients.
DYSAMPLE_CASES = [{"channels": 64, "size": size, "scale": scale} for size in (48, 128) for scale in (2, 4)]
GROUPS = 4


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


def dysample_work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    c, pixels, cell = case["channels"], case["size"] ** 2, case["scale"] ** 2
    offsets, samples = 2 * 2 * GROUPS * cell * c * pixels, 8 * c * cell * pixels
    size = pixels * c * (1 + cell) * dtype.itemsize
    return Work(bytes=(2 if backward else 1) * size, flops=(3 if backward else 1) * (offsets + samples))


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


def dysample_by_hand(up: DySample, x: Tensor) -> Tensor:
    """Every sample from the four pixels around it, by indexing."""
    s, g = up.scale_factor, up.groups
    batch, _, height, width = x.shape
    offsets = rearrange(0.25 * up.offset(x) + up.init_pos, "b (xy g i j) h w -> xy b g (h i) (w j)", g=g, i=s, j=s)
    columns, rows = (torch.arange(side, device=x.device).repeat_interleave(s) for side in (width, height))
    across = (offsets[0] + columns).clamp(0, width - 1)
    down = (offsets[1] + rows[:, None]).clamp(0, height - 1)
    left, top = across.detach().long(), down.detach().long()
    right, bottom = (left + 1).clamp(max=width - 1), (top + 1).clamp(max=height - 1)
    maps = rearrange(x, "b (g c) h w -> b g h w c", g=g)
    sample, group = torch.arange(batch).view(-1, 1, 1, 1), torch.arange(g).view(-1, 1, 1)
    a, b = (across - left)[..., None], (down - top)[..., None]
    above = (1 - a) * maps[sample, group, top, left] + a * maps[sample, group, top, right]
    below = (1 - a) * maps[sample, group, bottom, left] + a * maps[sample, group, bottom, right]
    return rearrange((1 - b) * above + b * below, "b g h w c -> b (g c) h w").to(x.dtype).contiguous()


def dysample_in_public(up: DySample, x: Tensor) -> Tensor:
    s, g = up.scale_factor, up.groups
    batch, _, height, width = x.shape
    offsets = (0.25 * up.offset(x) + up.init_pos).view(batch, 2, -1, height, width)
    centres = torch.meshgrid(*(torch.arange(side).to(x) + 0.5 for side in (width, height)), indexing="xy")
    sides = torch.tensor([width, height]).to(x).view(1, 2, 1, 1, 1)
    places = 2 * (torch.stack(centres)[None, :, None] + offsets) / sides - 1
    places = F.pixel_shuffle(places.view(batch, -1, height, width), s).view(batch, 2, -1, s * height, s * width)
    grid = places.permute(0, 2, 3, 4, 1).contiguous().flatten(0, 1)
    maps = x.reshape(batch * g, -1, height, width)
    y = F.grid_sample(maps, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return y.view(batch, -1, s * height, s * width)


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

DYSAMPLE = Benchmark(
    name="dysample",
    cases=DYSAMPLE_CASES,
    inputs=feature_map,
    build=lambda case: DySample(case["channels"], scale_factor=case["scale"], groups=GROUPS),
    providers={
        "reference": lambda up: lambda x: dysample_by_hand(up, x),
        "ours": lambda up: up,
        "public": lambda up: lambda x: dysample_in_public(up, x),
    },
    peer="public",
    backward=True,
    work=dysample_work,
)

if __name__ == "__main__":
    raise SystemExit(main(SHUFFLE, BICUBIC, DYSAMPLE))
