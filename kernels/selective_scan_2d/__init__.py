"""Selective scan over images: the recurrence of Mamba along rows, columns or any order, in several directions."""

from .op import (
    KERNEL,
    selective_scan_2d,
    selective_scan_2d_bytes,
    selective_scan_2d_exponentials,
    selective_scan_2d_flops,
)
from .operands import DIRECTIONS, Direction
from .reference import selective_scan_2d_reference

__all__ = [
    "DIRECTIONS",
    "KERNEL",
    "Direction",
    "selective_scan_2d",
    "selective_scan_2d_bytes",
    "selective_scan_2d_exponentials",
    "selective_scan_2d_flops",
    "selective_scan_2d_reference",
]
