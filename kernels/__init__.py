"""Functional ops: a readable reference, a fast plain-torch fallback and a Triton form of each."""

from .dispatch import Backend, Kernel

# Every kernel, for `claritycore doctor`.
KERNELS: tuple[Kernel, ...] = ()

__all__ = ["KERNELS", "Backend", "Kernel"]
