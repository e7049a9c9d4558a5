"""Depthwise convolution, small kernels and large, with bias and activation in the same pass."""

from ..activations import ACTIVATIONS, Activation
from .op import KERNEL, depthwise_conv2d, depthwise_conv2d_bytes, depthwise_conv2d_flops
from .reference import depthwise_conv2d_reference

__all__ = [
    "ACTIVATIONS",
    "KERNEL",
    "Activation",
    "depthwise_conv2d",
    "depthwise_conv2d_bytes",
    "depthwise_conv2d_flops",
    "depthwise_conv2d_reference",
]
