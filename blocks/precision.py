"""In which dtype the delicate parts of a block are computed."""

from torch import Tensor

from ..kernels.operand_rules import compute_dtype


def at_least_float32(x: Tensor) -> Tensor:
    """Widen half precision to float32; float64 stays float64."""
    return x.to(compute_dtype(x))
