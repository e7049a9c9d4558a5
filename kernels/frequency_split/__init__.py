"""Splits of a map into low and high frequencies that add up to it again: Fourier, blur, Haar."""

from .fourier import Mask, fft_split
from .op import blur_split, haar_merge, haar_split
from .operands import gaussian_sigma

__all__ = ["Mask", "blur_split", "fft_split", "gaussian_sigma", "haar_merge", "haar_split"]
