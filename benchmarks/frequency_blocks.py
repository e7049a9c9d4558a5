"""FreqSplit2d, kind by kind, forward and backward.

The kinds of a split are different functions, so each is a benchmark of its own, at the same sizes: their times stand
side by side, that of "fft" first. Beside each stands what others write: two inverse transforms, two complex ones, a
blur by `F.conv2d`, slices, a pooling with its sizes looked up.

python -m benchmarks.frequency_blocks
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from claritycore.blocks import FreqBands, FreqSplit2d

from .runner import Benchmark, Case, Work, main

SIZES = ((64, 64), (128, 128), (127, 129), (256, 256))
SPLIT_CASES = [{"channels": 64, "height": height, "width": width} for height, width in SIZES]


def feature_map(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    x = torch.randn(1, case["channels"], case["height"], case["width"], device=device, dtype=dtype)
    return {"x": x.contiguous(memory_format=case.get("memory_format", torch.contiguous_format))}


def map_bytes(case: Case, dtype: torch.dtype, maps: int, backward: bool) -> int:
    """So many maps in and out, and the gradients of all."""
    pixels = case["channels"] * case["height"] * case["width"]
    return (2 if backward else 1) * maps * pixels * dtype.itemsize


def split_work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    return Work(bytes=map_bytes(case, dtype, 3, backward))


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

if __name__ == "__main__":
    raise SystemExit(main(*SPLITS))
