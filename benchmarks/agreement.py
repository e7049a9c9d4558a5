"""Whether two providers compute the same: the tensors of what they return, and where these first differ."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor

Named = list[tuple[str, Tensor | None]]  # outputs, and then gradients: None where nothing reaches the tensor


def leaves(value: object) -> list[Tensor]:
    """List the tensors within nested tuples, lists, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif is_dataclass(value):
        value = [getattr(value, entry.name) for entry in fields(value)]
    return [tensor for item in value for tensor in leaves(item)] if isinstance(value, list | tuple) else []


def disagreement(results: Named, expected: Named, tolerance: float) -> str:
    """Say where `results` first leave `expected`; empty if they agree. NaN agrees with nothing, itself included.

    Outputs of four dimensions must also be in the memory format of the reference's, since to change it takes a copy.
    Gradients are free in theirs: autograd does not ask for one.
    """
    if len(results) != len(expected):
        return f"gives {len(results)} tensors; the reference gives {len(expected)}"
    for (name, got), (_, want) in zip(results, expected, strict=True):
        if got is None and want is None:
            continue
        got = torch.zeros_like(want) if got is None else got  # no gradient is a gradient of zeros
        want = torch.zeros_like(got) if want is None else want
        if (got.shape, got.dtype) != (want.shape, want.dtype):
            return f"{name} is {got.dtype} {tuple(got.shape)}; the reference's {want.dtype} {tuple(want.shape)}"
        if name.startswith("output") and (lost := _lost_format(got, want)):
            return f"{name} is not in {lost} as the reference's is, but has strides {got.stride()}"
        if want.numel() == 0:
            continue
        largest = want.double().abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        error = ((got.double() - want.double()).abs().max() / largest).item()
        if not error <= (tolerance if want.is_floating_point() else 0):
            return f"{name} is off by {error:.1e} of the reference's largest value, {tolerance:.0e} allowed"
    return ""


def _lost_format(got: Tensor, want: Tensor) -> str:
    """Name the memory format that a map of the reference is in and this one is not; one may be in both."""
    formats = (torch.contiguous_format, torch.channels_last) if want.ndim == 4 else ()
    lost = (f for f in formats if want.is_contiguous(memory_format=f) and not got.is_contiguous(memory_format=f))
    return str(next(lost, "")).removeprefix("torch.")
