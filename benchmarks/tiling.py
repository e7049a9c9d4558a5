"""restore_tiled against the net on the whole image: what exact tiles cost in time, and save in memory.

It has no peer: the tiles of other libraries do not give the pixels of the whole image.

python -m benchmarks.tiling
"""

import torch
from torch import Tensor

from claritycore.deploy import restore_tiled, summarize
from claritycore.nets import RRDBNet, RRDBNetConfig

from .runner import Benchmark, Case, Work, main

# A receptive radius of 19 pixels with one block and of 34 with two: what is read around a tile grows with it.
CASES = [{"blocks": blocks, "size": size} for size in (192, 384) for blocks in (1, 2)]


def build(case: Case) -> RRDBNet:
    return RRDBNet(RRDBNetConfig(scale=2, num_feat=32, num_block=case["blocks"], num_grow_ch=16))


def image(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"image": torch.rand(1, 3, case["size"], case["size"], device=device, dtype=dtype)}


def work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    macs = summarize(build(case), (1, 3, case["size"], case["size"])).macs
    return Work(bytes=3 * case["size"] ** 2 * (1 + 2**2) * dtype.itemsize, flops=2 * macs)


TILING = Benchmark(
    name="restore_tiled",
    cases=CASES,
    inputs=image,
    build=build,
    providers={
        "reference": lambda net: net,
        "tiles_of_96": lambda net: lambda image: restore_tiled(net, image, 96),
        "tiles_of_48": lambda net: lambda image: restore_tiled(net, image, 48),
        "tiles_of_48_by_4": lambda net: lambda image: restore_tiled(net, image, 48, batch=4),
    },
    work=work,
)

if __name__ == "__main__":
    raise SystemExit(main(TILING))
