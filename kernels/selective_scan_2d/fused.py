"""The selective scan over images in Triton: the kernels of the 1-D scan, given a path through the image.

The directions are groups of channels: x is read by all of them, delta, B and C are theirs alone, and each computes the
pixel of a step from its number. So no activation is permuted, flipped or repeated, forward or backward. What several
directions give to a pixel is written apart, unrounded, and added up afterwards in a fixed order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..selective_scan.fused import Launch
from ..selective_scan.fused_backward import differentiate
from ..selective_scan.operands_rows import Path, Rows, Scan
from .operands import Operands2d


@triton.jit
def _merge_kernel(apart_ptr, merged_ptr, directions, size, BLOCK: tl.constexpr):
    """Add up the directions of one image: (K, size) -> (size,)."""
    blocks = tl.cdiv(size, BLOCK)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    apart_ptr += image * directions * size + i
    total = tl.load(apart_ptr, mask=mask)
    for _ in range(1, directions):
        apart_ptr += size
        total += tl.load(apart_ptr, mask=mask)
    tl.store(merged_ptr + image * size + i, total.to(merged_ptr.dtype.element_ty), mask=mask)


def forward(x: Operands2d, directions: Sequence[int], softplus: bool, merge: bool) -> tuple[Tensor, Tensor]:
    """Scan; see `Operands2d` for what comes back."""
    y, checkpoints = x.outputs(merge)
    if y.numel() == 0:
        return y, checkpoints.zero_()
    apart = _apart(x, y) if merge else y
    _launch(x, directions, softplus).forward(_rows(apart.flatten(-3, -2)), checkpoints)
    return _merge(apart, y), checkpoints


def backward(
    x: Operands2d, directions: Sequence[int], checkpoints: Tensor, grad_y: Tensor, softplus: bool, merge: bool
) -> Operands2d:
    """Differentiate; see `Operands2d`."""
    if grad_y.numel() == 0:
        return Operands2d._make(None if v is None else torch.zeros_like(v) for v in x)._replace(order=None)
    grad_x, grad_delta = x.x.new_empty(x.x.shape), x.delta.new_empty(x.delta.shape)
    apart = _apart(x, grad_x)
    sums = differentiate(
        _launch(x, directions, softplus),
        checkpoints,
        _rows(_dense(grad_y)),
        None,
        u=_rows(apart.flatten(-3, -2)),
        delta=_rows(grad_delta.flatten(-3, -2)),
    ).total()
    named = {name: getattr(x, name) for name in ("A", "B", "C", "D", "delta_bias")}
    gradients = {name: sums[name].view(value.shape) for name, value in named.items() if value is not None}
    return x.like(gradients | {"x": _merge(apart, grad_x), "delta": grad_delta})


def _launch(x: Operands2d, directions: Sequence[int], softplus: bool) -> Launch:
    """Read the operands where they lie; copy only what has no pixels side by side."""
    batch, height, width, channels = x.x.shape
    B, C = (v.flatten(-3, -2) for v in (x.B, x.C))
    if not (B.stride(-1) == C.stride(-1) == 1 and B.stride(-2) == C.stride(-2)):
        B, C = B.contiguous(), C.contiguous()
    D, delta_bias = (None if v is None else v.flatten().contiguous() for v in (x.D, x.delta_bias))
    A = x.A.flatten(0, 1).contiguous()
    scan = Scan(_rows(_dense(x.x)), _rows(_dense(x.delta)), A, _rows(B), _rows(C), D, None, delta_bias)
    path = Path(height * width, order=None if x.order is None else x.order.contiguous())
    if any(code % 2 for code in directions):
        path = path._replace(height=height, width=width)
    pitches = {"pitch": channels, "projection_pitch": B.stride(-2)}
    return Launch(scan, path, tuple(directions), batch=batch, groups=len(directions), **pitches, softplus=softplus)


def _dense(x: Tensor) -> Tensor:
    """(..., H, W, D) -> (..., H * W, D), where each pixel follows upon the other."""
    x = x.flatten(-3, -2)
    return x if x.stride()[-2:] == (x.shape[-1], 1) else x.contiguous()


def _rows(x: Tensor) -> Rows:
    """Read (B, K, L, D), or (B, L, D), which all directions share."""
    return Rows(x, x.stride(0), x.stride(1) if x.ndim == 4 else 0)


def _apart(x: Operands2d, merged: Tensor) -> Tensor:
    """Make room for what each direction gives to `merged`; one direction needs none."""
    return merged if len(x.A) == 1 else merged.new_empty(x.delta.shape, dtype=x.dtype)


def _merge(apart: Tensor, merged: Tensor) -> Tensor:
    if apart is not merged:
        size = merged[0].numel()
        with torch.cuda.device_of(merged):
            _merge_kernel[(len(merged) * triton.cdiv(size, 1024),)](apart, merged, apart.shape[1], size, BLOCK=1024)
    return merged
