"""The choice of k experts for each token, and experts that compute the tokens that chose them and no others."""

from .op import KERNEL, route_top_k, route_top_k_flops
from .op_experts import expert_mlp, expert_mlp_bytes, expert_mlp_flops
from .operands import Groups, group_by_expert
from .reference import expert_mlp_reference, route_top_k_reference

__all__ = [
    "KERNEL",
    "Groups",
    "expert_mlp",
    "expert_mlp_bytes",
    "expert_mlp_flops",
    "expert_mlp_reference",
    "group_by_expert",
    "route_top_k",
    "route_top_k_flops",
    "route_top_k_reference",
]
