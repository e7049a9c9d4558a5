"""The activations of `activations.py` and their slopes in Triton, for the kernels that end in one."""

import triton
import triton.language as tl


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    """Apply the activation of that name, or none."""
    if ACTIVATION == "relu":
        return tl.where(z <= 0.0, 0.0, z)  # which keeps NaN
    elif ACTIVATION == "leaky_relu":
        return tl.where(z > 0.0, z, z * 0.2)
    elif ACTIVATION == "gelu":
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == "silu":
        return z / (1.0 + tl.exp(-z))
    else:
        return z


@triton.jit
def slope_at(z, ACTIVATION: tl.constexpr):
    """Differentiate it at `z`."""
    if ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density
    elif ACTIVATION == "relu":
        return tl.where(z > 0.0, 1.0, 0.0)
    elif ACTIVATION == "leaky_relu":
        return tl.where(z > 0.0, 1.0, 0.2)
    else:
        tl.static_assert(ACTIVATION == "silu")
        gate = 1.0 / (1.0 + tl.exp(-z))
        return gate * (1.0 + z * (1.0 - gate))
