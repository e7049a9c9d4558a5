"""Depthwise convolution with small and large kernels in both layouts, against torch's own and its optimum.

The optimum forward is `plain` on a channels-last map; all that a contiguous one adds to it is copies, which
`depthwise_optimum` spares it: there the plain form is given a map that is channels-last already. In half precision a
call of `plain` may take minutes on a CPU from a width of 15 on: choose others by `--only /torch`.

python -m benchmarks.depthwise_conv2d
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from claritycore.kernels.depthwise_conv2d import depthwise_conv2d, depthwise_conv2d_bytes, depthwise_conv2d_flops

from .runner import Benchmark, Case, Work, main

SIZES = [(8, 256, 64), (1, 64, 256)] if torch.cuda.is_available() else [(1, 64, 64)]
CASES = [
    {"batch": batch, "channels": channels, "size": size, "kernel": kernel, "memory_format": layout}
    for batch, channels, size in SIZES
    for kernel in (7, 17, 21, 31)
    for layout in (torch.contiguous_format, torch.channels_last)
]


def inputs(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    batch, channels, size, kernel = (case[name] for name in ("batch", "channels", "size", "kernel"))
    x = torch.randn(batch, channels, size, size, device=device, dtype=dtype).to(memory_format=case["memory_format"])
    weight = torch.randn(channels, 1, kernel, kernel, device=device, dtype=dtype) / kernel
    return {"x": x, "weight": weight, "bias": torch.randn(channels, device=device, dtype=dtype)}


def work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    sizes = case["batch"], case["channels"], case["size"], case["size"], case["kernel"], case["kernel"]
    return Work(
        bytes=depthwise_conv2d_bytes(*sizes, itemsize=dtype.itemsize, backward=backward),
        flops=depthwise_conv2d_flops(*sizes) * (3 if backward else 1),
    )


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=x.shape[1])


def channels_last(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What a user can write: to channels-last and back."""
    y = plain(x.contiguous(memory_format=torch.channels_last), weight, bias)
    return y.contiguous() if x.is_contiguous() else y


DEPTHWISE_CONV2D = Benchmark(
    name="depthwise_conv2d",
    cases=CASES,
    inputs=inputs,
    providers={
        "reference": partial(depthwise_conv2d, backend="reference"),
        "torch": partial(depthwise_conv2d, backend="torch"),
        "triton": partial(depthwise_conv2d, backend="triton"),
        "plain": plain,
        "channels_last": channels_last,
    },
    peer="channels_last",
    cuda_only=["triton"],
    backward=True,
    work=work,
)


def inputs_and_twin(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    tensors = inputs(case, device, dtype)
    return {**tensors, "twin": tensors["x"].contiguous(memory_format=torch.channels_last)}


OPTIMUM = Benchmark(
    name="depthwise_optimum",
    cases=[case for case in CASES if case["memory_format"] is torch.contiguous_format],
    inputs=inputs_and_twin,
    providers={
        "reference": lambda x, weight, bias, twin: plain(twin, weight, bias),
        "ours": lambda x, weight, bias, twin: depthwise_conv2d(x, weight, bias),
    },
    work=work,
    compared=Tensor.contiguous,
)

if __name__ == "__main__":
    raise SystemExit(main(DEPTHWISE_CONV2D, OPTIMUM))
