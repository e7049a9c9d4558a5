"""The modulated convolution and its parts: its forms, its demodulation, and its epilogue.

The peer of each is what the usual code does: a kernel for each sample, (B, O, I, k, k), whose squares are summed up and
which a grouped convolution takes; and an epilogue of six operations.

python -m benchmarks.modulated_conv
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from claritycore.kernels import modulate, modulated_conv2d, noise_bias_act
from claritycore.kernels.modulated_conv import modulated_conv2d_flops, noise_bias_act_bytes, noise_bias_act_flops
from claritycore.kernels.modulated_conv.op_convolution import sums_of_squares

from .runner import Benchmark, Case, Work, main

CASES = [
    {"batch": batch, "channels": channels, "side": side}
    for batch, channels, side in ((4, 64, 32), (1, 64, 64), (4, 64, 64), (16, 64, 64), (4, 256, 32), (16, 512, 8))
]
MAPS = [{"batch": batch, "channels": 64, "side": side} for batch, side in ((1, 64), (4, 64), (1, 256))]


def inputs(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    batch, channels, side = case.values()
    return {
        "x": torch.randn(batch, channels, side, side, device=device, dtype=dtype),
        "weight": torch.randn(channels, channels, 3, 3, device=device, dtype=dtype),
        "style": 1 + 0.3 * torch.randn(batch, channels, device=device, dtype=dtype),
    }


def styles(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weight and style as `modulate` makes them of any, so that its result is what the others compute."""
    drawn = inputs(case, device, dtype)
    weight, style, _ = modulate(drawn["weight"], drawn["style"])
    return {"weight": weight, "style": style}


def operands(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    batch, channels, side = case.values()
    drawn = {
        "x": torch.randn(batch, channels, side, side, device=device, dtype=dtype),
        "bias": torch.randn(channels, device=device, dtype=dtype),
        "noise": torch.randn(batch, 1, side, side, device=device, dtype=dtype),
        "strength": torch.randn((), device=device, dtype=dtype),
        "demodulation": 0.5 + torch.rand(batch, channels, device=device, dtype=dtype),
    }
    # Of millions of numbers a few come so near the bend of the activation that rounding decides on their slope, in each
    # provider as it happens to: these are moved away from it.
    near = weighed(**drawn).abs() < 1e-2
    return drawn | {"x": torch.where(near, drawn["x"] + 0.1, drawn["x"])}


def convolution_work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    batch, channels, side = case.values()
    moved = dtype.itemsize * (2 * batch * channels * side * side + channels * channels * 9)
    flops = modulated_conv2d_flops(batch, channels, channels, side, side, 3)
    return Work(bytes=moved * (1 + backward), flops=flops * (3 if backward else 1))


def epilogue_work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    batch, channels, side = case.values()
    moved = noise_bias_act_bytes(batch, channels, side, side, itemsize=dtype.itemsize, backward=backward)
    return Work(bytes=moved, flops=noise_bias_act_flops(batch, channels, side, side) * (3 if backward else 1))


def materialised(x: Tensor, weight: Tensor, style: Tensor) -> Tensor:
    kernels = weight * style[:, None, :, None, None]
    kernels = kernels * torch.rsqrt(kernels.square().sum((2, 3, 4), keepdim=True) + 1e-8)
    y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), kernels.flatten(0, 1), padding=1, groups=len(x))
    return y.view(x.shape)


def materialised_demodulation(weight: Tensor, style: Tensor) -> Tensor:
    kernels = weight * style[:, None, :, None, None]
    return torch.rsqrt(kernels.square().sum((2, 3, 4)) + 1e-8)


def small_product(weight: Tensor, style: Tensor) -> Tensor:
    """Demodulation alone, without what keeps half precision in its range."""
    return torch.rsqrt(style.square() @ sums_of_squares(weight).mT + 1e-8)


def demodulation(weight: Tensor, style: Tensor) -> Tensor:
    return modulate(weight, style).out_scale


def weighed(x: Tensor, bias: Tensor, noise: Tensor, strength: Tensor, demodulation: Tensor) -> Tensor:
    """What is activated."""
    return x * demodulation[:, :, None, None] + strength * noise + bias[:, None, None]


def six_steps(**operands: Tensor) -> Tensor:
    return F.leaky_relu(weighed(**operands), 0.2) * 2**0.5


def by_form(form: str):
    return partial(modulated_conv2d, form=form)


MODULATED_CONV = Benchmark(
    name="modulated_conv2d",
    cases=CASES,
    inputs=inputs,
    providers={
        "reference": by_form("reference"),
        "auto": by_form("auto"),
        "scale": by_form("scale"),
        "grouped": by_form("grouped"),
        "materialised": materialised,
    },
    peer="materialised",
    backward=True,
    work=convolution_work,
)

DEMODULATION = Benchmark(
    name="demodulation",
    cases=[{"batch": 4, "channels": 64}, {"batch": 16, "channels": 512}],
    inputs=lambda case, device, dtype: styles({**case, "side": 1}, device, dtype),
    providers={"reference": materialised_demodulation, "small_product": small_product, "modulate": demodulation},
    peer="reference",
)

NOISE_BIAS_ACT = Benchmark(
    name="noise_bias_act",
    cases=MAPS,
    inputs=operands,
    providers={
        **{form: partial(noise_bias_act, backend=form) for form in ("reference", "torch", "triton")},
        "six_steps": six_steps,
    },
    peer="six_steps",
    cuda_only=["triton"],
    backward=True,
    work=epilogue_work,
)

if __name__ == "__main__":
    raise SystemExit(main(MODULATED_CONV, DEMODULATION, NOISE_BIAS_ACT))
