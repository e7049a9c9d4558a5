"""Selective scan (S6): the recurrence of Mamba, forward and backward."""

from .op import KERNEL, selective_scan, selective_scan_bytes, selective_scan_exponentials, selective_scan_flops
from .operands import LARGEST_STATE
from .reference import selective_scan_reference

__all__ = [
    "KERNEL",
    "LARGEST_STATE",
    "selective_scan",
    "selective_scan_bytes",
    "selective_scan_exponentials",
    "selective_scan_flops",
    "selective_scan_reference",
]
