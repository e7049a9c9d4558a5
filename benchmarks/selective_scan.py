"""The selective scan: our forms against the forms that others use, and against the exponentials it cannot avoid.

The floor that exp sets is one pass of exponentials over B D L N elements forward, and two with backward.

python -m benchmarks.selective_scan
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from claritycore.kernels.selective_scan import (
    selective_scan,
    selective_scan_bytes,
    selective_scan_exponentials,
    selective_scan_flops,
)

from .runner import Benchmark, Case, Work, main

SMALL = [{"batch": 1, "channels": 96, "length": length, "state": 16} for length in (256, 1024, 4096)]
LARGE = [
    {"batch": batch, "channels": channels, "length": length, "state": 16}
    for batch, channels, length in [(1, 768, 4096), (2, 192, 16384), (8, 384, 4096)]
]
LONGEST_MATERIALISED = 1024  # its backward takes time in the square of the length: minutes from here on


def inputs(case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor | bool]:
    batch, channels, length, state = case["batch"], case["channels"], case["length"], case["state"]
    draw = partial(torch.randn, device=device, dtype=dtype)
    return {
        "u": draw(batch, channels, length),
        "delta": 0.5 * draw(batch, channels, length),
        "A": -torch.arange(1.0, state + 1, device=device).repeat(channels, 1),
        "B": draw(batch, state, length),
        "C": draw(batch, state, length),
        "D": torch.ones(channels, device=device),
        "delta_bias": torch.full((channels,), -4.0, device=device),
        "delta_softplus": True,
    }


def work(case: Case, dtype: torch.dtype, backward: bool) -> Work:
    sizes = case["batch"], case["channels"], case["length"], case["state"]
    # Backward makes about 22 operations of each state where forward makes 9 by the usual count.
    return Work(
        bytes=selective_scan_bytes(*sizes, itemsize=dtype.itemsize, backward=backward),
        flops=selective_scan_flops(*sizes) * (31 / 9 if backward else 1),
        exps=selective_scan_exponentials(*sizes, backward=backward),
    )


def coefficients(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, delta_bias: Tensor) -> tuple[Tensor, Tensor]:
    """The decay and the drive of every state at every step, (B, D, L, N) each."""
    delta = F.softplus(delta.float() + delta_bias[:, None])
    return torch.exp(torch.einsum("bdl,dn->bdln", delta, A)), torch.einsum("bdl,bnl->bdln", delta * u, B.float())


def materialise_and_loop(u, delta, A, B, C, D, delta_bias, delta_softplus):
    """The plain form of mamba_ssm (`selective_scan_ref`): all coefficients first, then a loop over their slices."""
    if u.requires_grad and u.shape[-1] > LONGEST_MATERIALISED:
        raise NotImplementedError(f"its backward is quadratic: up to L = {LONGEST_MATERIALISED}")
    decay, drive = coefficients(u, delta, A, B, delta_bias)
    state, outputs = drive.new_zeros(drive[:, :, 0].shape), []
    for step in range(u.shape[-1]):
        state = decay[:, :, step] * state + drive[:, :, step]
        outputs.append(torch.einsum("bdn,bn->bd", state, C[:, :, step].float()))
    return (torch.stack(outputs, -1) + D[:, None] * u).to(u.dtype)


def blelloch_(decay: Tensor, x: Tensor) -> Tensor:
    """Scan (B, D, L, N) along L, a power of two, in place (Blelloch, Prefix Sums and Their Applications, 1990)."""
    length = x.shape[2]
    strides = [2**level for level in range(length.bit_length() - 1)]
    pairs = [(stride - 1, 2 * stride - 1, stride) for stride in strides]
    pairs += [(2 * stride - 1, 3 * stride - 1, stride) for stride in reversed(strides[:-1])]
    for left, right, stride in pairs:
        into = slice(right, None, 2 * stride)
        count = x[:, :, into].shape[2]
        before = slice(left, left + 2 * stride * count, 2 * stride)
        x[:, :, into].addcmul_(decay[:, :, into], x[:, :, before][:, :, :count])
        decay[:, :, into].mul_(decay[:, :, before][:, :, :count])
    return x


class BlellochScan(torch.autograd.Function):
    """A scan by up-sweep and down-sweep; its gradient is a scan from the other end."""

    @staticmethod
    def forward(ctx, decay, drive):
        missing = (1 << (drive.shape[2] - 1).bit_length()) - drive.shape[2]
        pad = (0, 0, 0, missing)
        states = blelloch_(F.pad(decay, pad), F.pad(drive, pad))[:, :, : drive.shape[2]]
        ctx.save_for_backward(decay, states)
        return states

    @staticmethod
    def backward(ctx, grad):
        decay, states = ctx.saved_tensors
        following = F.pad(decay[:, :, 1:], (0, 0, 0, 1)).flip(2)
        grad_drive = BlellochScan.apply(following, grad.flip(2)).flip(2)
        return F.pad(states[:, :, :-1], (0, 0, 1, 0)) * grad_drive, grad_drive


def blelloch(u, delta, A, B, C, D, delta_bias, delta_softplus):
    """The parallel scan of mamba.py: all coefficients first, then log2(L) sweeps over them."""
    states = BlellochScan.apply(*coefficients(u, delta, A, B, delta_bias))
    y = (states.transpose(1, 2) @ C.float().transpose(1, 2)[..., None]).squeeze(-1).transpose(1, 2)
    return (y + D[:, None] * u).to(u.dtype)


SELECTIVE_SCAN = Benchmark(
    name="selective_scan",
    cases=LARGE if torch.cuda.is_available() else SMALL,
    inputs=inputs,
    providers={
        "reference": partial(selective_scan, backend="reference"),
        "torch": partial(selective_scan, backend="torch"),
        "triton": partial(selective_scan, backend="triton"),
        "materialise and loop": materialise_and_loop,
        "blelloch": blelloch,
        "mamba_ssm": "mamba_ssm.ops.selective_scan_interface:selective_scan_fn",
    },
    peer="blelloch",
    cuda_only=("triton", "mamba_ssm"),
    backward=True,
    tolerance={torch.float32: 2e-5},
    work=work,
)

if __name__ == "__main__":
    raise SystemExit(main(SELECTIVE_SCAN))
