"""The definition of the selective scan: one loop over time, readable as the formula."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operand_rules import compute_dtype


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `selective_scan` by its formula; see there for the contract. Differentiable any number of times."""
    batch, channels, length = u.shape
    dtype = compute_dtype(u)
    out_dtype = out_dtype or u.dtype
    u, delta, A = u.to(dtype), delta.to(dtype), A.to(dtype)
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    state = u.new_zeros(batch, channels, A.shape[1]) if initial_state is None else initial_state.to(dtype)

    steps = list(zip(*(x.unbind(-1) for x in (u, delta, _by_time(B, u), _by_time(C, u))), strict=True))
    outputs = []
    for u_t, delta_t, B_t, C_t in reversed(steps) if reverse else steps:
        state = torch.exp(delta_t[..., None] * A) * state + (delta_t * u_t)[..., None] * B_t
        outputs.append((state * C_t).sum(-1))
    y = torch.stack(outputs[::-1] if reverse else outputs, dim=-1) if length else u.clone()

    if D is not None:
        y = y + D.to(dtype)[:, None] * u
    if z is not None:
        y = y * F.silu(z.to(dtype))
    y = y.to(out_dtype)
    return (y, state.clone()) if return_last_state else y


def _by_time(x: Tensor, u: Tensor) -> Tensor:
    """Give every channel its own row: (D, N), (B, N, L) or (B, G, N, L) becomes (B or 1, D, N, L)."""
    x = x.to(compute_dtype(u))
    if x.ndim == 2:
        return x[None, :, :, None].expand(-1, -1, -1, u.shape[-1])
    if x.ndim == 3:
        x = x[:, None]
    return x.repeat_interleave(u.shape[1] // x.shape[1], dim=1)
