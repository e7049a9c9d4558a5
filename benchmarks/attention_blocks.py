"""TransposedAttention and DeformableAttention2d, forward and backward.

Peers: the attention over channels as Restormer's authors write it, with q and k normalised on their own; deformable
attention as its authors write it, with grid_sample for samples and bias and every score in memory.

python -m benchmarks.attention_blocks
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from claritycore.blocks import DeformableAttention2d, TransposedAttention

from .runner import Benchmark, Case, Work, main

LAYOUTS = (torch.contiguous_format, torch.channels_last)
SIZES = [
    {"channels": 48, "heads": 1, "size": 128},
    {"channels": 96, "heads": 2, "size": 64},
    {"channels": 192, "heads": 4, "size": 32},
]
TRANSPOSED_CASES = [{**case, "memory_format": layout} for case in SIZES for layout in LAYOUTS]
# No odd stride: its samples start on pixels, where rounding alone decides between two gradients.
DEFORMABLE_CASES = [
    {"channels": 192, "heads": 8, "groups": 4, "stride": 2, "size": 16},
    {"channels": 192, "heads": 8, "groups": 4, "stride": 2, "size": 32},
]


def feature_map(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    x = torch.randn(1, case["channels"], case["size"], case["size"], device=device, dtype=dtype)
    return {"x": x.contiguous(memory_format=case.get("memory_format", torch.contiguous_format))}


def work(case: Case, dtype: torch.dtype, backward: bool, products: int) -> Work:
    """The map in and out, with the gradients of both; the products, thrice with backward."""
    size = 2 * case["size"] ** 2 * case["channels"] * dtype.itemsize
    return Work(bytes=(2 if backward else 1) * size, flops=2 * (3 if backward else 1) * products)


def transposed_work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    c = case["channels"]
    return work(case, dtype, backward, case["size"] ** 2 * (4 * c * c + 27 * c + 2 * c * c // case["heads"]))


def deformable_work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    c, heads, pixels = case["channels"], case["heads"], case["size"] ** 2
    samples = pixels // case["stride"] ** 2
    linear = pixels * 2 * c * c + samples * (2 * c * c + 25 * c + 2 * c)
    return work(case, dtype, backward, linear + 2 * pixels * samples * c + 4 * samples * (c + pixels * heads))


def transposed_by_hand(block: TransposedAttention, x: Tensor) -> Tensor:
    """Head after head."""
    q, k, v = (t.chunk(block.num_heads, dim=1) for t in block.qkv_dwconv(block.qkv(x)).chunk(3, dim=1))
    heads = []
    for a, b, values, temperature in zip(q, k, v, block.temperature, strict=True):
        a, b = (t / t.square().sum((2, 3), keepdim=True).sqrt() for t in (a, b))
        weights = (temperature * torch.einsum("bchw,bdhw->bcd", a, b)).softmax(-1)
        heads.append(torch.einsum("bcd,bdhw->bchw", weights, values))
    return _like(block.project_out(torch.cat(heads, dim=1)), x)


def transposed_by_normalizing(block: TransposedAttention, x: Tensor) -> Tensor:
    qkv = block.qkv_dwconv(block.qkv(x)).chunk(3, dim=1)
    q, k, v = (rearrange(t, "b (head c) h w -> b head c (h w)", head=block.num_heads) for t in qkv)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    weights = (q @ k.transpose(-2, -1) * block.temperature).softmax(dim=-1)
    y = rearrange(weights @ v, "b head c (h w) -> b (head c) h w", h=x.shape[2], w=x.shape[3])
    return _like(block.project_out(y), x)


def deformable_by_hand(block: DeformableAttention2d, x: Tensor) -> Tensor:
    """Samples and bias from the four values around each."""
    return _deformable(block, x, _indexed)


def deformable_by_grid_sample(block: DeformableAttention2d, x: Tensor) -> Tensor:
    return _deformable(block, x, _grid_sampled)


def _deformable(block: DeformableAttention2d, x: Tensor, sample) -> Tensor:
    g, (height, width) = block.groups, x.shape[2:]
    q = block.proj_q(x)
    offsets = torch.tanh(block.conv_offset(rearrange(q, "b (g c) h w -> (b g) c h w", g=g)))
    rows, columns = offsets.shape[2:]
    steps = torch.tensor([height / rows, width / columns], device=x.device, dtype=x.dtype)
    places = (_grid(rows, columns, x) + 0.5) * steps - 0.5
    places = places + rearrange(offsets.flip(1), "b two h w -> b h w two") * block.offset_range * steps
    last = torch.tensor([height - 1, width - 1], device=x.device, dtype=x.dtype)
    places = torch.minimum(places.clamp(min=0), last)
    samples = sample(rearrange(x, "b (g c) h w -> (b g) c h w", g=g), places)
    k, v = block.proj_kv(rearrange(samples, "(b g) c h w -> b (g c) h w", g=g)).chunk(2, dim=1)
    q, k, v = (rearrange(t, "b (head c) h w -> (b head) c (h w)", head=block.num_heads) for t in (q, k, v))
    scores = torch.einsum("bcm,bcn->bmn", q, k) * q.shape[1] ** -0.5

    ways = _grid(height, width, x).view(1, -1, 1, 2) - places.flatten(1, 2)[:, None]
    whole = _grid(2 * height - 1, 2 * width - 1, x) - last
    table = block.bias_mlp(whole.sign() * torch.log2(1 + whole.abs()))
    table = rearrange(table, "h w (g head) -> g head h w", g=g).repeat(len(x), 1, 1, 1)
    bias = sample(table, ways + last)
    weights = (scores + bias.flatten(0, 1)).softmax(dim=2)
    y = torch.einsum("bmn,bcn->bcm", weights, v).reshape(x.shape)
    return block.proj_out(y)


def _grid(height: int, width: int, like: Tensor) -> Tensor:
    """Coordinates of pixels (height, width, 2), down and across."""
    sides = [torch.arange(side, device=like.device, dtype=like.dtype) for side in (height, width)]
    return torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1)


def _grid_sampled(maps: Tensor, places: Tensor) -> Tensor:
    """Sample (N, C, H, W) at places (N, h, w, 2), down and across in pixels."""
    last = torch.tensor([maps.shape[2] - 1, maps.shape[3] - 1], device=maps.device, dtype=maps.dtype)
    grid = 2 * places / last - 1
    return F.grid_sample(maps, grid[..., (1, 0)], mode="bilinear", align_corners=True)


def _indexed(maps: Tensor, places: Tensor) -> Tensor:
    whole = places.detach().floor()
    down, across = (places - whole)[:, None].unbind(-1)
    top, left = whole.long().unbind(-1)
    bottom, right = (top + 1).clamp(max=maps.shape[2] - 1), (left + 1).clamp(max=maps.shape[3] - 1)
    own = torch.arange(len(maps), device=maps.device)[:, None, None]
    a, b, c, d = (maps[own, :, i, j].movedim(-1, 1) for i in (top, bottom) for j in (left, right))
    return (1 - down) * ((1 - across) * a + across * b) + down * ((1 - across) * c + across * d)


def _like(y: Tensor, x: Tensor) -> Tensor:
    return y if x.is_contiguous() else y.contiguous(memory_format=torch.channels_last)


TRANSPOSED = Benchmark(
    name="transposed_attention",
    cases=TRANSPOSED_CASES,
    inputs=feature_map,
    build=lambda case: TransposedAttention(case["channels"], num_heads=case["heads"]),
    providers={
        "reference": lambda block: lambda x: transposed_by_hand(block, x),
        "ours": lambda block: block,
        "normalize": lambda block: lambda x: transposed_by_normalizing(block, x),
    },
    peer="normalize",
    backward=True,
    work=transposed_work,
)

DEFORMABLE = Benchmark(
    name="deformable_attention",
    cases=DEFORMABLE_CASES,
    inputs=feature_map,
    build=lambda case: DeformableAttention2d(
        case["channels"], num_heads=case["heads"], groups=case["groups"], stride=case["stride"]
    ),
    providers={
        "reference": lambda block: lambda x: deformable_by_hand(block, x),
        "ours": lambda block: block,
        "grid_sample": lambda block: lambda x: deformable_by_grid_sample(block, x),
    },
    peer="grid_sample",
    backward=True,
    work=deformable_work,
)

if __name__ == "__main__":
    raise SystemExit(main(TRANSPOSED, DEFORMABLE))
