"""What a block or a net costs: parameters, multiply-adds, activations, and how far it looks."""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..blocks.reparam import count_parameters
from .flops import flop_formulas

# Operations that move or make data and compute nothing.
_MOVING = """
    _to_copy _unsafe_view arange cat clone constant_pad_nd copy copy_ detach empty empty_like empty_strided fill_ full
    full_like gather index index_select lift_fresh new_empty new_full new_zeros nonzero ones ones_like pixel_shuffle
    pixel_unshuffle promote_types reflection_pad2d repeat replication_pad2d roll scalar_tensor scatter slice_scatter
    stack
    upsample_nearest2d where zero_ zeros zeros_like
"""
FREE = frozenset(_MOVING.split())

# Super-resolution nets are compared at an output of 720 rows and 1280 columns.
REPORTED_SIZE = (720, 1280)


@dataclass(frozen=True)
class Part:
    """The costs of one submodule."""

    name: str
    kind: str
    parameters: int
    macs: int


@dataclass(frozen=True)
class Summary:
    """What one forward call of a module costs.

    Args:
        name: class of the module.
        input_shape, output_shape: of the call that was counted.
        parameters: number of parameter elements.
        macs: multiply-adds: half the flops, whatever an operation does.
        activations: elements written by convolutions, matrix products and the other counted operations.
        receptive_radius: how far an output pixel looks, in input pixels; None where the module does not say.
        tile_safe: whether that radius is all it sees; None where the module does not say.
        parts: the direct children, in order.
        uncounted: operations that compute something but have no formula, with their number of calls.

    >>> print(summarize(nn.Conv2d(3, 8, 1), (1, 3, 10, 10)))
    Conv2d: (1, 3, 10, 10) -> (1, 8, 10, 10)
    part   class   parameters    MACs
    total  Conv2d          32  0.00 M
    activations       0.00 M elements
    receptive radius  not said
    tiles             not said
    not counted       nothing
    """

    name: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    parameters: int
    macs: int
    activations: int
    receptive_radius: int | None
    tile_safe: bool | None
    parts: tuple[Part, ...]
    uncounted: dict[str, int]

    def __str__(self) -> str:
        rows = [(part.name, part.kind, f"{part.parameters:,}", f"{part.macs / 1e6:,.2f} M") for part in self.parts]
        rows.append(("total", self.name, f"{self.parameters:,}", f"{self.macs / 1e6:,.2f} M"))
        rows.insert(0, ("part", "class", "parameters", "MACs"))
        width = [max(len(row[column]) for row in rows) for column in range(4)]
        table = "\n".join(
            f"{part:<{width[0]}}  {kind:<{width[1]}}  {parameters:>{width[2]}}  {macs:>{width[3]}}"
            for part, kind, parameters, macs in rows
        )
        radius = "not said" if self.receptive_radius is None else f"{self.receptive_radius} pixels"
        tiles = {True: "exact", False: "not exact: it sees the whole map", None: "not said"}[self.tile_safe]
        uncounted = ", ".join(f"{name} x{calls}" for name, calls in self.uncounted.items()) or "nothing"
        return (
            f"{self.name}: {self.input_shape} -> {self.output_shape}\n{table}\n"
            f"activations       {self.activations / 1e6:,.2f} M elements\n"
            f"receptive radius  {radius}\n"
            f"tiles             {tiles}\n"
            f"not counted       {uncounted}"
        )


def summarize(module: nn.Module, input_shape: Sequence[int], *further: Sequence[int]) -> Summary:
    """Count what a forward call costs. Runs a copy on the meta device: no memory, no arithmetic.

    Args:
        module: a block or a net that takes tensors; of several that it returns the shape of the first is given.
        input_shape: shape of the first tensor, (B, C, H, W).
        further: shapes of the others, if there are others.

    Raises:
        ValueError: if the module refuses the shape.

    >>> summarize(nn.Conv2d(3, 8, 3, padding=1, bias=False), (1, 3, 10, 10)).macs
    21600
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports triton, where that is installed

    twin = _on_meta(module)
    formulas = flop_formulas()
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    census = _Census(set(counter.flop_registry))
    with torch.no_grad(), counter, census:
        result = twin(*(torch.empty(tuple(shape), device="meta") for shape in (input_shape, *further)))
    output = next(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
    by_module = counter.get_flop_counts()
    kind = type(module).__name__
    parts = tuple(
        Part(name, type(child).__name__, count_parameters(child), _flops(by_module, f"{kind}.{name}", child) // 2)
        for name, child in module.named_children()
    )
    return Summary(
        name=kind,
        input_shape=tuple(input_shape),
        output_shape=tuple(output.shape),
        parameters=count_parameters(module),
        macs=counter.get_total_flops() // 2,
        activations=census.activations,
        receptive_radius=getattr(module, "receptive_radius", None),
        tile_safe=getattr(module, "tile_safe", None),
        parts=parts,
        uncounted=dict(census.uncounted),
    )


class _Census(TorchDispatchMode):
    """Adds up what the counted operations write, and names those that compute without being counted."""

    def __init__(self, counted: set[Any]) -> None:
        super().__init__()
        self.counted = counted
        self.activations = 0
        self.uncounted: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if func.overloadpacket in self.counted:
            self.activations += sum(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        elif not (func.is_view or name in FREE or torch.Tag.pointwise in func.tags):
            self.uncounted[name] += 1
        return result


def _flops(by_module: Mapping[str, Mapping[Any, int]], name: str, module: nn.Module) -> int:
    """What was counted within a module; of a list, which is not called itself, within what it holds."""
    if name in by_module:
        return sum(by_module[name].values())
    return sum(_flops(by_module, f"{name}.{key}", part) for key, part in module.named_children())


def _on_meta(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).to("meta").eval()
