"""How the plain-torch scan lays out time: windows of chunks, the step first.

Inside a window of M chunks of T steps tensors are (T, M, B, G, D/G) without the state, (T, M, B, G, N) for B and C, and
(T, M, B, G, N, D/G) with the state.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .operands import CHECKPOINT_STEPS, Operands

WINDOW_ELEMENTS = 2**20
"""States in one window, for each thread of a CPU: few enough for its caches, enough to hide the cost of a call."""

WINDOW_ELEMENTS_ELSEWHERE = 2**24
"""The same on a GPU, where a call costs more and memory is fast."""


class Window(NamedTuple):
    """A run of steps in the order of the scan."""

    start: int
    stop: int

    @property
    def chunks(self) -> slice:
        """Which checkpoints it holds."""
        return slice(self.start // CHECKPOINT_STEPS, -(-self.stop // CHECKPOINT_STEPS))


class WindowOperands(NamedTuple):
    """The operands of one window, in its layout. Past the end `delta` is zero, which leaves the state as it is."""

    u: Tensor
    delta: Tensor
    B: Tensor
    C: Tensor
    z: Tensor | None


class Layout:
    """Moves tensors between the layout of the caller and that of a window."""

    def __init__(self, x: Operands, softplus: bool, reverse: bool, buffers: int) -> None:
        self.x, self.softplus, self.reverse = x, softplus, reverse
        self.batch, self.channels, self.length = x.u.shape
        self.step_elements = self.batch * self.channels * x.A.shape[1]
        self.steps = max(1, min(CHECKPOINT_STEPS, self.length))
        on_cpu = x.u.device.type == "cpu"
        elements = WINDOW_ELEMENTS * torch.get_num_threads() if on_cpu else WINDOW_ELEMENTS_ELSEWHERE
        chunk_elements = max(1, self.steps * self.step_elements)
        self.chunks = max(1, min(elements // chunk_elements, -(-self.length // self.steps)))
        self._buffers = x.u.new_empty(buffers, self.chunks * chunk_elements, dtype=x.dtype)
        self.A = self.load_channel_states(x.A)
        self.D = None if x.D is None else x.D.to(x.dtype).view(x.groups, -1)

    def windows(self) -> Iterator[Window]:
        """Cut the scan into windows."""
        span = self.chunks * self.steps
        for start in range(0, self.length, span):
            yield Window(start, min(start + span, self.length))

    def buffers(self, window: Window) -> list[Tensor]:
        """Uninitialised (T, M, B, G, N, D/G), the same memory for every window: fresh pages cost more than the work."""
        shape = self.steps, -(-(window.stop - window.start) // self.steps), self.batch, *self.A.shape
        return [buffer[: math.prod(shape)].view(shape) for buffer in self._buffers]

    def load(self, window: Window) -> WindowOperands:
        """Bring the operands of one window into its layout."""
        x = self.x
        raw = self._slice(x.delta, window).to(x.dtype)
        if x.delta_bias is not None:
            raw = raw + x.delta_bias.to(x.dtype)[:, None]
        delta = F.softplus(raw) if self.softplus else raw
        return WindowOperands(
            u=self.load_time(x.u, window),
            delta=self._fold(delta),
            B=self._load_projection(x.B, window),
            C=self._load_projection(x.C, window),
            z=None if x.z is None else self.load_time(x.z, window),
        )

    def load_time(self, x: Tensor, window: Window) -> Tensor:
        """(B, D, L) -> (T, M, B, G, D/G)."""
        return self._fold(self._slice(x, window).to(self.x.dtype))

    def store(self, target: Tensor, value: Tensor, window: Window) -> None:
        """Write (T, M, B, G, D/G), or (T, M, B, G, N), where it belongs in (B, D, L), or (B, G, N, L)."""
        value = value.flatten(3) if target.ndim == 3 else value
        length = window.stop - window.start
        value = value.transpose(0, 1).flatten(0, 1)[:length]
        self._slice(target, window).copy_(value.movedim(0, -1).flip(-1) if self.reverse else value.movedim(0, -1))

    def clear_past_end(self, value: Tensor, window: Window) -> None:
        """Set what (T, M, B, G, D/G) holds past the end of the window to zero."""
        past = -(window.stop - window.start) % self.steps
        if past:
            value[-past:, -1] = 0

    def load_states(self, x: Tensor) -> Tensor:
        """(B, M, D, N) -> (M, B, G, N, D/G)."""
        return x.to(self.x.dtype).unflatten(2, (self.x.groups, -1)).permute(1, 0, 2, 4, 3).contiguous()

    def store_states(self, x: Tensor) -> Tensor:
        """(M, B, G, N, D/G) -> (B, M, D, N)."""
        return x.permute(1, 0, 2, 4, 3).flatten(2, 3)

    def load_channel_states(self, x: Tensor) -> Tensor:
        """(D, N) -> (G, N, D/G)."""
        return self.load_states(x[None, None])[0, 0]

    def initial_state(self) -> Tensor:
        """The state before the first step, (B, G, N, D/G)."""
        x = self.x
        if x.initial_state is None:
            return x.u.new_zeros(self.batch, *self.A.shape, dtype=x.dtype)
        return self.load_states(x.initial_state[:, None])[0]

    def _load_projection(self, x: Tensor, window: Window) -> Tensor:
        """(B, G, N, L) -> (T, M, B, G, N), or (D, N) -> (G, N, D/G)."""
        if x.ndim == 2:
            return self.load_channel_states(x)
        return self._fold(self._slice(x, window).to(self.x.dtype).flatten(1, 2))

    def _slice(self, x: Tensor, window: Window) -> Tensor:
        if self.reverse:
            return x[..., self.length - window.stop : self.length - window.start]
        return x[..., window.start : window.stop]

    def _fold(self, x: Tensor) -> Tensor:
        """(B, R, steps of the window) -> (T, M, B, R), zero past the end; R splits into (G, R/G)."""
        x = x.flip(-1) if self.reverse else x.contiguous()
        missing = -x.shape[-1] % self.steps
        x = F.pad(x, (0, missing)) if missing else x
        x = x.unflatten(-1, (-1, self.steps)).permute(3, 2, 0, 1).contiguous()
        return x.unflatten(-1, (self.x.groups, -1))
