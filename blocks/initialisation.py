"""Filling fresh parameters."""

from collections.abc import Callable
from typing import Any

from torch import Tensor


def fill(parameter: Tensor, draw: Callable[..., Any], **options: Any) -> None:
    """Fill a parameter by a function of `nn.init`. On meta there is nothing to draw, and torch's compiler would load.

    >>> weight = torch.zeros(100)
    >>> fill(weight, nn.init.normal_, std=0.02)
    >>> weight.eq(0).any()
    tensor(False)
    """
    if not parameter.is_meta:
        draw(parameter, **options)
