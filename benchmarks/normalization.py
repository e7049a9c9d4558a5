"""LayerNorm2d and RMSNorm2d against their formulas and against moving the channels last and back.

python -m benchmarks.normalization
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from claritycore.blocks import LayerNorm2d, RMSNorm2d

from .runner import Benchmark, Case, Work, main

CASES = [
    {"batch": 1, "channels": channels, "size": size, "memory_format": layout}
    for channels, size in [(48, 128), (48, 512), (180, 256)]
    for layout in (torch.contiguous_format, torch.channels_last)
]


def feature_map(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    shape = case["batch"], case["channels"], case["size"], case["size"]
    return {"x": torch.randn(shape, device=device, dtype=dtype).to(memory_format=case["memory_format"])}


def work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    elements = case["batch"] * case["channels"] * case["size"] ** 2
    return Work(bytes=(5 if backward else 2) * elements * dtype.itemsize)  # x, y; and then x, dy, dx


def layer_norm_formula(norm: LayerNorm2d, x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(wide, dim=1, correction=0, keepdim=True)
    y = (wide - mean) / torch.sqrt(variance + norm.eps)
    return (y * norm.weight[:, None, None] + norm.bias[:, None, None]).to(x.dtype)


def rms_norm_formula(norm: RMSNorm2d, x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide / torch.sqrt(wide.square().mean(dim=1, keepdim=True) + norm.eps)
    return (y * norm.weight[:, None, None]).to(x.dtype)


def layer_norm_permuted(norm: LayerNorm2d, x: Tensor) -> Tensor:
    y = F.layer_norm(x.permute(0, 2, 3, 1), norm.weight.shape, norm.weight, norm.bias, norm.eps)
    return in_format_of(x, y.permute(0, 3, 1, 2))


def rms_norm_permuted(norm: RMSNorm2d, x: Tensor) -> Tensor:
    y = F.rms_norm(x.permute(0, 2, 3, 1), norm.weight.shape, norm.weight, norm.eps)
    return in_format_of(x, y.permute(0, 3, 1, 2))


def in_format_of(x: Tensor, y: Tensor) -> Tensor:
    return y.contiguous() if x.is_contiguous() else y.contiguous(memory_format=torch.channels_last)


LAYER_NORM = Benchmark(
    name="layer_norm_2d",
    cases=CASES,
    inputs=feature_map,
    build=lambda case: LayerNorm2d(case["channels"]),
    providers={
        "reference": lambda norm: lambda x: layer_norm_formula(norm, x),
        "ours": lambda norm: norm,
        "permute": lambda norm: lambda x: layer_norm_permuted(norm, x),
    },
    peer="permute",
    backward=True,
    work=work,
)

RMS_NORM = Benchmark(
    name="rms_norm_2d",
    cases=CASES,
    inputs=feature_map,
    build=lambda case: RMSNorm2d(case["channels"]),
    providers={
        "reference": lambda norm: lambda x: rms_norm_formula(norm, x),
        "ours": lambda norm: norm,
        "permute": lambda norm: lambda x: rms_norm_permuted(norm, x),
    },
    peer="permute",
    backward=True,
    work=work,
)

if __name__ == "__main__":
    raise SystemExit(main(LAYER_NORM, RMS_NORM))
