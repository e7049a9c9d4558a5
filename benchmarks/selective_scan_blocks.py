"""SelectiveScan2d and SSMGlobalMixer against the same blocks with their pixels brought in order by hand.

python -m benchmarks.selective_scan_blocks
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from claritycore.blocks import SelectiveScan2d, SSMGlobalMixer
from claritycore.kernels.selective_scan import selective_scan

from .runner import Benchmark, Case, Work, main

CASES = [{"channels": channels, "size": size} for channels, size in [(32, 32), (48, 64), (96, 64)]]


def feature_map(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    return {"x": torch.randn(1, case["channels"], case["size"], case["size"], device=device, dtype=dtype)}


def work(directions: int, case: Case, dtype: torch.dtype, backward: bool) -> Work:
    c, pixels, state = case["channels"], case["size"] ** 2, 16
    inner, rank = 2 * c, -(-c // 16)
    macs = 3 * c * inner + 9 * inner + directions * inner * (2 * rank + 2 * state)
    exps = directions * inner * state * pixels
    passes = 3 if backward else 1
    flops = passes * (2 * macs * pixels + 9 * exps)  # 9 a step and state, by the convention of VMamba
    return Work(bytes=2 * c * pixels * dtype.itemsize, flops=flops, exps=(2 if backward else 1) * exps)


def stacked(block: SelectiveScan2d, x: Tensor, backend: str) -> Tensor:
    """Four sequences (or two) made by stack, transpose and flip, one scan of them, and the same ways back."""
    height, width = x.shape[2:]
    scans = len(block.directions)
    u, z = block.in_proj(x.permute(0, 2, 3, 1)).chunk(2, dim=-1)
    u = F.silu(block.conv2d(u.permute(0, 3, 1, 2).contiguous()))
    sequences = torch.stack([u.flatten(2), u.transpose(2, 3).flatten(2)], dim=1)
    if scans == 4:
        sequences = torch.cat([sequences, sequences.flip(-1)], dim=1)
    parts = torch.einsum("bkdl,kcd->bkcl", sequences, block.x_proj_weight)
    r, B, C = parts.split([block.dt_rank, block.d_state, block.d_state], dim=2)
    delta = torch.einsum("bkrl,kdr->bkdl", r, block.dt_projs_weight).flatten(1, 2)
    A, D, bias = -block.A_logs.float().exp(), block.Ds.float(), block.dt_projs_bias.float().flatten()
    options = {"delta_bias": bias, "delta_softplus": True, "out_dtype": torch.float32, "backend": backend}
    y = selective_scan(sequences.flatten(1, 2), delta, A, B, C, D, **options).unflatten(1, (scans, -1))
    y = y[:, :2] + y[:, 2:].flip(-1) if scans == 4 else y
    y = y[:, 0] + y[:, 1].unflatten(-1, (width, height)).transpose(2, 3).flatten(2)
    y = block.out_norm(y.transpose(1, 2).unflatten(1, (height, width)).to(x.dtype))
    return block.out_proj(y * F.silu(z)).permute(0, 3, 1, 2).contiguous()


def mixed(block: SSMGlobalMixer, x: Tensor, backend: str) -> Tensor:
    return x + block.gate[:, None, None] * stacked(block.scan, block.norm(x), backend)


SCAN = Benchmark(
    name="selective_scan_2d_block",
    cases=CASES,
    inputs=feature_map,
    build=lambda case: SelectiveScan2d(case["channels"]),
    providers={
        "reference": lambda block: partial(stacked, block, backend="torch"),
        "ours": lambda block: block,
        "stacked": lambda block: partial(stacked, block, backend="triton"),
    },
    peer="stacked",
    cuda_only=["stacked"],
    backward=True,
    work=partial(work, 4),
)

MIXER = Benchmark(
    name="ssm_global_mixer",
    cases=CASES,
    inputs=feature_map,
    build=lambda case: SSMGlobalMixer(case["channels"], gate=0.5),
    providers={
        "reference": lambda block: partial(mixed, block, backend="torch"),
        "ours": lambda block: block,
        "stacked": lambda block: partial(mixed, block, backend="triton"),
    },
    peer="stacked",
    cuda_only=["stacked"],
    backward=True,
    work=partial(work, 2),
)

if __name__ == "__main__":
    raise SystemExit(main(SCAN, MIXER))
