"""RRDBNet with both upsamplers and in both memory formats, against its figure written out.

It has no peer: other libraries write this net as the reference here does.

python -m benchmarks.rrdbnet
"""

import math
from collections.abc import Callable

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional as F

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


def by_hand(net: RRDBNet, image: Tensor) -> Tensor:
    """The figure of the paper, from the tensors of the state dict alone."""
    config, weights = net.config, dict(net.named_parameters())

    def conv(x: Tensor, name: str) -> Tensor:
        return F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1)

    def lrelu(x: Tensor) -> Tensor:
        return torch.where(x > 0, x, 0.2 * x)

    # With nearest+conv, x2 folds the image by 2 first and enlarges by 4.
    nearest = config.upsampler == "nearest+conv"
    fold, doublings = (2, 2) if nearest and config.scale == 2 else (1, int(math.log2(config.scale)))
    first = x = conv(rearrange(image, "b c (h i) (w j) -> b (c i j) h w", i=fold, j=fold), "conv_first")
    for i in range(config.num_block):
        block_input = x
        for j in (1, 2, 3):
            grown = [x]
            for k in (1, 2, 3, 4):
                grown.append(lrelu(conv(torch.cat(grown, 1), f"body.{i}.rdb{j}.conv{k}")))
            x = x + 0.2 * conv(torch.cat(grown, 1), f"body.{i}.rdb{j}.conv5")
        x = block_input + 0.2 * x
    x = first + conv(x, "conv_body")
    for stage in range(1, doublings + 1):
        if nearest:
            x = lrelu(conv(repeat(x, "b c h w -> b c (h 2) (w 2)"), f"conv_up{stage}"))
        else:
            x = rearrange(conv(x, f"conv_up{stage}.conv"), "b (c i j) h w -> b c (h i) (w j)", i=2, j=2)
    return conv(lrelu(conv(x, "conv_hr")), "conv_last")


def channels_last(net: RRDBNet) -> Callable[[Tensor], Tensor]:
    net = net.to(memory_format=torch.channels_last)
    return lambda image: net(image).contiguous()


BENCHMARK = Benchmark(
    name="rrdbnet",
    cases=CASES,
    inputs=image,
    build=build,
    providers={
        "reference": lambda net: lambda image: by_hand(net, image),
        "ours": lambda net: net,
        "channels_last": channels_last,
    },
    work=work,
)

if __name__ == "__main__":
    raise SystemExit(main(BENCHMARK))
