"""What every form of the routing takes: its operands and their rules, and who was assigned to which expert."""

from collections.abc import Mapping
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from ..activations import Activation
from ..operand_rules import check_device, check_tensors, compute_dtype, like


class Groups(NamedTuple):
    """The assignments of tokens to experts, brought in the order of the experts.

    Number ``token * k + slot`` is the assignment of a token to the expert in that slot of its indices.
    """

    order: Tensor
    """(T * k,): the assignments of the first expert, those of the second, and so on, last those to nobody; among
    those of one expert the earlier token comes first."""
    offsets: Tensor
    """(E + 1,): expert e has those from `offsets[e]` up to `offsets[e + 1]`."""

    @property
    def counts(self) -> Tensor:
        """How many assignments each expert has: (E,)."""
        return self.offsets.diff()

    def inverse(self) -> Tensor:
        """Return the place of each assignment in the order: (T * k,)."""
        return torch.empty_like(self.order).scatter_(0, self.order, torch.arange(len(self.order)).to(self.order))


def group_by_expert(indices: Tensor, num_experts: int) -> Groups:
    """Bring the assignments of `indices` (T, k) in the order of the experts; nothing is read on the host.

    An index of -1 is an assignment to nobody.

    >>> groups = group_by_expert(torch.tensor([[2, 0], [0, 1], [2, -1]]), 4)
    >>> groups.order.tolist(), groups.offsets.tolist()
    ([1, 2, 3, 0, 4, 5], [0, 2, 3, 5, 5])
    >>> groups.inverse().tolist()
    [3, 0, 1, 2, 4, 5]
    """
    flat = indices.flatten()
    # Sorting bytes takes a tenth of the time.
    keys = flat.masked_fill(flat < 0, num_experts).to(torch.uint8 if num_experts < 256 else torch.int64)
    ordered, order = keys.sort(stable=True)
    experts = torch.arange(num_experts + 1, device=indices.device).to(keys.dtype)
    return Groups(order, torch.searchsorted(ordered, experts))


class Operands(NamedTuple):
    """The tensors of one call of the experts.

    The forms of this folder exchange freely: forward takes `Operands` and the activation and returns `y` and the
    `Groups`; backward takes the same, the groups, the gradient of `y`, and which gradients are wanted of the
    `DIFFERENTIABLE`; it returns them with None in the place of the others.
    """

    x: Tensor
    weights: Tensor
    indices: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all arithmetic."""
        return compute_dtype(self.x)

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """T, C, k, E and H."""
        experts, hidden, channels = self.w1.shape
        return self.x.shape[0], channels, self.indices.shape[1], experts, hidden

    @property
    def differentiable(self) -> dict[str, Tensor]:
        """Those that have gradients."""
        return {name: value for name, value in self._asdict().items() if name != "indices"}

    def like(self, gradients: Mapping[str, Tensor]) -> tuple[Tensor | None, ...]:
        """Give each gradient that is there the strides and the dtype of its operand, with a copy where it must be."""
        named = self.differentiable.items()
        return tuple(like(gradients[name], value) if name in gradients else None for name, value in named)


DIFFERENTIABLE = tuple(name for name in Operands._fields if name != "indices")


def lowest(dtype: torch.dtype) -> float:
    """The score of what has a logit of minus infinity: above minus infinity, which those have that were chosen."""
    return torch.finfo(dtype).min


def check_logits(logits: Tensor, k: int, bias: Tensor | None) -> None:
    """Raise unless k experts can be chosen by these logits."""
    check_tensors({"logits": logits} | ({} if bias is None else {"bias": bias}), "logits")
    if logits.ndim != 2:
        raise ValueError(f"logits must be (T, E), got shape {tuple(logits.shape)}")
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k must be an integer, got {k!r}")
    experts = logits.shape[1]
    if not 1 <= k <= experts:
        raise ValueError(f"k must be from 1 to the number of experts, {experts}, got {k}")
    if bias is not None and tuple(bias.shape) != (experts,):
        raise ValueError(f"bias must be (E,) = ({experts},), got shape {tuple(bias.shape)}")
    if bias is not None and bias.requires_grad:
        raise ValueError("bias must not require a gradient: it only chooses, and has none")


def check_operands(x: Operands, activation: str) -> None:
    """Raise unless the operands fit together and the activation has a form here."""
    check_tensors(x.differentiable, "x")
    if not isinstance(x.indices, Tensor) or x.indices.dtype != torch.int64:
        found = x.indices.dtype if isinstance(x.indices, Tensor) else repr(x.indices)
        raise TypeError(f"indices must be a tensor of int64, got {found}")
    check_device("indices", x.indices, "x", x.x)
    if activation not in get_args(Activation):
        raise ValueError(f"activation must be one of {', '.join(get_args(Activation))}, got {activation!r}")
    for name, value, axes, meaning in (
        ("x", x.x, 2, "(T, C)"), ("indices", x.indices, 2, "(T, k)"), ("w1", x.w1, 3, "(E, H, C)"),
    ):  # fmt: skip
        if value.ndim != axes:
            raise ValueError(f"{name} must be {meaning}, got shape {tuple(value.shape)}")
    tokens, channels = x.x.shape
    experts, hidden, _ = x.w1.shape
    if not x.indices.shape[1] or not len(x.w1):
        raise ValueError(f"k and E must be at least 1, got k = {x.indices.shape[1]} and E = {len(x.w1)}")
    for name, value, shape, meaning in (
        ("indices", x.indices, (tokens, x.indices.shape[1]), "(T, k)"),
        ("weights", x.weights, tuple(x.indices.shape), "(T, k)"),
        ("w1", x.w1, (experts, hidden, channels), "(E, H, C)"),
        ("b1", x.b1, (experts, hidden), "(E, H)"),
        ("w2", x.w2, (experts, channels, hidden), "(E, C, H)"),
        ("b2", x.b2, (experts, channels), "(E, C)"),
    ):
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} must be {meaning} = {shape}, got shape {tuple(value.shape)}")


def in_range(indices: Tensor, experts: int) -> Tensor:
    """Return the indices; raise, after a look at them on the host, unless all are experts or nobody."""
    if indices.numel():
        low, high = torch.aminmax(indices)
        if low < -1 or high >= experts:
            raise ValueError(f"indices must be from -1 to {experts - 1}, got {int(low)} to {int(high)}")
    return indices
