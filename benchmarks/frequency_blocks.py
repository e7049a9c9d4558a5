"""FreqSplit2d, kind by kind, SpectralMix2d and FrequencyCrossAttention, forward and backward.

The kinds of a split are different functions, so each is a benchmark of its own, at the same sizes: their times stand
side by side, that of "fft" first. Beside each stands what others write: two inverse transforms, two complex ones, a
blur by `F.conv2d`, slices, a pooling with its sizes looked up. The peer of SpectralMix2d is LaMa's FourierUnit without
its norm: the same convolutions on real and imaginary parts interleaved.

python -m benchmarks.frequency_blocks
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from claritycore.blocks import (
    FreqBands,
    FreqFuse,
    FreqSep,
    FreqSplit2d,
    FrequencyCrossAttention,
    HighPass,
    SpectralMix2d,
)

from .runner import Benchmark, Case, Work, main

LAYOUTS = (torch.contiguous_format, torch.channels_last)
SIZES = ((64, 64), (128, 128), (127, 129), (256, 256))
SPLIT_CASES = [{"channels": 64, "height": height, "width": width} for height, width in SIZES]
CASES = [
    {"channels": 48, "height": size, "width": size, "memory_format": layout}
    for size in (32, 64, 128)
    for layout in LAYOUTS
]


def feature_map(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    x = torch.randn(1, case["channels"], case["height"], case["width"], device=device, dtype=dtype)
    return {"x": x.contiguous(memory_format=case.get("memory_format", torch.contiguous_format))}


def map_bytes(case: Case, dtype: torch.dtype, maps: int, backward: bool) -> int:
    """So many maps in and out, and the gradients of all."""
    pixels = case["channels"] * case["height"] * case["width"]
    return (2 if backward else 1) * maps * pixels * dtype.itemsize


def split_work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    return Work(bytes=map_bytes(case, dtype, 3, backward))


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


# What others write


def mirrored(x: Tensor, before: int, after: tuple[int, int]) -> Tensor:
    return F.pad(x, (before, after[1], before, after[0]), mode="reflect")


def masked_spectrum(split: FreqSplit2d, x: Tensor, whole: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The spectrum of the padded map, and the mask of its low frequencies."""
    padded = mirrored(x, split.padding, (split.padding, split.padding))
    transform, frequencies = (torch.fft.fft2, torch.fft.fftfreq) if whole else (torch.fft.rfft2, torch.fft.rfftfreq)
    rows = torch.fft.fftfreq(padded.shape[2], device=x.device)[:, None]
    columns = frequencies(padded.shape[3], device=x.device)
    radius = 2 * (rows.square() + columns.square()).sqrt()
    mask = torch.exp(-((radius / split.cutoffs()[:, None, None]) ** 2) / 2)
    return padded, transform(padded), mask


def two_inverses(split: FreqSplit2d, x: Tensor) -> tuple[Tensor, Tensor]:
    padded, spectrum, mask = masked_spectrum(split, x, False)
    bands = [torch.fft.irfft2(spectrum * gain, s=padded.shape[2:]) for gain in (mask, 1 - mask)]
    return tuple(inner(band, split.padding, x) for band in bands)


def two_complex_inverses(split: FreqSplit2d, x: Tensor) -> tuple[Tensor, Tensor]:
    _, spectrum, mask = masked_spectrum(split, x, True)
    bands = [torch.fft.ifft2(spectrum * gain).real for gain in (mask, 1 - mask)]
    return tuple(inner(band, split.padding, x) for band in bands)


def inner(band: Tensor, padding: int, x: Tensor) -> Tensor:
    return band[..., padding : padding + x.shape[2], padding : padding + x.shape[3]].contiguous()


def blur_by_conv2d(split: FreqSplit2d, x: Tensor, both: bool = False) -> tuple[Tensor, Tensor]:
    """A depthwise convolution along each axis, or one over both."""
    sigma, radius = 1 / (math.pi * split.cutoff), split.receptive_radius
    taps = torch.exp(-(torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype) ** 2) / (2 * sigma**2))
    taps = taps / taps.sum()
    low, channels = mirrored(x, radius, (radius, radius)), x.shape[1]
    kernels = [taps[:, None] * taps] if both else [taps[:, None], taps[None]]
    for kernel in kernels:
        low = F.conv2d(low, kernel.expand(channels, 1, -1, -1), groups=channels)
    return low, x - low


def haar_by_slices(split: FreqSplit2d, x: Tensor) -> FreqBands:
    height, width = x.shape[2:]
    padded = F.pad(x, (0, width % 2, 0, height % 2), mode="replicate")
    a, b = padded[..., ::2, ::2], padded[..., ::2, 1::2]
    c, d = padded[..., 1::2, ::2], padded[..., 1::2, 1::2]
    bands = (a + b + c + d) / 2, (a + b - c - d) / 2, (a - b + c - d) / 2, (a - b - c + d) / 2
    low = (bands[0] / 2).repeat_interleave(2, 2).repeat_interleave(2, 3)[..., :height, :width].contiguous()
    return FreqBands(low, x - low, bands)


def avgpool_by_hand(split: FreqSplit2d, x: Tensor) -> FreqBands:
    pooled = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
    low = F.interpolate(pooled, scale_factor=2, mode="bilinear")[..., : x.shape[2], : x.shape[3]].contiguous()
    return FreqBands(low, x - low, (x - low, pooled))


def dct_by_fft(split: FreqSplit2d, x: Tensor) -> tuple[Tensor, Tensor]:
    """The same filter on the map and its mirror images, twice as high and wide."""
    height, width = x.shape[2:]
    whole = torch.cat([x, x.flip(2)], dim=2)
    whole = torch.cat([whole, whole.flip(3)], dim=3)
    rows = torch.fft.fftfreq(2 * height, device=x.device)[:, None]
    columns = torch.fft.rfftfreq(2 * width, device=x.device)
    radius = 2 * (rows.square() + columns.square()).sqrt()
    mask = torch.exp(-((radius / split.cutoffs()[:, None, None]) ** 2) / 2)
    low = torch.fft.irfft2(torch.fft.rfft2(whole) * mask, s=whole.shape[2:])[..., :height, :width].contiguous()
    return low, x - low


def laplacian_by_conv2d(split: FreqSplit2d, x: Tensor) -> tuple[Tensor, Tensor]:
    """Kornia's way: a blur of 5 x 5 taps in steps of two, and a transposed one back, weighted by what it hit."""
    taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=x.device, dtype=x.dtype) / 16
    kernel = (taps[:, None] * taps).expand(x.shape[1], 1, 5, 5)
    coarse = F.conv2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), kernel, stride=2, groups=x.shape[1])
    height, width = x.shape[2:]
    wide = F.pad(coarse, (1, 1, 1, 1), mode="replicate")
    low = F.conv_transpose2d(wide, 4 * kernel, stride=2, groups=x.shape[1])
    low = low[..., 4 : 4 + height, 4 : 4 + width].contiguous()
    return low, x - low


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


def split_benchmark(kind: str, others: dict, pyramid: bool) -> Benchmark:
    """One kind: its reference is the first of the others."""
    count = 3 if pyramid else 2
    first, *rest = others
    by_name = {"reference": others[first]} | {name: others[name] for name in rest}
    return Benchmark(
        name=f"freq_split_{kind}",
        cases=SPLIT_CASES,
        inputs=feature_map,
        build=lambda case: FreqSplit2d(case["channels"], kind=kind),
        providers={name: lambda split, by=by: lambda x: by(split, x)[:count] for name, by in by_name.items()}
        | {"ours": lambda split: lambda x: split(x)[:count]},
        peer=rest[0] if rest else "",
        backward=True,
        work=split_work,
    )


SPLITS = [
    split_benchmark("fft", {"two inverses": two_inverses, "complex": two_complex_inverses}, False),
    split_benchmark(
        "blur",
        {"conv2d": blur_by_conv2d, "conv2d of both": lambda split, x: blur_by_conv2d(split, x, both=True)},
        False,
    ),
    split_benchmark("haar", {"slices": haar_by_slices}, True),
    split_benchmark("avgpool", {"by hand": avgpool_by_hand}, True),
    split_benchmark("dct", {"mirror images": dct_by_fft}, False),
    split_benchmark("laplacian", {"conv2d": laplacian_by_conv2d}, False),
]

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
    raise SystemExit(main(*SPLITS, MIX, FUSE, SEP, EDGES, CROSS))
