"""The modulated blocks against the steps that they are made of, each a pass of its own.

python -m benchmarks.modulated_blocks
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from claritycore.blocks import ModulatedConv2d, ModulatedNoiseConv2d, NoiseField, NoiseInjection, TextureHead

from .runner import Benchmark, Case, main

CASES = [{"batch": batch, "channels": 64, "side": side} for batch, side in ((1, 64), (4, 64))]
STYLE = 64


class Layer(nn.Module):
    """`ModulatedConv2d` as a module of maps, styles and noise, which it does not take."""

    def __init__(self, resample: str | None) -> None:
        super().__init__()
        self.conv = ModulatedConv2d(64, 64, style_channels=STYLE, resample=resample)

    def forward(self, x: Tensor, style: Tensor, noise: Tensor) -> Tensor:
        return self.conv(x, style)


def inputs(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, side = case.values()
    x = torch.randn(batch, channels, side, side, device=device, dtype=dtype)
    style = torch.randn(batch, STYLE, device=device, dtype=dtype)
    return x, style, torch.randn(batch, 1, side, side, device=device, dtype=dtype)


def head_inputs(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    batch, channels, side = case.values()
    x = torch.randn(batch, channels, side, side, device=device, dtype=dtype)
    return x, torch.rand(batch, 3, side, side, device=device, dtype=dtype)


def materialised(layer: ModulatedConv2d, x: Tensor, style: Tensor) -> Tensor:
    kernels = layer.weight * layer.styles(x, style)[:, None, :, None, None]
    kernels = kernels * torch.rsqrt(kernels.square().sum((2, 3, 4), keepdim=True) + 1e-8)
    y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), kernels.flatten(0, 1), padding=1, groups=len(x))
    return y.view(len(x), -1, *x.shape[2:])


def by_steps(block: ModulatedNoiseConv2d) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def call(x: Tensor, style: Tensor, noise: Tensor) -> Tensor:
        y = materialised(block.conv, x, style) + block.noise.weight * noise
        return F.leaky_relu(y + block.bias[:, None, None], 0.2) * 2**0.5

    return call


def itself(block: nn.Module) -> nn.Module:
    return block


MODULATED_NOISE_CONV = Benchmark(
    name="modulated_noise_conv",
    cases=CASES,
    inputs=inputs,
    build=lambda case: ModulatedNoiseConv2d(64, 64, style_channels=STYLE),
    providers={"reference": by_steps, "block": itself},
    peer="reference",
    backward=True,
)

MODULATED_CONV = Benchmark(
    name="modulated_conv_block",
    cases=CASES,
    inputs=inputs,
    build=lambda case: Layer(None),
    providers={
        "reference": lambda layer: lambda x, style, noise: materialised(layer.conv, x, style) + 0 * noise,
        "block": lambda layer: lambda x, style, noise: layer(x, style, noise) + 0 * noise,
    },
    peer="reference",
    backward=True,
)

NOISE_INJECTION = Benchmark(
    name="noise_injection",
    cases=CASES,
    inputs=inputs,
    build=lambda case: NoiseInjection(),
    providers={
        "reference": lambda block: lambda x, style, noise: x + block.weight * noise + 0 * style.sum(),
        "block": lambda block: lambda x, style, noise: block(x, noise) + 0 * style.sum(),
    },
    backward=True,
)

TEXTURE_HEAD = Benchmark(
    name="texture_head",
    cases=CASES,
    inputs=head_inputs,
    build=lambda case: TextureHead(64),
    providers={
        "reference": lambda head: lambda features, image: head(features, image, NoiseField(1)),
        "without_noise": lambda head: (
            lambda features, image: head.eval()(features, image, torch.zeros_like(image[:, :1]))
        ),
    },
    tolerance=dict.fromkeys((torch.float32, torch.float64, torch.float16, torch.bfloat16), 0.2),
)

if __name__ == "__main__":
    raise SystemExit(main(MODULATED_NOISE_CONV, MODULATED_CONV, NOISE_INJECTION, TEXTURE_HEAD))
