"""Functional ops: a readable reference, a fast plain-torch fallback and a Triton form of each."""

from .depthwise_conv2d import KERNEL as _depthwise_conv2d
from .depthwise_conv2d import depthwise_conv2d, depthwise_conv2d_reference
from .dispatch import Backend, Kernel
from .expert_routing import KERNEL as _expert_routing
from .expert_routing import expert_mlp, expert_mlp_reference, route_top_k, route_top_k_reference
from .frequency_split import KERNEL as _frequency_split
from .frequency_split import blur_split, fft_split, gaussian_sigma, haar_merge, haar_split
from .modulated_conv import KERNEL as _modulated_conv
from .modulated_conv import modulate, modulated_conv2d, noise_bias_act
from .noise_field import KERNEL as _noise_field
from .noise_field import noise_field
from .selective_scan import KERNEL as _selective_scan
from .selective_scan import selective_scan, selective_scan_reference
from .selective_scan_2d import KERNEL as _selective_scan_2d
from .selective_scan_2d import selective_scan_2d, selective_scan_2d_reference
from .window_attention import KERNEL as _window_attention
from .window_attention import overlapping_window_attention, window_attention

# Every kernel, for `claritycore doctor`.
KERNELS = (
    _depthwise_conv2d,
    _expert_routing,
    _frequency_split,
    _modulated_conv,
    _noise_field,
    _selective_scan,
    _selective_scan_2d,
    _window_attention,
)

__all__ = [
    "KERNELS",
    "Backend",
    "Kernel",
    "blur_split",
    "depthwise_conv2d",
    "depthwise_conv2d_reference",
    "expert_mlp",
    "expert_mlp_reference",
    "fft_split",
    "gaussian_sigma",
    "haar_merge",
    "haar_split",
    "modulate",
    "modulated_conv2d",
    "noise_bias_act",
    "noise_field",
    "overlapping_window_attention",
    "route_top_k",
    "route_top_k_reference",
    "selective_scan",
    "selective_scan_2d",
    "selective_scan_2d_reference",
    "selective_scan_reference",
    "window_attention",
]
