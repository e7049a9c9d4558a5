"""The scan over images, four directions at once, against sequences brought in order by stack, transpose and flip.

python -m benchmarks.selective_scan_2d
"""

from functools import partial

import torch
from torch import Tensor

from claritycore.kernels.selective_scan import selective_scan
from claritycore.kernels.selective_scan_2d import (
    DIRECTIONS,
    selective_scan_2d,
    selective_scan_2d_bytes,
    selective_scan_2d_exponentials,
    selective_scan_2d_flops,
)

from .runner import Benchmark, Case, Work, main

SMALL = [{"batch": 1, "channels": 96, "size": size, "state": 16} for size in (16, 32, 64)]
LARGE = [
    {"batch": batch, "channels": channels, "size": size, "state": state}
    for batch, channels, size, state in [(1, 192, 64, 16), (1, 192, 128, 16), (8, 192, 64, 16), (8, 192, 64, 1)]
]


def inputs(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor | bool]:
    channels, state, ways = case["channels"], case["state"], len(DIRECTIONS)
    image = case["size"], case["size"]
    draw = partial(torch.randn, device=device, dtype=dtype)
    return {
        "x": draw(case["batch"], *image, channels),
        "delta": 0.5 * draw(case["batch"], ways, *image, channels),
        "A": -torch.arange(1.0, state + 1, device=device).repeat(ways, channels, 1),
        "B": draw(case["batch"], ways, *image, state),
        "C": draw(case["batch"], ways, *image, state),
        "D": torch.ones(ways, channels, device=device),
        "delta_bias": torch.full((ways, channels), -4.0, device=device),
        "delta_softplus": True,
    }


def work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    sizes = case["batch"], case["size"], case["size"], case["channels"], case["state"]
    # Backward makes about 22 operations of each state where forward makes 9 by the usual count.
    return Work(
        bytes=selective_scan_2d_bytes(*sizes, itemsize=dtype.itemsize, backward=backward),
        flops=selective_scan_2d_flops(*sizes) * (31 / 9 if backward else 1),
        exps=selective_scan_2d_exponentials(*sizes, backward=backward),
    )


def sequences(x: Tensor) -> Tensor:
    """(B, 4, D, H, W) at pixel positions -> (B, 4, D, L) in the order of each direction."""
    columns = x[:, 1::2].transpose(3, 4)
    row, row_reversed, column, column_reversed = (*x[:, ::2].flatten(3).unbind(1), *columns.flatten(3).unbind(1))
    return torch.stack([row, column, row_reversed.flip(-1), column_reversed.flip(-1)], dim=1)


def stacked(x, delta, A, B, C, D, delta_bias, delta_softplus, scan=None):
    """The form of VMamba (`cross_scan_fwd`, `cross_merge_fwd`) and MambaIR (`SS2D.forward_core`) around a 1-D scan.

    They make delta, B and C from the sequences, hence in order; here these must be brought in order as x is.
    """
    _, height, width, _ = x.shape
    ways = len(DIRECTIONS)
    xs, delta, B, C = (sequences(v.movedim(-1, -3)) for v in (x[:, None].expand(-1, ways, -1, -1, -1), delta, B, C))
    per_channel = {"D": D.flatten(), "delta_bias": delta_bias.flatten(), "delta_softplus": delta_softplus}
    scan = scan or partial(selective_scan, out_dtype=torch.promote_types(x.dtype, torch.float32))
    y = scan(xs.flatten(1, 2), delta.flatten(1, 2), A.flatten(0, 1), B, C, **per_channel)
    y = y.unflatten(1, (ways, -1))
    y = y[:, :2] + y[:, 2:].flip(-1)
    y = y[:, 0].unflatten(-1, (height, width)) + y[:, 1].unflatten(-1, (width, height)).transpose(2, 3)
    return y.permute(0, 2, 3, 1).to(x.dtype).contiguous()


def around_mamba(**operands):
    """The same around the CUDA kernel of mamba_ssm, where that is installed."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return stacked(**operands, scan=selective_scan_fn)


SELECTIVE_SCAN_2D = Benchmark(
    name="selective_scan_2d",
    cases=LARGE if torch.cuda.is_available() else SMALL,
    inputs=inputs,
    providers={
        "reference": partial(selective_scan_2d, backend="reference"),
        "torch": partial(selective_scan_2d, backend="torch"),
        "triton": partial(selective_scan_2d, backend="triton"),
        "stacked": stacked,
        "mamba_ssm": around_mamba,
    },
    peer="stacked",
    cuda_only=["triton", "mamba_ssm"],
    backward=True,
    work=work,
)

if __name__ == "__main__":
    raise SystemExit(main(SELECTIVE_SCAN_2D))
