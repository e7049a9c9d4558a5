"""The modulated blocks against the steps that they are made of, each a pass of its own.

python -m benchmarks.modulated_blocks
"""

import math
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
    # Of an image as noisy as chance alone the gate would be closed.
    return x, 0.5 + 0.02 * torch.randn(batch, 3, side, side, device=device, dtype=dtype)


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


def off_the_kink(block: ModulatedNoiseConv2d) -> ModulatedNoiseConv2d:
    """Move channels to either side of the leaky ReLU's kink, where rounding would decide what the gradient is."""
    with torch.no_grad():
        block.bias[0::2] = 8.0
        block.bias[1::2] = -8.0
    return block


def stirred(head: TextureHead) -> TextureHead:
    """Move the head off its start, where it adds nothing."""
    with torch.no_grad():
        head.to_image.weight.normal_(std=0.1)
        head.texture.noise.weight.fill_(1.0)
    return head


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    radius = math.ceil(3 * sigma)
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=x.device) / sigma) ** 2).to(x.dtype)
    kernel = torch.outer(taps, taps).div(taps.sum() ** 2).expand(x.shape[1], 1, -1, -1)
    return F.conv2d(F.pad(x, [radius] * 4, mode="reflect"), kernel, groups=x.shape[1])


def head_by_steps(head: TextureHead) -> Callable[[Tensor, Tensor], Tensor]:
    """Blurs of 2 r + 1 times 2 r + 1 taps, noise estimated by a convolution, and a kernel for each sample."""
    layer = by_steps(head.texture)

    def call(features: Tensor, image: Tensor) -> Tensor:
        mask = torch.tensor([1.0, -2.0, 1.0]).to(image)
        kernel = torch.outer(mask, mask).expand(image.shape[1], 1, 3, 3)
        second = F.conv2d(F.pad(image, [1] * 4, mode="replicate"), kernel, groups=image.shape[1])
        sharp = image - gaussian_blur(image, head.sigma)
        noises = math.sqrt(math.pi / 2) / 6 * second.abs().mean((1, 2, 3))
        metrics = torch.stack([noises, sharp.abs().mean((1, 2, 3))], 1)
        gate = torch.sigmoid(head.gate_bias - (metrics * head.gate_steepness.exp()).sum(1)).view(-1, 1, 1, 1)
        noise = NoiseField(1)(features).clamp(-3, 3) * gate
        texture = head.limit * torch.tanh(head.to_image(layer(features, metrics, noise)))
        return image + gate * (texture - gaussian_blur(texture, head.sigma))

    return call


def head_with_noise(head: TextureHead) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda features, image: head(features, image, NoiseField(1))


def added(make: Callable[[TextureHead], Callable[[Tensor, Tensor], Tensor]]):
    """Of the head's output, what it adds: beside the image, a wrong texture would look right."""
    return lambda head: lambda features, image: make(head)(features, image) - image


def itself(block: nn.Module) -> nn.Module:
    return block


MODULATED_NOISE_CONV = Benchmark(
    name="modulated_noise_conv",
    cases=CASES,
    inputs=inputs,
    build=lambda case: off_the_kink(ModulatedNoiseConv2d(64, 64, style_channels=STYLE)),
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
    build=lambda case: stirred(TextureHead(64)),
    providers={"reference": added(head_by_steps), "block": added(head_with_noise)},
    peer="reference",
)

if __name__ == "__main__":
    raise SystemExit(main(MODULATED_NOISE_CONV, MODULATED_CONV, NOISE_INJECTION, TEXTURE_HEAD))
