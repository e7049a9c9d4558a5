"""Attention within the windows of a map, of any size, with bias by offset: no roll, no padding, no mask."""

from .op import KERNEL, overlapping_window_attention, window_attention
from .operands import window_attention_bytes, window_attention_flops

__all__ = [
    "KERNEL",
    "overlapping_window_attention",
    "window_attention",
    "window_attention_bytes",
    "window_attention_flops",
]
