"""ResidualDenseBlock and RRDB, forward and backward, in both memory formats.

They have no peer: other libraries write these blocks as the reference here does.

python -m benchmarks.dense_blocks
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from claritycore.blocks import RRDB, ResidualDenseBlock

from .runner import Benchmark, Case, Work, main

CASES = [
    {"channels": channels, "growth": growth, "size": size, "memory_format": layout}
    for channels, growth, size in [(32, 16, 48), (64, 32, 64)]
    for layout in (torch.contiguous_format, torch.channels_last)
]


def feature_map(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    shape = 1, case["channels"], case["size"], case["size"]
    return {"x": torch.randn(shape, device=device, dtype=dtype).to(memory_format=case["memory_format"])}


def dense_work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    c, g, pixels = case["channels"], case["growth"], case["size"] ** 2
    macs = 9 * pixels * (sum((c + i * g) * g for i in range(4)) + (c + 4 * g) * c)
    return Work(bytes=2 * pixels * c * dtype.itemsize, flops=(3 if backward else 1) * 2 * macs)


def rrdb_work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    dense = dense_work(case, dtype, backward)
    return Work(bytes=dense.bytes, flops=3 * dense.flops)


def dense_by_hand(block: ResidualDenseBlock, x: Tensor) -> Tensor:
    """List of all maps so far, joined anew for each convolution."""
    grown = [x]
    for conv in (block.conv1, block.conv2, block.conv3, block.conv4):
        grown.append(F.leaky_relu(conv(torch.cat(grown, dim=1)), 0.2))
    return x + 0.2 * block.conv5(torch.cat(grown, dim=1))


def rrdb_by_hand(block: RRDB, x: Tensor) -> Tensor:
    y = x
    for dense in (block.rdb1, block.rdb2, block.rdb3):
        y = dense_by_hand(dense, y)
    return x + 0.2 * y


DENSE = Benchmark(
    name="residual_dense_block",
    cases=CASES,
    inputs=feature_map,
    build=lambda case: ResidualDenseBlock(case["channels"], growth_channels=case["growth"]),
    providers={"reference": lambda block: lambda x: dense_by_hand(block, x), "ours": lambda block: block},
    backward=True,
    work=dense_work,
)

RESIDUAL = Benchmark(
    name="rrdb",
    cases=CASES,
    inputs=feature_map,
    build=lambda case: RRDB(case["channels"], growth_channels=case["growth"]),
    providers={"reference": lambda block: lambda x: rrdb_by_hand(block, x), "ours": lambda block: block},
    backward=True,
    work=rrdb_work,
)

if __name__ == "__main__":
    raise SystemExit(main(DENSE, RESIDUAL))
