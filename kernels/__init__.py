"""Functional ops: a readable reference, a fast plain-torch fallback and a Triton form of each."""

from .dispatch import Backend, Kernel
from .selective_scan import KERNEL as _selective_scan
from .selective_scan import selective_scan, selective_scan_reference
from .selective_scan_2d import KERNEL as _selective_scan_2d
from .selective_scan_2d import selective_scan_2d, selective_scan_2d_reference

# Every kernel, for `claritycore doctor`.
KERNELS = (_selective_scan, _selective_scan_2d)

__all__ = [
    "KERNELS",
    "Backend",
    "Kernel",
    "selective_scan",
    "selective_scan_2d",
    "selective_scan_2d_reference",
    "selective_scan_reference",
]
