"""RRDBNet: both upsamplers, both memory formats, and autocast.

python -m benchmarks.rrdbnet
"""

import torch
from torch import Tensor, nn

from claritycore.deploy import summarize
from claritycore.nets import RRDBNet, RRDBNetConfig

from .runner import Benchmark, Case, Work, main

LITE = {"num_feat": 32, "num_block": 6, "num_grow_ch": 16}
CASES = [
    {"upsampler": upsampler, "scale": scale, "size": 48}
    for upsampler in ("pixelshuffle", "nearest+conv")
    for scale in (4, 2)
]


def image(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"image": torch.rand(1, 3, case["size"], case["size"], device=device, dtype=dtype)}


def build(case: Case) -> RRDBNet:
    return RRDBNet(RRDBNetConfig(scale=case["scale"], upsampler=case["upsampler"], **LITE))


def work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    macs = summarize(build(case), (1, 3, case["size"], case["size"])).macs
    return Work(bytes=3 * case["size"] ** 2 * (1 + case["scale"] ** 2) * dtype.itemsize, flops=2 * macs)


def channels_last(net: nn.Module) -> nn.Module:
    return net.to(memory_format=torch.channels_last)


BENCHMARK = Benchmark(
    name="rrdbnet",
    cases=CASES,
    inputs=image,
    build=build,
    providers={"reference": lambda net: net, "channels_last": channels_last},
    work=work,
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
