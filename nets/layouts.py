"""Layouts of weights that people have, and which one a state is of."""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from .layouts_plksr import PLKSR_LAYOUTS
from .layouts_rrdbnet import RRDBNET_LAYOUTS
from .layouts_span import SPAN_LAYOUTS
from .renaming import Layout, Reading, without_numbers

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (*RRDBNET_LAYOUTS, *PLKSR_LAYOUTS, *SPAN_LAYOUTS)}
KNOWN_ENOUGH = 0.3  # of the kinds of names, from where on a layout is worth mentioning


class Recognition(NamedTuple):
    """The layout that a state is of, and what it says; `reading` is None where our net cannot take it."""

    layout: Layout
    reading: Reading | None
    refusal: str = ""


def recognize(state: Mapping[str, Tensor]) -> Recognition | None:
    """Find the layout of a state from its names and shapes alone; None where it is of no known one."""
    for layout in LAYOUTS.values():
        if layout.matches(state):
            try:
                return Recognition(layout, layout.read(dict(state)))
            except ValueError as error:
                return Recognition(layout, None, f"is refused: {error}")
            except (KeyError, IndexError, ZeroDivisionError) as error:
                return Recognition(layout, None, f"looks like {layout.title}, but does not hold together ({error!r})")
    return None


def nearest_layout(state: Mapping[str, Tensor]) -> str:
    """End of a message about a state of no known layout: the one that it is most like, if it is like any."""
    kinds = without_numbers(state)
    shares = {
        layout.name: len(kinds & wanted) / len(wanted)
        for layout in LAYOUTS.values()
        if (wanted := without_numbers(dict.fromkeys(layout.required)))
    }
    best = max(shares, key=shares.__getitem__)
    return f"; the nearest layout is {best}" if shares[best] >= KNOWN_ENOUGH else ""
