"""How time and memory of the kernels grow: with pixels, states, experts and k, windows and kernels; a picture each.

The providers are those of the kernels' own benchmarks; --only scaling_state/ chooses one sweep.

python -m benchmarks.scaling --plot
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from .depthwise_conv2d import DEPTHWISE_CONV2D
from .expert_routing import EXPERT_ROUTING
from .runner import main
from .selective_scan import SELECTIVE_SCAN
from .selective_scan_2d import SELECTIVE_SCAN_2D
from .window_attention import WINDOW_ATTENTION

MAP = {"batch": 1, "channels": 64, "size": 64}
ROUTED = {"tokens": 4096, "channels": 64, "hidden": 128}
WINDOWS = {"batch": 1, "size": 64, "channels": 96, "heads": 6}

BENCHMARKS = [
    replace(
        SELECTIVE_SCAN_2D,
        name="scaling_pixels",
        cases=[{"batch": 1, "channels": 96, "size": size, "state": 16} for size in (8, 16, 32, 64)],
    ),
    replace(
        SELECTIVE_SCAN,
        name="scaling_state",
        cases=[{"batch": 1, "channels": 96, "length": 1024, "state": state} for state in (1, 4, 16, 64)],
    ),
    replace(
        EXPERT_ROUTING,
        name="scaling_experts",
        cases=[{**ROUTED, "experts": experts, "k": 2} for experts in (2, 4, 8, 16, 32)],
    ),
    replace(
        EXPERT_ROUTING,
        name="scaling_k",
        cases=[{**ROUTED, "experts": 8, "k": k} for k in (1, 2, 4, 8)],
    ),
    replace(
        WINDOW_ATTENTION,
        name="scaling_window",
        cases=[{**WINDOWS, "window": window, "shift": 2} for window in (4, 8, 16, 32)],
    ),
    replace(
        DEPTHWISE_CONV2D,
        name="scaling_kernel",
        cases=[{**MAP, "kernel": k, "memory_format": torch.contiguous_format} for k in (3, 7, 11, 15, 19, 25, 31)],
    ),
]

# What the picture of each shows.
SWEEPS: Mapping[str, str] = {
    "scaling_pixels": "selective_scan_2d against the side of the map",
    "scaling_state": "selective_scan against the number of states",
    "scaling_experts": "expert_mlp against the number of experts, of which each token takes 2",
    "scaling_k": "expert_mlp against k, of 8 experts",
    "scaling_window": "window_attention against the side of a window",
    "scaling_kernel": "depthwise_conv2d against the side of the kernel",
}

if __name__ == "__main__":
    raise SystemExit(main(*BENCHMARKS))
