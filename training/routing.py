"""How the routers of a net share out the work over a whole set of images."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import RouteResult, TopKRouter
from ..blocks.route_result import DEAD_SHARE, normalised_entropy, utilisation_of


@dataclass(frozen=True)
class RoutingSums:
    """What one router did to many regions, in sums that add up over images and processes.

    Args:
        counts: how often each expert was chosen.
        entropy: the entropies of the regions, as parts of the largest possible, added up.
        regions: how many were routed.

    >>> a = RoutingSums(torch.tensor([3.0, 1.0]), 0.5, 4)
    >>> (a + a).regions
    8
    """

    counts: Tensor
    entropy: float
    regions: int

    @classmethod
    def of(cls, route: RouteResult) -> "RoutingSums":
        entropy = normalised_entropy(route.probabilities).sum().item()
        return cls(route.counts().double().cpu(), entropy, len(route.indices))

    def __add__(self, other: "RoutingSums") -> "RoutingSums":
        return RoutingSums(self.counts + other.counts, self.entropy + other.entropy, self.regions + other.regions)


# By recipe, and then by the name of the router in its net.
Routing = dict[str, dict[str, RoutingSums]]


def add_routing(found: Routing, recipe: str, sums: dict[str, RoutingSums]) -> None:
    """Add what routers did to further images to those of a recipe.

    >>> found = {}
    >>> for _ in range(2):
    ...     add_routing(found, "clean", {"moe.router": RoutingSums(torch.ones(2), 0.5, 1)})
    >>> found["clean"]["moe.router"].counts
    tensor([2., 2.])
    """
    known = found.setdefault(recipe, {})
    for name, value in sums.items():
        known[name] = known[name] + value if name in known else value


def routing_figures(sums: dict[str, RoutingSums]) -> dict[str, float]:
    """The figures of all routers of a net.

    - ``router_entropy``: how undecided they are, from 0 to 1; the mean over the regions, and over the routers.
    - ``router_utilisation``: how evenly they use their experts, from 0 (one gets all) to 1; the mean over the routers.
    - ``dead_experts``: how many experts, of all routers, get less than a tenth of their even share.

    >>> routing_figures({"moe.router": RoutingSums(torch.tensor([4.0, 4.0, 0.0, 0.0]), 2.0, 4)})
    {'router_entropy': 0.5, 'router_utilisation': 0.5, 'dead_experts': 2.0}
    """
    if not sums:
        return {}
    loads = [value.counts / value.counts.sum().clamp(min=1) for value in sums.values()]
    return {
        "router_entropy": sum(value.entropy / max(value.regions, 1) for value in sums.values()) / len(sums),
        "router_utilisation": sum(utilisation_of(value.counts).item() for value in sums.values()) / len(sums),
        "dead_experts": float(sum((load < DEAD_SHARE / len(load)).sum().item() for load in loads)),
    }


@contextmanager
def watched_routers(net: nn.Module) -> Iterator[dict[str, RoutingSums]]:
    """Write down what the routers of a net do, however it is called: a dict that fills up; empty it at will.

    >>> net = nn.Sequential(TopKRouter(4, 2))
    >>> with watched_routers(net) as seen, torch.no_grad():
    ...     _ = net(torch.randn(1, 4, 5, 7))
    >>> seen["0"].regions
    35
    """
    seen: dict[str, RoutingSums] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, route: RouteResult) -> None:
            sums = RoutingSums.of(route)
            seen[name] = seen[name] + sums if name in seen else sums

        return hook

    routers = {name: module for name, module in net.named_modules() if isinstance(module, TopKRouter)}
    handles = [router.register_forward_hook(watch(name)) for name, router in routers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def step_routers(net: nn.Module) -> None:
    """Tell every router of a net that the optimiser has made a step: biases follow the load, warm-ups go on.

    >>> router = TopKRouter(4, 2)
    >>> step_routers(nn.Sequential(router))
    """
    for module in net.modules():
        if isinstance(module, TopKRouter):
            module.step()
