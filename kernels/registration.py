"""A function as an operator of torch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.library import Library

from .operand_rules import narrow

NAMESPACE = "claritycore"
# Where this package is imported once more, as by a notebook that loads it anew, its operators take the place of those
# of before; so this is kept where it outlives the package.
LIBRARIES: dict[str, Library] = vars(getattr(torch.ops, NAMESPACE)).setdefault("libraries", {})


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
        self.name = f"{NAMESPACE}::{name}"
        if name in LIBRARIES:
            LIBRARIES[name]._destroy()
        self.library = LIBRARIES[name] = Library(NAMESPACE, "FRAGMENT")
        schema = torch.library.infer_schema(function, mutates_args=())
        self.library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
        self.library.impl(name, function, "CompositeExplicitAutograd")
        self.overload = getattr(getattr(torch.ops, NAMESPACE), name).default

    def __call__(self, *inputs: Any) -> Any:
        return self.overload(*inputs)

    def register_fake(self, function: Callable[..., Any]) -> None:
        """Say what comes out, without computing it."""
        torch.library.register_fake(self.name, function, lib=self.library)

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None) -> None:
        """Say how it is differentiated, and what that keeps."""
        torch.library.register_autograd(self.name, backward, setup_context=setup_context, lib=self.library)

    def register_vmap(self, function: Callable[..., Any]) -> None:
        """Say what it makes of many calls at once."""
        torch.library.register_vmap(self.name, function, lib=self.library)

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

        def on(device_type: str) -> Callable[..., Any]:
            def call(*inputs: Any) -> Any:
                dtype = torch.get_autocast_dtype(device_type)
                count = len(operands)
                cast = narrow(dict(zip(operands, inputs[:count], strict=True)), varying, dtype, constant_axes)
                with torch.autocast(device_type, enabled=False):
                    return self.overload(*cast, *inputs[count:])

            return call

        self.library.impl(self.overload, on("cpu"), "AutocastCPU")
        self.library.impl(self.overload, on("cuda"), "AutocastCUDA")


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Make an operator of the decorated function."""
    return lambda function: Operator(name, function)
