"""SPAN and PLKSR: as trained, deployed, and deployed in channels-last; and what a PLKBlock is made of.

"reference" is the training form in eval mode. The nets have no peer that installs without torchvision.

python -m benchmarks.span_plksr
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from claritycore.blocks import DoubleConvChannelMixer, ElementwiseAttention, reparameterize_model
from claritycore.deploy import summarize
from claritycore.nets import PLKSR, SPAN, PLKSRConfig, SPANConfig

from .runner import Benchmark, Case, Work, main

CASES = [{"scale": 4, "size": size} for size in (48, 64)]
MAPS = [{"channels": 64, "size": size} for size in (48, 96)]


def image(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"image": torch.rand(1, 3, case["size"], case["size"], device=device, dtype=dtype)}


def feature_map(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"x": torch.randn(1, case["channels"], case["size"], case["size"], device=device, dtype=dtype)}


def deployed(net: nn.Module) -> nn.Module:
    return reparameterize_model(net, inplace=True)


def deployed_channels_last(net: nn.Module) -> Callable[[Tensor], Tensor]:
    net = deployed(net).to(memory_format=torch.channels_last)
    return lambda image: net(image).contiguous()


def net_benchmark(name: str, build: Callable[[Case], nn.Module], tolerance: float) -> Benchmark:
    def work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
        macs = summarize(deployed(build(case).eval()), (1, 3, case["size"], case["size"])).macs
        return Work(bytes=3 * case["size"] ** 2 * (1 + case["scale"] ** 2) * dtype.itemsize, flops=2 * macs)

    providers = {
        "reference": lambda net: net,
        "deployed": deployed,
        "deployed_channels_last": deployed_channels_last,
    }
    options = {"cases": CASES, "inputs": image, "tolerance": {torch.float32: tolerance}}
    return Benchmark(name=name, build=build, providers=providers, work=work, **options)


def part_benchmark(name: str, build: Callable[[Case], nn.Module], by_hand: Callable[..., Tensor]) -> Benchmark:
    providers = {"reference": lambda block: lambda x: by_hand(block, x), "ours": lambda block: block}
    return Benchmark(name=name, cases=MAPS, inputs=feature_map, build=build, providers=providers, backward=True)


def gate_by_hand(block: ElementwiseAttention, x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-F.conv2d(x, block.conv.weight, block.conv.bias, padding=1)))


def mixer_by_hand(block: DoubleConvChannelMixer, x: Tensor) -> Tensor:
    hidden = F.conv2d(x, block.conv1.weight, block.conv1.bias, padding=1)
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    return F.conv2d(hidden, block.conv2.weight, block.conv2.bias, padding=1)


BENCHMARKS = [
    net_benchmark("span", lambda case: SPAN(SPANConfig(scale=case["scale"])), 1e-3),
    net_benchmark("plksr", lambda case: PLKSR(PLKSRConfig(scale=case["scale"], num_block=4, form="dilated")), 1e-4),
    part_benchmark("elementwise_attention", lambda case: ElementwiseAttention(case["channels"]), gate_by_hand),
    part_benchmark("double_conv_channel_mixer", lambda case: DoubleConvChannelMixer(case["channels"]), mixer_by_hand),
]

if __name__ == "__main__":
    raise SystemExit(main(*BENCHMARKS))
