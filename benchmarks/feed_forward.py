"""GatedFFN, ConvGate, NAFBlock and ChannelAttention, forward and backward, in both memory formats.

Peers: F.glu for the gated convolution; NAFNet with its channels moved last and back for F.layer_norm; adaptive pooling
for the channel attention. Restormer's feed-forward block has none: it is written as ours is.

python -m benchmarks.feed_forward
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from claritycore.blocks import ChannelAttention, ConvGate, GatedFFN, LayerNorm2d, NAFBlock

from .runner import Benchmark, Case, Work, main

LAYOUTS = (torch.contiguous_format, torch.channels_last)
CASES = [
    {"channels": channels, "size": size, "memory_format": layout}
    for channels, size in [(32, 64), (48, 128), (96, 64)]
    for layout in LAYOUTS
]
NAF_CASES = [{**case, "window": window} for case in CASES for window in (None, 31)]
ATTENTION_CASES = [{**case, "form": form} for case in CASES for form in ("squeeze_excite", "efficient")]


def feature_map(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    shape = 1, case["channels"], case["size"], case["size"]
    return {"x": torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=case["memory_format"])}


def work(case: Case, dtype: torch.dtype, backward: bool, products: int) -> Work:
    """The map in and out, with the gradients of both; the products a pixel, thrice with backward."""
    pixels = case["size"] ** 2
    size = 2 * pixels * case["channels"] * dtype.itemsize
    return Work(bytes=(2 if backward else 1) * size, flops=2 * (3 if backward else 1) * pixels * products)


def ffn_work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    hidden = int(2.66 * case["channels"])
    return work(case, dtype, backward, 3 * hidden * case["channels"] + 9 * 2 * hidden)


def gate_work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    return work(case, dtype, backward, 18 * case["channels"] ** 2)


def naf_work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    c = case["channels"]
    return work(case, dtype, backward, 6 * c * c + 18 * c + (0 if case["window"] is None else c * c))


def attention_work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    return work(case, dtype, backward, case["channels"])


def ffn_by_hand(block: GatedFFN, x: Tensor) -> Tensor:
    """Each half by convolutions of its own, and the GELU written out."""
    weights = zip(block.project_in.weight.chunk(2), block.dwconv.weight.chunk(2), strict=True)
    a, b = (F.conv2d(F.conv2d(x, wide), deep, padding=1, groups=len(deep)) for wide, deep in weights)
    return F.conv2d(a * 0.5 * (1 + torch.erf(a / math.sqrt(2))) * b, block.project_out.weight)


def gate_by_hand(block: ConvGate, x: Tensor) -> Tensor:
    """Two convolutions, of the values and of the gate."""
    halves = zip(block.conv.weight.chunk(2), block.conv.bias.chunk(2), strict=True)
    value, gate = (F.conv2d(x, weight, bias, padding=1) for weight, bias in halves)
    return value / (1 + torch.exp(-gate))


def gate_by_glu(block: ConvGate, x: Tensor) -> Tensor:
    return F.glu(block.conv(x), dim=1)


def naf_by_hand(block: NAFBlock, x: Tensor, norm=None, pool=None) -> Tensor:
    norm, pool = norm or norm_by_hand, pool or mean_by_hand
    a, b = block.conv2(block.conv1(norm(block.norm1, x))).chunk(2, dim=1)
    u = a * b
    y = x + block.beta * block.conv3(u * block.sca[1](pool(u, block.sca[0].window_size)))
    a, b = block.conv4(norm(block.norm2, y)).chunk(2, dim=1)
    return y + block.gamma * block.conv5(a * b)


def norm_by_hand(norm: LayerNorm2d, x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
    return (x - mean) / torch.sqrt(variance + norm.eps) * norm.weight[:, None, None] + norm.bias[:, None, None]


def norm_by_permuting(norm: LayerNorm2d, x: Tensor) -> Tensor:
    y = F.layer_norm(x.permute(0, 2, 3, 1), norm.weight.shape, norm.weight, norm.bias, norm.eps).permute(0, 3, 1, 2)
    return y.contiguous() if x.is_contiguous() else y


def mean_by_hand(x: Tensor, window: int | None) -> Tensor:
    """Sums of a window as differences of running sums."""
    if window is None:
        return x.sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3])
    for dim in (2, 3):
        at = torch.arange(x.shape[dim], device=x.device)
        last, before = (at + window // 2).clamp(max=len(at) - 1), at - window // 2 - 1
        sums = x.cumsum(dim)
        inside = (before >= 0).to(x).view([-1 if d == dim else 1 for d in range(4)])
        counts = (last - before.clamp(min=-1)).to(x).view_as(inside)
        x = (sums.index_select(dim, last) - inside * sums.index_select(dim, before.clamp(min=0))) / counts
    return x


def mean_by_pooling(x: Tensor, window: int | None) -> Tensor:
    if window is None:
        return F.adaptive_avg_pool2d(x, 1)
    return F.avg_pool2d(x, window, stride=1, padding=window // 2, count_include_pad=False)


def attention_by_hand(block: ChannelAttention, x: Tensor, pool=mean_by_hand) -> Tensor:
    means = pool(x, None)[..., 0]
    if block.form == "efficient":
        scores = block.conv(means.mT).mT[..., None]
    else:
        first, second = block.conv_du[0], block.conv_du[2]
        hidden = F.relu(first.weight.flatten(1) @ means + first.bias[:, None])
        scores = (second.weight.flatten(1) @ hidden + second.bias[:, None])[..., None]
    return x / (1 + torch.exp(-scores))


def attention_by_pooling(block: ChannelAttention, x: Tensor) -> Tensor:
    means = F.adaptive_avg_pool2d(x, 1)
    if block.form == "efficient":
        return x * block.conv(means.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1).sigmoid()
    return x * block.conv_du(means).sigmoid()


FFN = Benchmark(
    name="gated_ffn",
    cases=CASES,
    inputs=feature_map,
    build=lambda case: GatedFFN(case["channels"]),
    providers={"reference": lambda block: lambda x: ffn_by_hand(block, x), "ours": lambda block: block},
    backward=True,
    work=ffn_work,
)

GATE = Benchmark(
    name="conv_gate",
    cases=CASES,
    inputs=feature_map,
    build=lambda case: ConvGate(case["channels"]),
    providers={
        "reference": lambda block: lambda x: gate_by_hand(block, x),
        "ours": lambda block: block,
        "glu": lambda block: lambda x: gate_by_glu(block, x),
    },
    peer="glu",
    backward=True,
    work=gate_work,
)

NAF = Benchmark(
    name="naf_block",
    cases=NAF_CASES,
    inputs=feature_map,
    build=lambda case: NAFBlock(case["channels"], window_size=case["window"]),
    providers={
        "reference": lambda block: lambda x: naf_by_hand(block, x),
        "ours": lambda block: block,
        "permute": lambda block: lambda x: naf_by_hand(block, x, norm_by_permuting, mean_by_pooling),
    },
    peer="permute",
    backward=True,
    work=naf_work,
)

ATTENTION = Benchmark(
    name="channel_attention",
    cases=ATTENTION_CASES,
    inputs=feature_map,
    build=lambda case: ChannelAttention(case["channels"], form=case["form"]),
    providers={
        "reference": lambda block: lambda x: attention_by_hand(block, x),
        "ours": lambda block: block,
        "adaptive pool": lambda block: lambda x: attention_by_pooling(block, x),
    },
    peer="adaptive pool",
    backward=True,
    work=attention_work,
)

if __name__ == "__main__":
    raise SystemExit(main(FFN, GATE, NAF, ATTENTION))
