"""What every stage of a recipe is, and where it draws its numbers from."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

Range = tuple[float, float]
Size = tuple[int, int]
Values = dict[str, Any]


class Draws:
    """The random numbers of one sample, in the order in which they are asked for.

    Args:
        seed: any whole number; all of its bits count.
        channels: of the image.
        scale: by which the recipe makes it smaller.

    >>> Draws(0).uniform((2.0, 3.0)) == Draws(0).uniform((2.0, 3.0))
    True
    """

    def __init__(self, seed: int, channels: int = 3, scale: int = 1) -> None:
        self.rng = np.random.Generator(np.random.PCG64(seed % (1 << 64)))
        self.channels, self.scale = channels, scale

    def uniform(self, bounds: Range) -> float:
        return float(self.rng.uniform(*bounds))

    def whole(self, bounds: Range) -> int:
        """A whole number; both bounds may come."""
        return int(self.rng.integers(math.ceil(bounds[0]), math.floor(bounds[1]), endpoint=True))

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def pick(self, shares: Sequence[float]) -> int:
        """A place in the list, as often as its share says."""
        shares_ = np.cumsum(shares)
        return int(np.searchsorted(shares_, self.rng.random() * shares_[-1], side="right"))


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Base of the stages. A stage of your own overrides `draw` and `apply`, and `plan` where samples may differ.

    Args:
        name: of the stage in the recipe; the names in the report begin with it.
        probability: how often it happens.
    """

    name: str
    probability: float = 1.0

    def __post_init__(self) -> None:
        if not self.name.isalnum() or self.name == "order":
            raise ValueError(f"name of a stage must be of letters and digits, and not 'order', got {self.name!r}")
        check_range("probability", (0, self.probability), 0, 1)

    def happens(self, draws: Draws) -> bool:
        """Draw whether the stage happens to a sample."""
        return draws.chance(self.probability)

    def draw(self, draws: Draws) -> Values:
        """Draw the numbers of one sample, whether or not it happens: their names, types and shapes never differ."""
        return {}

    def absent(self, values: Values) -> Values:
        """What is reported where the stage does not happen: zeros."""
        return {key: value * 0 if not isinstance(value, bool) else False for key, value in values.items()}

    def plan(self, values: Values, size: Size, output: Size) -> Hashable:
        """What samples must have in common to be degraded together, beside their size.

        Args:
            values: the numbers of one sample.
            size: its height and width when the stage begins.
            output: those that the recipe shall end with.
        """
        return None

    def apply(self, image: Tensor, values: dict[str, Tensor], plan: Any, rngs: list[np.random.Generator]) -> Tensor:
        """Degrade samples of one size and plan, (B, C, H, W), each with its numbers and its source of noise."""
        raise NotImplementedError(f"{type(self).__name__} does not override apply()")


def check_range(name: str, bounds: Range, lowest: float, highest: float = math.inf) -> None:
    """Raise ValueError unless the bounds are in order and within limits."""
    low, high = bounds
    if not lowest <= low <= high <= highest:
        limits = f"within {lowest:g} and {highest:g}" if highest < math.inf else f"of at least {lowest:g}"
        given = f"{low} to {high}"
        raise ValueError(f"{name} must be a range {limits}, the lower bound first, got {given}")
