"""A function as an operator of torch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .operand_rules import narrow


class Operator:
    """An operator of torch that is computed by a function, and what torch's modes must know of it.

    It is what `torch.library.custom_op` makes, whose first call loads torch's compiler, which takes as long as torch
    itself does.

    Args:
        name: without the namespace.
        function: of tensors and plain values, with annotations; changes none of them, and returns new ones.

    >>> def double(x: torch.Tensor) -> torch.Tensor:
    ...     return 2 * x
    >>> twice = Operator("twice", double)
    >>> twice.register_fake(torch.empty_like)
    >>> twice(torch.ones(2)), torch.ops.claritycore.twice(torch.ones(1, device="meta")).shape
    (tensor([2., 2.]), torch.Size([1]))
    """

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name = f"claritycore::{name}"
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(self.name, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(self.name, "default")(function)
        self.overload = getattr(torch.ops.claritycore, name).default

    def __call__(self, *inputs: Any) -> Any:
        return self.overload(*inputs)

    def register_fake(self, function: Callable[..., Any]) -> None:
        """Say what comes out, without computing it."""
        torch.library.register_fake(self.name, function)

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None) -> None:
        """Say how it is differentiated, and what that keeps."""
        torch.library.register_autograd(self.name, backward, setup_context=setup_context)

    def register_vmap(self, function: Callable[..., Any]) -> None:
        """Say what it makes of many calls at once."""
        torch.library.register_vmap(self.name, function)

    def register_autocast(
        self, operands: Sequence[str] = (), varying: Sequence[str] = (), constant_axes: int = 2
    ) -> None:
        """Cast what varies over time or pixels to the dtype of autocast; parameters and states stay, as does float64.

        Inside, there is no autocast; where nothing varies, that is all.

        Args:
            operands: the names of the first arguments.
            varying: which of them may be cast.
            constant_axes: what has no more axes than these does not vary.
        """

        def register(device_type: str, key: str) -> None:
            @torch.library.impl(self.name, key)
            def _(*inputs: Any) -> Any:
                dtype = torch.get_autocast_dtype(device_type)
                count = len(operands)
                cast = narrow(dict(zip(operands, inputs[:count], strict=True)), varying, dtype, constant_axes)
                with torch.autocast(device_type, enabled=False):
                    return self.overload(*cast, *inputs[count:])

        register("cpu", "AutocastCPU")
        register("cuda", "AutocastCUDA")


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Make an operator of the decorated function."""
    return lambda function: Operator(name, function)
