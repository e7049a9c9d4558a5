"""Convolution whose kernel a style scales for each sample, and what follows it in one pass."""

from .op import KERNEL, noise_bias_act, noise_bias_act_bytes, noise_bias_act_flops
from .op_convolution import Form, Modulation, modulate, modulated_conv2d, modulated_conv2d_flops
from .operands import GAINS, Activation

__all__ = [
    "GAINS",
    "KERNEL",
    "Activation",
    "Form",
    "Modulation",
    "modulate",
    "modulated_conv2d",
    "modulated_conv2d_flops",
    "noise_bias_act",
    "noise_bias_act_bytes",
    "noise_bias_act_flops",
]
