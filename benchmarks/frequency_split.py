"""Splits into low and high frequencies side by side, and the forms of each.

Side by side the sums of their bands are compared (Haar: what merging gives), which are the map whatever the split;
adding up is not timed. The peer does as nets do that keep both bands in the Fourier domain: one transform forward, a
mask for each band, two back, on the map as it is; `fft_split` pads it to a smooth size besides.

python -m benchmarks.frequency_split
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from claritycore.kernels import blur_split, fft_split, gaussian_sigma, haar_merge, haar_split
from claritycore.kernels.frequency_split import (
    blur_split_flops,
    fft_split_flops,
    frequency_split_bytes,
    haar_split_flops,
)

from .runner import Benchmark, Case, Work, main

CUTOFF = 0.25
SIGMA = gaussian_sigma(CUTOFF)
FLOPS = {
    "fft": fft_split_flops,
    "blur": partial(blur_split_flops, sigma=SIGMA),
    "haar": haar_split_flops,
}
SIZES = [(64, 64), (128, 128), (127, 129), (256, 256)]
CASES = [{"channels": 64, "height": height, "width": width} for height, width in SIZES]


def inputs(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"x": torch.randn(1, *case.values(), device=device, dtype=dtype)}


def work(split: str, case: Case, dtype: torch.dtype, backward: bool) -> Work:
    sizes, maps = (1, *case.values()), 2 if split == "haar" else 3
    moved = frequency_split_bytes(*sizes, itemsize=dtype.itemsize, backward=backward, maps=maps)
    return Work(bytes=moved, flops=FLOPS[split](*sizes) * (2 if backward else 1))


def two_inverses(x: Tensor) -> tuple[Tensor, Tensor]:
    height, width = x.shape[2:]
    spectrum = torch.fft.rfft2(x.float())
    fy, fx = torch.fft.fftfreq(height, device=x.device)[:, None], torch.fft.rfftfreq(width, device=x.device)
    mask = torch.exp(-2 * (fy**2 + fx**2) / CUTOFF**2)
    low, high = (torch.fft.irfft2(spectrum * gain, s=(height, width)).to(x.dtype) for gain in (mask, 1 - mask))
    return low, high


def together(bands: tuple[Any, Any]) -> Tensor:
    """The map again, of low and high or of what `haar_split` gives."""
    return torch.add(*bands) if isinstance(bands[0], Tensor) else haar_merge(*bands)


def bands(x: Tensor, backend: str) -> Sequence[Tensor]:
    return haar_split(x, backend=backend)[0]


FREQUENCY_SPLIT = Benchmark(
    name="frequency_split",
    cases=CASES,
    inputs=inputs,
    providers={
        "reference": partial(fft_split, cutoff=CUTOFF),
        "two_inverses": two_inverses,
        "blur": partial(blur_split, sigma=SIGMA),
        "haar": haar_split,
    },
    compared=together,
    peer="two_inverses",
    backward=True,
    work=partial(work, "fft"),
)

BLUR_SPLIT = Benchmark(
    name="blur_split",
    cases=CASES,
    inputs=inputs,
    providers={form: partial(blur_split, sigma=SIGMA, backend=form) for form in ("reference", "torch", "triton")},
    cuda_only=["triton"],
    backward=True,
    work=partial(work, "blur"),
)

HAAR_SPLIT = Benchmark(
    name="haar_split",
    cases=CASES,
    inputs=inputs,
    providers={form: partial(bands, backend=form) for form in ("reference", "torch", "triton")},
    cuda_only=["triton"],
    backward=True,
    work=partial(work, "haar"),
)

if __name__ == "__main__":
    raise SystemExit(main(FREQUENCY_SPLIT, BLUR_SPLIT, HAAR_SPLIT))
