"""In which dtype the delicate parts of a block are computed."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Widen half precision to float32; float64 stays float64."""
    return x if x.dtype == torch.float64 else x.float()
