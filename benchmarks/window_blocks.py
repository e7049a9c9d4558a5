"""SwinBlock, OverlappingCrossAttention, GridAttention and HybridAttention, forward and backward.

Peers: the block of Swin as torchvision's `shifted_window_attention` computes it (roll, cut into windows, mask, attend,
put back, roll back); HAT's attention with its keys unfolded, as its authors write it; the grid of MaxViT as timm cuts
it by reshaping; windows cut by reshaping, with pooled tokens joined to the keys of each; timm's own attention within
rolled windows, where timm is installed. All of them at sizes that windows divide, for want of others there.

python -m benchmarks.window_blocks
"""

from collections.abc import Callable
from functools import partial

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from claritycore.blocks import GridAttention, HybridAttention, OverlappingCrossAttention, SwinBlock, WindowAttention2d
from claritycore.blocks.hybrid_attention import grid_steps
from claritycore.kernels import overlapping_window_attention, window_attention

from .runner import Benchmark, Case, Work, main
from .window_attention import map_of, shifted, shifted_mask, windows_of

LAYOUTS = (torch.contiguous_format, torch.channels_last)
SIZES = [
    {"channels": 96, "heads": 6, "window": 8, "size": 64},
    {"channels": 180, "heads": 6, "window": 16, "size": 64},
    {"channels": 96, "heads": 6, "window": 8, "size": 128},
]
CASES = [{**case, "memory_format": layout} for case in SIZES for layout in LAYOUTS]
TOKENS = 8


def feature_map(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    x = torch.randn(1, case["channels"], case["size"], case["size"], device=device, dtype=dtype)
    return {"x": x.contiguous(memory_format=case["memory_format"])}


def work_of(linears: int, tokens: int = 0, overlap: float = 0.0):
    """The map in and out, with the gradients of both; C x C products for each pixel, and what it attends to."""

    def work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
        c, pixels = case["channels"], case["size"] ** 2
        products = pixels * (linears * c * c + 2 * c * (((1 + overlap) * case["window"]) ** 2 + tokens))
        return Work(bytes=(4 if backward else 2) * pixels * c * dtype.itemsize, flops=(6 if backward else 2) * products)

    return work


# The definitions


def by_reference(attention, x: Tensor) -> Tensor:
    """Each attention by the masked form of the kernel's reference."""
    qkv = attention.qkv(x.permute(0, 2, 3, 1))
    options = {"num_heads": attention.num_heads, "backend": "reference"}
    if isinstance(attention, GridAttention):
        options |= {"window_size": attention.grid_size, "dilation": grid_steps(x, attention.grid_size)}
    else:
        options |= {"window_size": attention.window_size, "shift": attention.shift}
    if isinstance(attention, HybridAttention):
        means = F.adaptive_avg_pool2d(x, attention.global_size).flatten(2).mT
        options["tokens"] = attention.qkv(means)[..., attention.channels :]
    y = window_attention(qkv, attention.position_bias(), **options)
    return _like(attention.proj(y).permute(0, 3, 1, 2), x)


def overlapping_by_reference(attention: OverlappingCrossAttention, x: Tensor) -> Tensor:
    qkv, sizes = attention.qkv(x.permute(0, 2, 3, 1)), (attention.window_size, attention.key_window_size)
    options = {"num_heads": attention.num_heads, "zero_border": attention.zero_border, "backend": "reference"}
    options |= dict(zip(("window_size", "key_window_size"), sizes, strict=True))
    y = overlapping_window_attention(qkv, attention.position_bias(), **options)
    return _like(attention.proj(y).permute(0, 3, 1, 2), x)


def swin_by_reference(block: SwinBlock, x: Tensor) -> Tensor:
    x = x + by_reference(block.attn, block.norm1(x))
    return x + block.mlp(block.norm2(x))


# The peers


def swin_by_rolling(block: SwinBlock, x: Tensor, attend: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Channels last from end to end, as torchvision's nets are."""
    y = x.permute(0, 2, 3, 1)
    y = y + (attend or partial(_rolled, block.attn))(_normed(block.norm1, y))
    y = y + block.mlp.fc2(F.gelu(block.mlp.fc1(_normed(block.norm2, y))))
    return _like(y.permute(0, 3, 1, 2), x)


def _rolled(attention: WindowAttention2d, x: Tensor) -> Tensor:
    bias, heads = attention.position_bias(), attention.num_heads
    return attention.proj(shifted(attention.qkv(x), bias, heads, attention.window_size[0], attention.shift[0]))


def swin_by_timm(block: SwinBlock) -> Callable[[Tensor], Tensor]:
    """The same around timm's attention within windows, which takes our weights, where timm is installed."""
    from timm.models.swin_transformer import WindowAttention

    own, window, shift = block.attn, block.attn.window_size[0], block.attn.shift[0]
    theirs = WindowAttention(own.channels, own.num_heads, window_size=window)
    theirs.qkv, theirs.proj = own.qkv, own.proj
    theirs.relative_position_bias_table = own.position_bias.relative_position_bias_table

    def attend(x: Tensor) -> Tensor:
        mask = shifted_mask(*x.shape[1:3], window, shift, x.device).to(x.dtype)
        y = theirs(windows_of(torch.roll(x, (-shift, -shift), (1, 2)), window), mask)
        return torch.roll(map_of(y, *x.shape[:3], window), (shift, shift), (1, 2))

    return lambda x: swin_by_rolling(block, x, attend)


def overlapping_by_unfolding(attention: OverlappingCrossAttention, x: Tensor) -> Tensor:
    (window, _), (wider, _), heads = attention.window_size, attention.key_window_size, attention.num_heads
    q, *kv = attention.qkv(x.permute(0, 2, 3, 1)).chunk(3, -1)
    q = rearrange(q, "b (h i) (w j) (head d) -> (b h w) head (i j) d", i=window, j=window, head=heads)
    kv = (F.unfold(t.permute(0, 3, 1, 2), wider, padding=(wider - window) // 2, stride=window) for t in kv)
    k, v = (rearrange(t, "b (head d p) n -> (b n) head p d", head=heads, p=wider**2) for t in kv)
    steps = (torch.arange(window, device=x.device)[:, None] - torch.arange(wider, device=x.device)) + wider - 1
    index = steps[:, None, :, None] * (window + wider - 1) + steps[None, :, None, :]
    bias = attention.position_bias()[index.flatten()].view(window**2, wider**2, heads).permute(2, 0, 1)
    weights = ((q * q.shape[-1] ** -0.5) @ k.mT + bias).softmax(-1)
    y = rearrange(
        weights @ v, "(b h w) head (i j) d -> b (h i) (w j) (head d)", b=len(x), h=x.shape[2] // window, i=window
    )
    return _like(attention.proj(y).permute(0, 3, 1, 2), x)


def grid_by_reshaping(attention: GridAttention, x: Tensor) -> Tensor:
    i, j = attention.grid_size
    cells = rearrange(x, "b c (i h) (j w) -> (b h w) (i j) c", i=i, j=j)
    y = _attended(attention, attention.qkv(cells))
    y = rearrange(y, "(b h w) (i j) c -> b c (i h) (j w)", i=i, h=x.shape[2] // i, w=x.shape[3] // j)
    return _like(y, x)


def hybrid_by_reshaping(attention: HybridAttention, x: Tensor) -> Tensor:
    i, j = attention.window_size
    windows = rearrange(x, "b c (h i) (w j) -> (b h w) (i j) c", i=i, j=j)
    tokens = F.adaptive_avg_pool2d(x, attention.global_size).flatten(2).mT
    tokens = tokens.repeat_interleave(len(windows) // len(x), 0)
    qkv = attention.qkv(torch.cat([windows, tokens], dim=1))
    y = _attended(attention, qkv)[:, : i * j]
    y = rearrange(y, "(b h w) (i j) c -> b c (h i) (w j)", i=i, h=x.shape[2] // i, w=x.shape[3] // j)
    return _like(y, x)


def _attended(attention, qkv: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attend within (windows, pixels, 3 C); pixels beyond those of a window have no bias, and no queries of use."""
    q, k, v = rearrange(qkv, "n p (three head d) -> three n head p d", three=3, head=attention.num_heads)
    rows, columns = getattr(attention, "window_size", None) or attention.grid_size
    down, across = (torch.arange(side, device=q.device) for side in (rows, columns))
    down, across = (axis[:, None] - axis + len(axis) - 1 for axis in (down, across))
    index = (down[:, None, :, None] * (2 * columns - 1) + across[None, :, None, :]).flatten()
    bias = attention.position_bias()[index].view(rows * columns, rows * columns, -1).permute(2, 0, 1)
    more = q.shape[2] - rows * columns
    logits = (q * q.shape[-1] ** -0.5) @ k.mT + F.pad(bias, (0, more, 0, more))
    if mask is not None:
        logits = (logits.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
    return attention.proj(rearrange(logits.softmax(-1) @ v, "n head p d -> n p (head d)"))


def _normed(norm, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def _like(y: Tensor, x: Tensor) -> Tensor:
    return y.contiguous() if x.is_contiguous() else y.contiguous(memory_format=torch.channels_last)


def swin(case: Case) -> SwinBlock:
    options = {"window_size": case["window"], "shift": case["window"] // 2}
    return SwinBlock(case["channels"], WindowAttention2d(case["channels"], case["heads"], **options), mlp_ratio=2)


def overlapping(case: Case) -> OverlappingCrossAttention:
    return OverlappingCrossAttention(case["channels"], case["heads"], window_size=case["window"], zero_border=True)


def grid(case: Case) -> GridAttention:
    return GridAttention(case["channels"], case["heads"], grid_size=case["window"])


def hybrid(case: Case) -> HybridAttention:
    return HybridAttention(case["channels"], case["heads"], window_size=case["window"], global_size=TOKENS)


def benchmark(name: str, build, reference, peer: str, by_peer, work, **more) -> Benchmark:
    return Benchmark(
        name=name,
        cases=CASES,
        inputs=feature_map,
        build=build,
        providers={
            "reference": lambda block: lambda x: reference(block, x),
            "ours": lambda block: block,
            peer: lambda block: lambda x: by_peer(block, x),
            **more,
        },
        peer=peer,
        backward=True,
        work=work,
    )


SWIN = benchmark("swin_block", swin, swin_by_reference, "rolled", swin_by_rolling, work_of(8), timm=swin_by_timm)
OVERLAPPING = benchmark(
    *("overlapping_cross_attention", overlapping, overlapping_by_reference, "unfolded", overlapping_by_unfolding),
    work_of(4, overlap=0.5),
)
GRID = benchmark("grid_attention", grid, by_reference, "reshaped", grid_by_reshaping, work_of(4))
HYBRID = benchmark("hybrid_attention", hybrid, by_reference, "reshaped", hybrid_by_reshaping, work_of(4, TOKENS**2))

if __name__ == "__main__":
    raise SystemExit(main(SWIN, OVERLAPPING, GRID, HYBRID))
