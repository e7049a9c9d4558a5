"""In which dtype the delicate parts of a block are computed."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..kernels.operand_rules import compute_dtype


def at_least_float32(x: Tensor) -> Tensor:
    """Widen half precision to float32; float64 stays float64."""
    return x.to(compute_dtype(x))


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Let every product be computed in the dtype of its operands; on `meta` there is no autocast to put off."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
