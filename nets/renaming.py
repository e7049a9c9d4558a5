"""What a layout of weights is: the names that a published net gives its tensors, and the way to ours and back."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from .base import RestorationNet

State = dict[str, Tensor]


class Reading(NamedTuple):
    """What a state says of its net.

    Args:
        state: the tensors under our names.
        fields: of the net's config, as far as names and shapes determine them.
        assumptions: what they leave open, with the value that is assumed; a clause each.
    """

    state: State
    fields: dict[str, Any]
    assumptions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """A way of naming the tensors of a net.

    Args:
        name: by which it is asked for.
        title: what it is, in a few words.
        family: registered name of our net that takes it.
        required: names that every such state has, each of a kernel (four dimensions).
        excluded: names that no such state has.
        read: from a state that has the required names; raises ValueError where our net cannot take it.
        write: from a net of the family; raises ValueError where the layout cannot hold it.
    """

    name: str
    title: str
    family: str
    required: tuple[str, ...]
    excluded: tuple[str, ...]
    read: Callable[[State], Reading]
    write: Callable[["RestorationNet"], State]

    def matches(self, state: Mapping[str, Tensor]) -> bool:
        """Whether a state is of this layout, by its names alone."""
        kernels = all(key in state and state[key].ndim == 4 for key in self.required)
        return kernels and not any(key in state for key in self.excluded)


def own_names(net: "RestorationNet") -> State:
    """Write a net's tensors under our names: what a layout of our own gives."""
    return dict(net.state_dict())


def rename(state: Mapping[str, Tensor], modules: Mapping[str, str]) -> State:
    """Give tensors other names: `modules` maps the names of their modules; what is not in it keeps its name.

    >>> import torch
    >>> list(rename({"HRconv.weight": torch.zeros(1), "mean": torch.zeros(1)}, {"HRconv": "conv_hr"}))
    ['conv_hr.weight', 'mean']
    """
    renamed: State = {}
    for key, value in state.items():
        module, dot, leaf = key.rpartition(".")
        renamed[f"{modules.get(module, module)}{dot}{leaf}"] = value
    return renamed


def inverse(modules: Mapping[str, str]) -> dict[str, str]:
    """Swap the two sides of a renaming."""
    return {theirs: ours for ours, theirs in modules.items()}


def count(state: Mapping[str, Tensor], pattern: str, *, start: int = 0, step: int = 1) -> int:
    """Count the members of a row: the names `pattern.format(i)` for i = start, start + step, ..., up to the first gap.

    >>> import torch
    >>> count({"body.0.weight": torch.zeros(1), "body.1.weight": torch.zeros(1)}, "body.{}.weight")
    2
    """
    number = 0
    while pattern.format(start + step * number) in state:
        number += 1
    return number


def shuffled_channels(channels: int, likely: int) -> tuple[int, int]:
    """Split the channels before a pixel shuffle into those of the image and a scale: `likely`, else RGB, grey or RGBA.

    Raises:
        ValueError: if they are the square of a scale times none of those.

    >>> shuffled_channels(48, 3)
    (3, 4)
    """
    candidates = tuple(dict.fromkeys((likely, 3, 1, 4)))
    for image_channels in candidates:
        scale = math.isqrt(channels // image_channels)
        if image_channels * scale**2 == channels:
            return image_channels, scale
    raise ValueError(f"{channels} channels before the pixel shuffle are no square times one of {candidates}")


def without_numbers(keys: Mapping[str, Any]) -> set[str]:
    """Say which kinds of names there are, whichever block they are in."""
    return {re.sub(r"\d+", "#", key) for key in keys}
