"""The selective scan in plain torch, fast: a window of many chunks is scanned with the steps of one chunk.

A scan of L steps would be L small operations. Instead a window of M chunks of T = 32 steps is laid out with the step
first, so that one operation advances every chunk by one step:

1. each chunk is scanned from a zero state, which gives the state that it adds at its end;
2. a loop over the M chunks carries the state across: a chunk as a whole decays it by exp(A * sum(delta)), exactly;
3. each chunk is scanned again, now from the state that enters it.

Windows follow one another, so memory is bounded whatever the length. Backward recomputes the states of a window from
its checkpoints and runs the same three steps from the other end. Nothing is ever divided by a decay.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .fallback_windows import Layout, Window, WindowOperands
from .operands import Operands

SOFTPLUS_THRESHOLD = 20.0
"""Above it torch's softplus is the identity."""


def forward(x: Operands, softplus: bool, reverse: bool, out_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Scan; see `Operands` for what comes back."""
    y, last_state, checkpoints = x.outputs(out_dtype)
    layout = Layout(x, softplus, reverse, buffers=2)
    state = layout.initial_state()
    for window in layout.windows():
        now, (decay, states) = layout.load(window), layout.buffers(window)
        _decay(now, layout.A, out=decay)
        _outer(now.delta * now.u, now.B, out=states)
        entries = _enter_forward(states, decay, _chunk_decay(now, layout.A), state)
        states[0].addcmul_(decay[0], entries)
        _chain(states.unbind(), decay.unbind()[1:], in_place=True)
        state = states[-1, -1].clone()
        checkpoints[:, window.chunks] = layout.store_states(entries)
        out = _before_gate(now, states, layout.D, spare=decay)
        layout.store(y, out if now.z is None else out.mul_(F.silu(now.z)), window)
    checkpoints[:, -1] = layout.store_states(state[None])[:, 0]
    last_state.copy_(checkpoints[:, -1])
    return y, last_state, checkpoints


def backward(
    x: Operands, checkpoints: Tensor, grad_y: Tensor, grad_last_state: Tensor, softplus: bool, reverse: bool
) -> Operands:
    """Differentiate; see `Operands`."""
    layout = Layout(x, softplus, reverse, buffers=3)
    gradients = _Gradients(x, layout)
    carried = layout.load_states(grad_last_state[:, None])[0]
    for window in reversed(list(layout.windows())):
        entries = layout.load_states(checkpoints[:, window.chunks])
        carried = gradients.add(window, entries, layout.load_time(grad_y, window), carried)
    return gradients.result(carried)


class _Gradients:
    """The gradients of the operands, filled window by window, the last one first."""

    def __init__(self, x: Operands, layout: Layout) -> None:
        self.x, self.layout = x, layout
        self.over_time = {
            name: torch.empty_like(value)
            for name, value in x._asdict().items()
            if value is not None and name in ("u", "delta", "B", "C", "z") and value.ndim > 2
        }
        self.summed = {name: torch.zeros_like(layout.A) for name in ("A", "B", "C") if name not in self.over_time}
        per_channel = x.u.new_zeros(x.groups, layout.channels // x.groups, dtype=x.dtype)
        self.summed |= {name: per_channel.clone() for name in ("D", "delta_bias")}

    def add(self, window: Window, entries: Tensor, grad: Tensor, carried: Tensor) -> Tensor:
        """Differentiate one window.

        Args:
            window: which steps.
            entries: the state that enters each chunk, (M, B, G, N, D/G).
            grad: the gradient of the output, (T, M, B, G, D/G).
            carried: the gradient of the state that leaves the window, (B, G, N, D/G).

        Returns:
            The gradient of the state that enters the window.
        """
        layout, now = self.layout, self.layout.load(window)
        decay, states, grad_states = layout.buffers(window)
        _decay(now, layout.A, out=decay)
        _outer(now.delta * now.u, now.B, out=states)
        states[0].addcmul_(decay[0], entries)
        _chain(states.unbind(), decay.unbind()[1:], in_place=True)
        if now.z is not None:
            gate = torch.sigmoid(now.z)
            slope = gate * (1 + now.z * (1 - gate))
            self._put("z", window, grad * _before_gate(now, states, layout.D, spare=grad_states) * slope)
            grad = grad * now.z * gate
        self._put("C", window, _outer_adjoint(states, grad, now.C, spare=grad_states))

        _outer(grad, now.C, out=grad_states)
        leaving = _enter_backward(grad_states, decay, _chunk_decay(now, layout.A), carried)
        grad_states[-1].add_(leaving)
        _chain(grad_states.unbind()[::-1], decay.unbind()[:0:-1], in_place=True)

        # decay becomes the gradient of delta * A: decay * previous state * gradient of the state.
        decay.mul_(grad_states)
        carried = decay[0, 0].clone()
        decay[0].mul_(entries)
        decay[1:].mul_(states[:-1])
        self.summed["A"] += _sum_time(decay, now.delta, spare=states)
        self._put("B", window, _outer_adjoint(grad_states, now.delta * now.u, now.B, spare=states))
        grad_input = _project(grad_states, now.B, spare=states)  # the gradient of delta * u
        grad_delta = torch.addcmul(decay.mul_(layout.A).sum(-2), grad_input, now.u)
        grad_u = grad_input * now.delta
        if layout.D is not None:
            self.summed["D"] += (grad * now.u).sum((0, 1, 2))
            grad_u.addcmul_(grad, layout.D)
        if layout.softplus:
            grad_delta.mul_(torch.where(now.delta > SOFTPLUS_THRESHOLD, 1.0, -torch.expm1(-now.delta)))
        layout.clear_past_end(grad_delta, window)
        self.summed["delta_bias"] += grad_delta.sum((0, 1, 2))
        self._put("u", window, grad_u)
        self._put("delta", window, grad_delta)
        return carried

    def result(self, carried: Tensor) -> Operands:
        """Collect the gradients; `carried` is that of the initial state."""
        x, store = self.x, self.layout.store_states
        gradients = dict(self.over_time)
        for name, value in self.summed.items():
            operand = getattr(x, name)
            if operand is not None:
                value = value.flatten() if operand.ndim == 1 else store(value[None, None])[0, 0]
                gradients[name] = torch.empty_like(operand).copy_(value)
        if x.initial_state is not None:
            gradients["initial_state"] = torch.empty_like(x.initial_state).copy_(store(carried[None])[:, 0])
        return Operands._make(gradients.get(name) for name in Operands._fields)

    def _put(self, name: str, window: Window, value: Tensor) -> None:
        if name in self.over_time:
            self.layout.store(self.over_time[name], value, window)
        else:
            self.summed[name] += value


def _decay(x: WindowOperands, A: Tensor, out: Tensor) -> None:
    """exp(delta * A) at each step, (T, M, B, G, N, D/G)."""
    torch.mul(x.delta.unsqueeze(-2), A, out=out).exp_()


def _chunk_decay(x: WindowOperands, A: Tensor) -> Tensor:
    """exp(A * sum(delta)): the product of a chunk's decays without the product, (M, B, G, N, D/G)."""
    return (x.delta.sum(0).unsqueeze(-2) * A).exp_()


def _before_gate(x: WindowOperands, states: Tensor, D: Tensor | None, spare: Tensor) -> Tensor:
    y = _project(states, x.C, spare)
    return y if D is None else y.addcmul_(x.u, D)


def _chain(values: Sequence[Tensor], decays: Sequence[Tensor], *, in_place: bool) -> Tensor:
    """Scan values[i + 1] += decays[i] * values[i], written back or not, and return the last."""
    last = values[0]
    for value, decay in zip(values[1:], decays, strict=True):
        last = torch.addcmul(value, decay, last, out=value if in_place else None)
    return last


def _enter_forward(states: Tensor, decay: Tensor, chunk_decay: Tensor, entry: Tensor) -> Tensor:
    """The state that enters each chunk, given the one that enters the first."""
    if states.shape[1] == 1:
        return entry[None]
    ends = _chain(states.unbind(), decay.unbind()[1:], in_place=False)
    return _carry(ends, chunk_decay, entry)


def _enter_backward(grad_states: Tensor, decay: Tensor, chunk_decay: Tensor, entry: Tensor) -> Tensor:
    """The gradient that enters each chunk from the next, given the one that enters the last."""
    if grad_states.shape[1] == 1:
        return entry[None]
    ends = decay[0] * _chain(grad_states.unbind()[::-1], decay.unbind()[:0:-1], in_place=False)
    return _carry(ends.flip(0), chunk_decay.flip(0), entry).flip(0)


def _carry(ends: Tensor, chunk_decay: Tensor, entry: Tensor) -> Tensor:
    """Carry a state over chunks that each decay it and add their own, and return it before each."""
    entries = torch.empty_like(ends)
    for chunk in range(len(ends)):
        entries[chunk] = entry
        entry = torch.addcmul(ends[chunk], chunk_decay[chunk], entry)
    return entries


# B and C vary over time as (T, M, B, G, N), or are constant as (G, N, D/G); `spare` is a buffer that may be written.


def _outer(x: Tensor, projection: Tensor, out: Tensor) -> None:
    """(T, M, B, G, D/G) -> (T, M, B, G, N, D/G)."""
    torch.mul(x.unsqueeze(-2), projection if projection.ndim == 3 else projection.unsqueeze(-1), out=out)


def _project(states: Tensor, projection: Tensor, spare: Tensor) -> Tensor:
    """Sum over the state: (T, M, B, G, N, D/G) -> (T, M, B, G, D/G)."""
    if projection.ndim == 3:
        return torch.mul(states, projection, out=spare).sum(-2)
    return torch.matmul(projection.unsqueeze(-2), states).squeeze(-2)


def _outer_adjoint(states: Tensor, x: Tensor, projection: Tensor, spare: Tensor) -> Tensor:
    """The gradient of `projection` in `_outer(x, projection)`, where that of the result is `states`."""
    if projection.ndim == 3:
        return _sum_time(states, x, spare)
    return torch.matmul(x.unsqueeze(-2), states.transpose(-1, -2)).squeeze(-2)


def _sum_time(states: Tensor, x: Tensor, spare: Tensor) -> Tensor:
    """Sum states * x over steps, chunks and batch: (G, N, D/G)."""
    return torch.mul(states, x.unsqueeze(-2), out=spare).sum((0, 1, 2))
