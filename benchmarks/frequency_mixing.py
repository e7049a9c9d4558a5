"""SpectralMix2d, FreqFuse, FreqSep, HighPass and FrequencyCrossAttention, forward and backward.

The peer of SpectralMix2d is LaMa's FourierUnit without its norm: the same convolutions on real and imaginary parts
interleaved. The references of the others are what one would write with torch alone.

python -m benchmarks.frequency_mixing
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from claritycore.blocks import FreqFuse, FreqSep, FrequencyCrossAttention, HighPass, SpectralMix2d

from .frequency_blocks import feature_map, map_bytes
from .runner import Benchmark, Case, Work, main

LAYOUTS = (torch.contiguous_format, torch.channels_last)
CASES = [
    {"channels": 48, "height": size, "width": size, "memory_format": layout}
    for size in (32, 64, 128)
    for layout in LAYOUTS
]


def mix_work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    half = case["height"] * (case["width"] // 2 + 1)
    products = 2 * (2 * case["channels"]) ** 2 * half
    return Work(bytes=map_bytes(case, dtype, 2, backward), flops=2 * (3 if backward else 1) * products)


def fuse_work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    return Work(bytes=map_bytes(case, dtype, 4, backward))


def edge_work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    return Work(bytes=map_bytes(case, dtype, 2, backward))


def attention_work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    pixels, c = case["height"] * case["width"], case["channels"]
    products = 2 * pixels * (4 * c * c + 2 * 64 * c)
    return Work(bytes=map_bytes(case, dtype, 4, backward), flops=2 * (3 if backward else 1) * products)


def mix_by_irfft2(block: SpectralMix2d, x: Tensor) -> Tensor:
    spectrum = torch.fft.rfft2(x, norm="ortho")
    y = block.conv2(F.relu(block.conv1(torch.cat([spectrum.real, spectrum.imag], dim=1))))
    real, imaginary = y.chunk(2, dim=1)
    y = x + torch.fft.irfft2(torch.complex(real, imaginary), s=x.shape[2:], norm="ortho")
    return y.contiguous(memory_format=torch.channels_last) if not x.is_contiguous() else y


def mix_by_fourier_unit(block: SpectralMix2d, x: Tensor) -> Tensor:
    """Real and imaginary parts one after the other in each channel, as FourierUnit stacks them."""
    batch, channels, height, width = x.shape
    order = torch.arange(2 * channels, device=x.device).view(2, channels).mT.flatten()
    first, second = block.conv1.weight[:, order], block.conv2.weight[order]
    spectrum = torch.fft.rfftn(x, dim=(-2, -1), norm="ortho")
    stacked = torch.stack((spectrum.real, spectrum.imag), dim=-1).permute(0, 1, 4, 2, 3).contiguous()
    y = F.relu(F.conv2d(stacked.view(batch, -1, *stacked.shape[3:]), first))
    y = F.conv2d(y, second)
    y = torch.view_as_complex(y.view(batch, channels, 2, *y.shape[2:]).permute(0, 1, 3, 4, 2).contiguous())
    y = x + torch.fft.irfftn(y, s=(height, width), dim=(-2, -1), norm="ortho")
    return y.contiguous(memory_format=torch.channels_last) if not x.is_contiguous() else y


def fuse_by_hand(block: FreqFuse, x: Tensor) -> Tensor:
    scores = block.gate.conv(block.gate.dwconv(torch.cat([x, x * x], dim=1)))
    low, high = (torch.sigmoid(scores) * torch.cat([x, x * x], dim=1)).chunk(2, dim=1)
    gain = block.max_gain * torch.tanh(block.high_weight)
    return x + block.low_weight[:, None, None] * low + gain[:, None, None] * high


def sep_by_hand(block: FreqSep, x: Tensor) -> Tensor:
    return block.fuse(x, block.split(x))


def sobel_by_conv2d(block: HighPass, x: Tensor) -> Tensor:
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=x.device, dtype=x.dtype) / 8
    kernels = torch.stack([kernel, kernel.mT]).repeat(x.shape[1], 1, 1)[:, None]
    slopes = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernels, groups=x.shape[1])
    y = torch.sqrt(slopes.square().unflatten(1, (-1, 2)).sum(2) + 1e-6) - 1e-3
    return y.contiguous(memory_format=torch.channels_last) if not x.is_contiguous() else y


def cross_by_sdpa(block: FrequencyCrossAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Windows cut out and multiplied by F.scaled_dot_product_attention; sizes that windows divide alone."""
    low, high = x, x * x
    normed = block.norm_low(low), block.norm_high(high)
    maps = []
    for own, part, pixels, others in (
        (low, block.to_low, normed[0], normed[1]),
        (high, block.to_high, normed[1], normed[0]),
    ):
        pixels, others = pixels.permute(0, 2, 3, 1), others.permute(0, 2, 3, 1)
        q, (k, v) = windows(part.q(pixels), block), (windows(t, block) for t in part.kv(others).chunk(2, dim=-1))
        side = block.window_size[0]
        at = torch.arange(side, device=x.device)
        offsets = at[:, None] - at + side - 1
        table = part.position_bias()[(offsets[:, None, :, None] * (2 * side - 1) + offsets[None, :, None]).flatten()]
        bias = table.view(side**2, side**2, -1).permute(2, 0, 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
        y = y * torch.sigmoid(windows(part.gate(pixels), block))
        maps.append(own + part.proj(back(y, x, side)).permute(0, 3, 1, 2))
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    return tuple(y.contiguous(memory_format=layout) for y in maps)


def windows(x: Tensor, block: FrequencyCrossAttention) -> Tensor:
    side = block.window_size[0]
    x = x.unflatten(1, (-1, side)).unflatten(3, (-1, side)).unflatten(5, (block.num_heads, -1))
    return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(0, 2)


def back(y: Tensor, x: Tensor, side: int) -> Tensor:
    rows, columns = x.shape[2] // side, x.shape[3] // side
    y = y.unflatten(0, (-1, rows, columns)).unflatten(4, (side, side)).permute(0, 1, 4, 2, 5, 3, 6)
    return y.flatten(5, 6).flatten(3, 4).flatten(1, 2)


def crossing(block: FrequencyCrossAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    return block((x, x * x))[:2]


MIX = Benchmark(
    name="spectral_mix",
    cases=CASES,
    inputs=feature_map,
    build=lambda case: SpectralMix2d(case["channels"]),
    providers={
        "reference": lambda block: lambda x: mix_by_irfft2(block, x),
        "ours": lambda block: block,
        "fourier unit": lambda block: lambda x: mix_by_fourier_unit(block, x),
    },
    peer="fourier unit",
    backward=True,
    work=mix_work,
)

FUSE = Benchmark(
    name="freq_fuse",
    cases=CASES,
    inputs=feature_map,
    build=lambda case: FreqFuse(case["channels"]),
    providers={
        "reference": lambda block: lambda x: fuse_by_hand(block, x),
        "ours": lambda block: lambda x: block(x, (x, x * x)),
    },
    backward=True,
    work=fuse_work,
)

SEP = Benchmark(
    name="freq_sep",
    cases=CASES,
    inputs=feature_map,
    build=lambda case: FreqSep(case["channels"]),
    providers={"reference": lambda block: lambda x: sep_by_hand(block, x), "ours": lambda block: block},
    backward=True,
    work=fuse_work,
)

EDGES = Benchmark(
    name="high_pass",
    cases=CASES,
    inputs=feature_map,
    build=lambda case: HighPass(case["channels"]),
    providers={
        "reference": lambda block: lambda x: sobel_by_conv2d(block, x),
        "ours": lambda block: block,
    },
    backward=True,
    work=edge_work,
)

CROSS = Benchmark(
    name="frequency_cross_attention",
    cases=CASES,
    inputs=feature_map,
    build=lambda case: FrequencyCrossAttention(case["channels"], 4),
    providers={
        "reference": lambda block: lambda x: cross_by_sdpa(block, x),
        "ours": lambda block: lambda x: crossing(block, x),
    },
    backward=True,
    work=attention_work,
)

if __name__ == "__main__":
    raise SystemExit(main(MIX, FUSE, SEP, EDGES, CROSS))
