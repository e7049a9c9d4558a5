"""The selective scan in Triton, backward.

The gradient of the states is a scan from the other end, and is cut into the same chunks in the same three steps as
forward. The states themselves come back from the checkpoints in two levels: a segment between two checkpoints is
replayed once, leaving its state every few steps in a scratch that stays in cache; then, the last few steps first, these
are replayed with all their states in registers and walked back. Nothing of the size of B D L N is ever in memory.

Gradients that sum over programs (A, B, C, D and the bias) are written apart and summed afterwards in a fixed order:
no atomics, the same bits each time.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fused import (
    Launch,
    _block,
    _load_channels,
    _load_constant,
    _load_delta,
    _load_projection,
    _row,
    _silu,
    _start,
    _way,
    launch_of,
)
from .operands import CHECKPOINT_STEPS, Operands
from .operands_rows import Rows, rows_of, time_first, time_last

REPLAY_STEPS, REPLAY_STEPS_WHEN_TIGHT = 4, 2
"""So many states are held in registers at once; more would spill, as four do in float64 and beside a gate, a constant B
or C, or another warp."""


@triton.jit
def _advance(state, step, stop, reading, N: tl.constexpr, B_CONSTANT: tl.constexpr, SOFTPLUS: tl.constexpr):
    """Return the state after a step, or as it is past the end."""
    A, constant_B, bias, u_ptr, delta_ptr, B_ptr, path, way, pitch, projection_pitch, within, mask, n = reading
    row = _row(path, way, tl.minimum(step, path.length - 1))
    at = row * pitch + within
    there = mask & (step < stop)
    u = tl.load(u_ptr + at, mask=there, other=0.0).to(state.dtype)
    delta = _load_delta(delta_ptr, at, there, bias, SOFTPLUS)[0]
    B = _load_projection(B_ptr + row * projection_pitch, constant_B, n, N, B_CONSTANT)
    return tl.exp2(delta[:, None] * A) * state + (delta * u)[:, None] * B


@triton.jit
def _backward_kernel(
    u_rows, delta_rows, A_ptr, B_rows, C_rows, D_ptr, z_rows, bias_ptr,
    checkpoints_ptr, grad_y_rows, entries_ptr, scratch_ptr,
    grad_u_rows, grad_delta_rows, grad_A_ptr, grad_B_rows, grad_C_rows, grad_D_ptr, grad_z_rows, grad_bias_ptr,
    grad_initial_ptr,
    path, pitch, projection_pitch, steps, channels, groups, checkpoints, batches,
    N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, INTERVAL: tl.constexpr, REPLAY: tl.constexpr,
    B_CONSTANT: tl.constexpr, C_CONSTANT: tl.constexpr, SOFTPLUS: tl.constexpr, DIRECTIONS: tl.constexpr,
):  # fmt: skip
    """Walk one chunk back from the gradient of the state that leaves it."""
    dtype: tl.constexpr = entries_ptr.dtype.element_ty
    chunk = tl.program_id(1)
    batch, group, d, within, mask = _block(channels, groups, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    n_mask = n < N
    tile, tile_mask = d[:, None] * N + n[None, :], mask[:, None] & n_mask[None, :]
    A = tl.load(A_ptr + tile, mask=tile_mask, other=0.0).to(dtype) * 1.4426950408889634
    constant_B = _load_constant(B_rows, tile, tile_mask, dtype, B_CONSTANT)
    constant_C = _load_constant(C_rows, tile, tile_mask, dtype, C_CONSTANT)
    bias = _load_channels(bias_ptr, d, mask, dtype)
    D = _load_channels(D_ptr, d, mask, dtype)
    entry = batch * tl.num_programs(1) + chunk
    arriving = tl.load(entries_ptr + entry * channels * N + tile, mask=tile_mask, other=0.0)
    grad_A = tl.zeros([BLOCK_D, BLOCK_N], dtype)
    grad_constant_B = tl.zeros_like(constant_B)
    grad_constant_C = tl.zeros_like(constant_C)
    grad_D = tl.zeros([BLOCK_D], dtype)
    grad_bias = tl.zeros([BLOCK_D], dtype)
    block = (tl.program_id(0) % tl.cdiv(channels // groups, BLOCK_D)).to(tl.int64)  # within its group
    grad_B_ptr = _start(grad_B_rows, block * batches + batch, group)
    grad_C_ptr = _start(grad_C_rows, block * batches + batch, group)
    program = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + chunk) * (INTERVAL // REPLAY)
    inside = tl.arange(0, BLOCK_D)[:, None] * BLOCK_N + n[None, :]
    scratch_ptr += program * BLOCK_D * BLOCK_N + inside

    u_ptr, delta_ptr = _start(u_rows, batch, group), _start(delta_rows, batch, group)
    B_ptr, C_ptr = _start(B_rows, batch, group), _start(C_rows, batch, group)
    grad_y_ptr = _start(grad_y_rows, batch, group)
    grad_u_ptr, grad_delta_ptr = _start(grad_u_rows, batch, group), _start(grad_delta_rows, batch, group)
    if z_rows is not None:
        z_ptr, grad_z_ptr = _start(z_rows, batch, group), _start(grad_z_rows, batch, group)
    way = _way(path, batch, group, DIRECTIONS)
    reading = A, constant_B, bias, u_ptr, delta_ptr, B_ptr, path, way, pitch, projection_pitch, within, mask, n
    first, stop = chunk * steps, tl.minimum(path.length, (chunk + 1) * steps)
    segments = tl.cdiv(stop - first, INTERVAL)
    for k in range(0, segments):
        segment = first + (segments - 1 - k) * INTERVAL
        checkpoint = (batch * checkpoints + segment // INTERVAL) * channels * N
        state = tl.load(checkpoints_ptr + checkpoint + tile, mask=tile_mask, other=0.0)
        replays = tl.cdiv(tl.minimum(stop - segment, INTERVAL), REPLAY)
        tl.debug_barrier()  # the scratch of the segment before has been read
        for r in range(0, replays):
            tl.store(scratch_ptr + r * BLOCK_D * BLOCK_N, state)
            for i in tl.static_range(REPLAY):
                state = _advance(state, segment + r * REPLAY + i, stop, reading, N, B_CONSTANT, SOFTPLUS)
        tl.debug_barrier()  # and that of this one is written

        for q in range(0, replays):
            r = replays - 1 - q
            state = tl.load(scratch_ptr + r * BLOCK_D * BLOCK_N)
            states = (state,)
            for i in tl.static_range(REPLAY):
                state = _advance(state, segment + r * REPLAY + i, stop, reading, N, B_CONSTANT, SOFTPLUS)
                states = states + (state,)  # noqa: RUF005  (Triton knows no unpacking here)
            for j in tl.static_range(REPLAY):
                step = segment + r * REPLAY + (REPLAY - 1 - j)
                row = _row(path, way, tl.minimum(step, path.length - 1))
                there = mask & (step < stop)
                at = row * pitch + within
                u = tl.load(u_ptr + at, mask=there, other=0.0).to(dtype)
                grad_y = tl.load(grad_y_ptr + at, mask=there, other=0.0).to(dtype)
                delta, slope = _load_delta(delta_ptr, at, there, bias, SOFTPLUS)
                B = _load_projection(B_ptr + row * projection_pitch, constant_B, n, N, B_CONSTANT)
                C = _load_projection(C_ptr + row * projection_pitch, constant_C, n, N, C_CONSTANT)
                if z_rows is not None:
                    gate, gate_slope = _silu(tl.load(z_ptr + at, mask=there, other=0.0).to(dtype))
                    y = tl.sum(states[REPLAY - j] * C, axis=1) + D * u
                    grad_z = grad_y * y * gate_slope
                    tl.store(grad_z_ptr + at, grad_z.to(grad_z_ptr.dtype.element_ty), mask=there)
                    grad_y *= gate

                grad_state = arriving + grad_y[:, None] * C
                grad_B = grad_state * (delta * u)[:, None]
                grad_C = states[REPLAY - j] * grad_y[:, None]
                partial = row * N + n
                partial_mask = n_mask & (step < stop)
                if B_CONSTANT:
                    grad_constant_B += grad_B
                else:
                    tl.store(grad_B_ptr + partial, tl.sum(grad_B, axis=0), mask=partial_mask)
                if C_CONSTANT:
                    grad_constant_C += grad_C
                else:
                    tl.store(grad_C_ptr + partial, tl.sum(grad_C, axis=0), mask=partial_mask)

                grad_input = tl.sum(grad_state * B, axis=1)  # of delta * u
                arriving = grad_state * tl.exp2(delta[:, None] * A)
                grad_exponent = arriving * states[REPLAY - 1 - j]  # of delta * A
                grad_A += grad_exponent * delta[:, None]
                # A carries the factor log2(e) of exp2
                grad_delta = tl.sum(grad_exponent * A, axis=1) * 0.6931471805599453 + grad_input * u
                grad_delta = tl.where(there, grad_delta * slope, 0.0)
                grad_bias += grad_delta
                grad_D += grad_y * u
                grad_u = grad_input * delta + D * grad_y
                tl.store(grad_delta_ptr + at, grad_delta.to(grad_delta_ptr.dtype.element_ty), mask=there)
                tl.store(grad_u_ptr + at, grad_u.to(grad_u_ptr.dtype.element_ty), mask=there)

    tl.store(grad_A_ptr + entry * channels * N + tile, grad_A, mask=tile_mask)
    if B_CONSTANT:
        tl.store(grad_B_ptr + entry * channels * N + tile, grad_constant_B, mask=tile_mask)
    if C_CONSTANT:
        tl.store(grad_C_ptr + entry * channels * N + tile, grad_constant_C, mask=tile_mask)
    tl.store(grad_D_ptr + entry * channels + d, grad_D, mask=mask)
    tl.store(grad_bias_ptr + entry * channels + d, grad_bias, mask=mask)
    if grad_initial_ptr is not None and chunk == 0:
        tl.store(grad_initial_ptr + batch * channels * N + tile, arriving, mask=tile_mask)


class Sums(NamedTuple):
    """The gradients that are sums over programs, with the initial state's; before they are added up, part by part."""

    A: Tensor  # (B, chunks, D, N)
    B: Tensor  # (blocks, B, G, L, N), or as A where constant
    C: Tensor
    D: Tensor  # (B, chunks, D)
    delta_bias: Tensor
    initial_state: Tensor | None  # (B, D, N)

    def total(self) -> dict[str, Tensor | None]:
        """Add up: A, and B and C where constant, are (D, N), else (B, G, L, N); D and the bias are (D,)."""
        parts = {name: getattr(self, name) for name in ("A", "B", "C", "D", "delta_bias")}
        totals = {name: value.sum(0 if value.ndim == 5 else (0, 1)) for name, value in parts.items()}
        return totals | {"initial_state": self.initial_state}


def differentiate(
    launch: Launch,
    checkpoints: Tensor,
    grad_y: Rows,
    grad_last_state: Tensor | None,
    *,
    u: Rows,
    delta: Rows,
    z: Rows | None = None,
    initial_state: bool = False,
) -> Sums:
    """Write the gradients of u, delta and z; return the others."""
    per_chunk = launch.batch, launch.chunks, launch.channels, launch.state
    over_time = launch.blocks, launch.batch, launch.groups, launch.length, launch.state
    sums = Sums(
        A=launch.empty(*per_chunk),
        B=launch.empty(*(per_chunk if launch.B_constant else over_time)),
        C=launch.empty(*(per_chunk if launch.C_constant else over_time)),
        D=launch.empty(*per_chunk[:-1]),
        delta_bias=launch.empty(*per_chunk[:-1]),
        initial_state=launch.empty(launch.batch, *per_chunk[2:]) if initial_state else None,
    )
    B, C = (Rows(v) if v.ndim == 4 else Rows(v, v.stride(1), v.stride(2)) for v in (sums.B, sums.C))
    tight = launch.num_warps > 1 or launch.scan.z is not None or launch.B_constant or launch.C_constant
    replay = REPLAY_STEPS_WHEN_TIGHT if tight or checkpoints.dtype == torch.float64 else REPLAY_STEPS
    replays = launch.programs * launch.chunks * (CHECKPOINT_STEPS // replay)
    scratch = launch.empty(replays, launch.block_d, launch.block_n)
    with torch.cuda.device_of(checkpoints):
        _backward_kernel[launch.grid](
            *launch.scan, checkpoints.contiguous(), grad_y, launch.entries(grad_last_state, gradient=grad_y), scratch,
            *(u, delta, sums.A, B, C, sums.D, z, sums.delta_bias, sums.initial_state),
            **launch.sizes, **launch.options, **launch.constants,
            checkpoints=checkpoints.shape[1], batches=launch.batch, REPLAY=replay,
        )  # fmt: skip
    return sums


def backward(
    x: Operands, checkpoints: Tensor, grad_y: Tensor, grad_last_state: Tensor, softplus: bool, reverse: bool
) -> Operands:
    """Differentiate; see `Operands`."""
    if x.u.numel() == 0:
        gradients = x._make(None if v is None else torch.zeros_like(v) for v in x)
        return gradients if x.initial_state is None else gradients._replace(initial_state=grad_last_state.clone())
    batch, channels, length = x.u.shape
    named = {"u": x.u, "delta": x.delta} | ({} if x.z is None else {"z": x.z})
    over_time = {name: value.new_empty(batch, length, channels) for name, value in named.items()}
    sums = differentiate(
        launch_of(x, softplus, reverse),
        checkpoints,
        rows_of(time_first(grad_y), x.groups),
        grad_last_state,
        **{name: rows_of(value, x.groups) for name, value in over_time.items()},
        initial_state=x.initial_state is not None,
    )
    gradients = {name: time_last(value, torch.empty_like(named[name])) for name, value in over_time.items()}
    for name, total in sums.total().items():
        operand = getattr(x, name)
        if operand is not None:
            total = total.transpose(2, 3) if total.ndim == 4 else total
            gradients[name] = torch.empty_like(operand).copy_(total)
    return Operands(**dict.fromkeys(Operands._fields) | gradients)
