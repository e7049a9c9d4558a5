"""Noise by coordinate against the noise of a generator, which is another with each batch, tile and device.

The peer shows what a generator's normal numbers cost: it draws beside the noise that is compared, and is dropped.

python -m benchmarks.noise_field
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from claritycore.kernels import noise_field
from claritycore.kernels.noise_field import noise_field_bytes, noise_field_flops

from .runner import Benchmark, Case, Work, main

CASES = [{"batch": b, "height": n, "width": n} for b, n in ((1, 64), (4, 64), (4, 256))]


def inputs(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"like": torch.zeros(case["batch"], 1, case["height"], case["width"], device=device, dtype=dtype)}


def work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    return Work(
        bytes=noise_field_bytes(*case.values(), itemsize=dtype.itemsize), flops=noise_field_flops(*case.values())
    )


def field(like: Tensor, backend: str) -> Tensor:
    samples = torch.arange(len(like), device=like.device)
    return noise_field(1, like.shape[2:], samples=samples, dtype=like.dtype, backend=backend)


def kept(make: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return zeros after the noise, of which no two ways agree."""

    def zeros(like: Tensor) -> Tensor:
        make(like)
        return like

    return zeros


NOISE_FIELD = Benchmark(
    name="noise_field",
    cases=CASES,
    inputs=inputs,
    providers={form: partial(field, backend=form) for form in ("reference", "torch", "triton")},
    cuda_only=["triton"],
    work=work,
)

GENERATOR = Benchmark(
    name="noise_field_generator",
    cases=CASES,
    inputs=inputs,
    providers={
        "reference": kept(partial(field, backend="reference")),
        "noise_field": kept(partial(field, backend="auto")),
        "randn_like": kept(torch.randn_like),
    },
    peer="randn_like",
    work=work,
)

if __name__ == "__main__":
    raise SystemExit(main(NOISE_FIELD, GENERATOR))
