"""Splits of a map into low and high frequencies that add up to it again: Fourier, blur, Haar."""

from .op import (
    KERNEL,
    blur_split,
    blur_split_flops,
    frequency_split_bytes,
    haar_merge,
    haar_split,
    haar_split_flops,
)
from .op_fourier import Mask, fft_split, fft_split_flops, padding_of
from .operands import HIGHEST_CUTOFF, gaussian_sigma

__all__ = [
    "HIGHEST_CUTOFF",
    "KERNEL",
    "Mask",
    "blur_split",
    "blur_split_flops",
    "fft_split",
    "fft_split_flops",
    "frequency_split_bytes",
    "gaussian_sigma",
    "haar_merge",
    "haar_split",
    "haar_split_flops",
    "padding_of",
]
