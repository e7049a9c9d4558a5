"""What every form of window attention takes: its operands, where its windows lie, and its rules."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..operand_rules import check_tensors, compute_dtype, like

EPSILON = 1e-12
"""Below this length a vector is no direction; cosine logits divide by it instead."""


class Axis(NamedTuple):
    """How windows cut one axis of the map.

    Every `dilation`-th pixel belongs together; among these, windows begin at `shift` + n * `window`, and one at a
    border is as much of a window as lies in the map. Keys come from `key_window` pixels around the same middle.
    """

    length: int
    window: int
    key_window: int
    shift: int
    dilation: int

    @property
    def origin(self) -> int:
        """How much of the first window lies before the map."""
        return (self.window - self.shift) % self.window

    @property
    def margin(self) -> int:
        """How far keys reach beyond the queries, on either side."""
        return (self.key_window - self.window) // 2

    @property
    def windows(self) -> int:
        """How many windows there are, those that differ by less than the dilation side by side."""
        # Rounded up without negative numbers, which exported graphs divide otherwise.
        tokens = (self.length + self.dilation - 1) // self.dilation
        return (tokens + self.origin + self.window - 1) // self.window * self.dilation

    @property
    def pairs(self) -> int:
        """How many pairs of a query and a key see each other along this axis, both in the map."""
        pairs = 0
        for first in range(self.dilation):
            tokens = len(range(first, self.length, self.dilation))
            for start in range(-self.origin, tokens, self.window):
                queries = min(start + self.window, tokens) - max(start, 0)
                key_start = start - self.margin
                pairs += queries * (min(key_start + self.key_window, tokens) - max(key_start, 0))
        return pairs


class Layout(NamedTuple):
    """Which keys each query sees, and how they are compared; pairs are (height, width)."""

    window: Sequence[int]
    key_window: Sequence[int]
    shift: Sequence[int]
    dilation: Sequence[int]
    num_heads: int
    scale: float
    cosine: bool
    zero_border: bool

    def axes(self, size: Sequence[int]) -> tuple[Axis, Axis]:
        """Return how height and width are cut."""
        cut = zip(size, self.window, self.key_window, self.shift, self.dilation, strict=True)
        height, width = (Axis(*numbers) for numbers in cut)
        return height, width


class Operands(NamedTuple):
    """The tensors of one call.

    The forms of this folder exchange freely: forward takes `Operands` and the layout and returns `y` (B, H, W, C), in
    the dtype of the queries, and the logarithm of the sum of exponentials (B, heads, H, W), in that of all arithmetic.
    Backward takes the same, both results and the gradient of `y`, and which gradients are wanted; it returns them with
    None in the place of the others.
    """

    qkv: Tensor
    """(B, H, W, 3C), or with `kv` the queries alone, (B, H, W, C)."""
    kv: Tensor | None
    """Keys and values of another map, (B, H, W, 2C)."""
    bias_table: Tensor | None
    logit_scale: Tensor | None
    tokens: Tensor | None
    """Keys and values that every window sees, (B, G, 2C)."""

    @property
    def channels(self) -> int:
        """C."""
        return self.qkv.shape[-1] // (3 if self.kv is None else 1)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all arithmetic."""
        return compute_dtype(self.qkv)

    def like(self, gradients: Mapping[str, Tensor]) -> tuple[Tensor | None, ...]:
        """Give each gradient that is there the strides and the dtype of its operand, with a copy where it must be."""
        named = self._asdict().items()
        return tuple(like(gradients[name], value) if name in gradients else None for name, value in named)

    @property
    def queries(self) -> Tensor:
        """(B, H, W, C)."""
        return self.qkv[..., : self.channels]

    @property
    def keys_and_values(self) -> Tensor:
        """(B, H, W, 2C)."""
        return self.qkv[..., self.channels :] if self.kv is None else self.kv


def window_attention_flops(
    layout: Layout, batch: int, height: int, width: int, channels: int, *, tokens: int = 0
) -> int:
    """Count the floating-point operations of one forward call: 4 C for each query and each key that it sees.

    Backward takes 2.5 times as many.
    """
    pairs = math.prod(axis.pairs for axis in layout.axes((height, width)))
    return 4 * batch * channels * (pairs + tokens * height * width)


def window_attention_bytes(
    batch: int, height: int, width: int, channels: int, *, itemsize: int = 4, backward: bool = False
) -> int:
    """Count the bytes that no window attention can avoid to move: qkv and y, and with `backward` the gradients too."""
    return itemsize * batch * height * width * channels * (12 if backward else 4)


def expanded_bias(table: Tensor, layout: Layout) -> Tensor:
    """Look up the bias of each query and key of a whole window: (heads, *window, *key_window).

    It depends on their offset alone, so that the keys of a query are a rectangle of the table: one strided copy, in
    place of a gather by N * N indices.
    """
    (rows, columns), (key_rows, key_columns) = layout.window, layout.key_window
    sides = rows + key_rows - 1, columns + key_columns - 1
    planes = table.T.reshape(-1, *sides).flip(1, 2).contiguous()
    head, row, column = planes.stride()
    shape = (len(planes), rows, columns, key_rows, key_columns)
    return planes.as_strided(shape, (head, row, column, row, column)).flip(1, 2)


def table_gradient(bias: Tensor, layout: Layout) -> Tensor:
    """Sum the gradient of `expanded_bias` into that of the table, in a fixed order."""
    (rows, columns), keys = layout.window, tuple(layout.key_window)
    sides = rows + keys[0] - 1, columns + keys[1] - 1
    patches = bias.flip(1, 2).reshape(-1, rows * columns, math.prod(keys)).transpose(1, 2)
    planes = torch.nn.functional.fold(patches, sides, keys)
    return planes.flip(2, 3).reshape(-1, math.prod(sides)).T


def check_operands(x: Operands, layout: Layout) -> None:
    """Raise unless the operands fit together and the layout is one."""
    optional = ("kv", "bias_table", "logit_scale", "tokens")
    check_tensors({name: v for name, v in x._asdict().items() if v is not None or name not in optional}, "qkv")
    check_layout(layout)
    if x.qkv.ndim != 4:
        raise ValueError(f"qkv must be (B, H, W, 3C), got shape {tuple(x.qkv.shape)}")
    batch, heads = x.qkv.shape[0], layout.num_heads
    if x.kv is None and (x.qkv.shape[3] % (3 * heads) or not x.qkv.shape[3]):
        raise ValueError(f"qkv must have 3 * {heads} * d channels for num_heads={heads}, got {x.qkv.shape[3]}")
    channels = x.channels
    if x.kv is not None:
        if channels % heads or not channels:
            raise ValueError(f"num_heads must divide the {channels} channels of the queries, got {heads}")
        _check_shape("kv", x.kv, (*x.qkv.shape[:3], 2 * channels), "(B, H, W, 2C)")
    if x.bias_table is not None:
        (rows, columns), (key_rows, key_columns) = layout.window, layout.key_window
        offsets = (rows + key_rows - 1) * (columns + key_columns - 1)
        _check_shape("bias_table", x.bias_table, (offsets, heads), "an offset a row, a head a column")
    if x.logit_scale is not None:
        _check_shape("logit_scale", x.logit_scale, (batch, heads), "(B, num_heads)")
    if x.tokens is not None:
        if x.tokens.ndim != 3:
            raise ValueError(f"tokens must be (B, G, 2C), got shape {tuple(x.tokens.shape)}")
        _check_shape("tokens", x.tokens, (batch, x.tokens.shape[1], 2 * channels), "(B, G, 2C)")


def check_layout(layout: Layout) -> None:
    """Raise unless windows, shifts and dilations are such."""
    if layout.num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {layout.num_heads}")
    for name, pair, least in (
        ("window_size", layout.window, 1),
        ("shift", layout.shift, 0),
        ("dilation", layout.dilation, 1),
    ):
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(f"{name} must be two integers of at least {least}, got {tuple(pair)}")
    if any(s >= w for s, w in zip(layout.shift, layout.window, strict=True)):
        raise ValueError(f"shift must be less than window_size {tuple(layout.window)}, got {tuple(layout.shift)}")
    wider = [k - w for k, w in zip(layout.key_window, layout.window, strict=True)]
    if min(wider) < 0 or any(extra % 2 for extra in wider):
        rule = f"window_size {tuple(layout.window)} plus an even number"
        raise ValueError(f"key_window_size must be {rule}, got {tuple(layout.key_window)}")


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must be {meaning} = {shape}, got shape {tuple(value.shape)}")
