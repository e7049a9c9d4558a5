"""A mixture of experts over the pixels, the windows or the images of a batch."""

from collections.abc import Sequence
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from ..kernels.memory_format import in_format_of
from .checks import check_choice, check_feature_map, check_positive
from .experts import Expert, PointwiseExpert, cut
from .moe_dispatch import (
    Assignment,
    by_choice,
    computes_all,
    described,
    halo_of,
    masked,
    run_surrounded,
    run_whole,
)
from .moe_tokens import StackedExperts
from .padding import cropped, pad_to_multiple
from .route_result import RouteResult
from .router import TopKRouter
from .tiling import tiling_of

Level = Literal["token", "window", "image"]


class MoE2d(nn.Module):
    r"""Add to each region what the experts make of it that a router chooses; the other experts compute nothing.

    .. math::
        y = x + s \, \Big(\sum_{j \in \mathrm{top\,}k} w_j \, E_j(x) + E_{shared}(x) \Big)

    or, with a fallback, :math:`\sum_j p_j E_j(x) + (1 - \sum_j p_j) \, E_{fallback}(x)` in place of the sum: the less
    sure the router is of the experts that it chooses, the more the fallback counts. s is 1, or with the gate of a
    router with `keep` < 1 or `bypass` its score, and 0 for regions that it leaves alone: these are x, and cost nothing.

    What a region is, is the `level`:

    - "token", a pixel. The experts are pointwise, on features that a depthwise 3x3 convolution has prepared for all
    - "window", a square of `window_size`, judged by the mean and the root mean square of each of its 2 C channels. The
      map is mirrored to whole windows; an expert gets a window with as many pixels around it as it sees, so that it
      computes what it would compute for the whole map (cells of `AttentionExpert` at the border see the mirror too)
    - "image", judged likewise; experts may see all of it

    No region is dropped, however many go to one expert. On an image and in eval, all depends on that image alone.

    Where it is compiled, exported, traced or on `meta`, the levels "window" and "image" compute every expert for
    everything and mask: the same numbers, without the saving; so does "token" as ONNX.

    Shape:
        - x: ``(B, C, H, W)``
        - conditions: as `TopKRouter` takes them; maps are of the size of x
        - returns: ``(B, C, H, W)``, dtype and memory format kept, and a `RouteResult`

    Args:
        channels: number of channels ``C``.
        experts: at least one: `PointwiseExpert` of one width for "token", whose weights are stacked; modules with a
            `halo` for "window", such as those that derive from `Expert`; any for "image".
        k: how many experts a region goes to; by default 2, where no `router` is given.
        level: "token", "window" or "image".
        window_size: side of windows, of use at "window" alone.
        router: a `TopKRouter` with C channels for "token", 2 C for the others; by default one without conditions.
        shared: an expert that every region goes to, with weight 1.
        fallback: an expert that counts for what the router is unsure of.

    Raises:
        TypeError: if the input is not floating point, the router is no `TopKRouter`, an expert is no module, or one of
            tokens is no `PointwiseExpert`.
        ValueError: if there is no expert, a number is < 1, ``k`` is more than there are experts or given with a router,
            the router is one for other channels or experts, or has a gate at level "image"; if an expert sees
            further than its level allows, has other channels, or cuts the map into cells that windows are no multiples
            of; if experts of tokens differ in width; if the input has another number of channels, conditions are of
            another shape, or an expert changes the shape of its map.

    Source:
        Outrageously Large Neural Networks (arXiv:1701.06538), section 2; in restoration SeemoRe (arXiv:2402.03412) and
        MoCE-IR (arXiv:2411.18466); windows with their surroundings, the fallback and the gate are ours.

    >>> from claritycore.blocks import DenoiseExpert, DetailExpert, PointwiseExpert
    >>> x = torch.randn(1, 8, 5, 7)
    >>> y, route = MoE2d(8, [PointwiseExpert(8) for _ in range(4)], k=2)(x)
    >>> y.shape, route.indices.shape
    (torch.Size([1, 8, 5, 7]), torch.Size([35, 2]))
    >>> MoE2d(8, [DetailExpert(8), DenoiseExpert(8)], k=1, level="window", window_size=4)(x)[1].indices.shape
    torch.Size([4, 1])
    """

    def __init__(
        self,
        channels: int,
        experts: Sequence[nn.Module],
        *,
        k: int | None = None,
        level: Level = "token",
        window_size: int = 16,
        router: TopKRouter | None = None,
        shared: nn.Module | None = None,
        fallback: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_positive(channels=channels, window_size=window_size)
        check_choice("level", level, get_args(Level))
        every = [*experts, *(expert for expert in (shared, fallback) if expert is not None)]
        _check_experts(experts, every, channels, level, window_size)
        self.channels, self.level, self.window_size = channels, level, window_size
        self.has_shared, self.has_fallback = shared is not None, fallback is not None
        width = channels if level == "token" else 2 * channels
        self.router = _router(router, k, width, len(experts), level)
        if level == "token":
            self.prepare = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
            self.experts = StackedExperts(cast("list[PointwiseExpert]", every))
        else:
            self.experts = nn.ModuleList(every)
        self.surplus = max(halo_of(expert) or 0 for expert in every) if level == "window" else 0
        self.tile_multiple = {"token": 1, "window": window_size, "image": tiling_of(*every).tile_multiple}[level]
        self.receptive_radius = {"token": 1, "window": max(window_size - 1, self.surplus), "image": 0}[level]
        self.tile_safe = level != "image" and self.router.tile_safe

    def forward(self, x: Tensor, conditions: Sequence[Tensor] = ()) -> tuple[Tensor, RouteResult]:
        check_feature_map(x, self.channels, self)
        for condition in conditions:
            if condition.ndim == 4 and condition.shape[2:] != x.shape[2:]:
                wanted, found = tuple(x.shape[2:]), tuple(condition.shape[2:])
                raise ValueError(f"conditions that are maps must be of the size of x, {wanted}, got {found}")
        by_level = {"token": self._by_token, "window": self._by_window, "image": self._by_image}[self.level]
        mixed, route = by_level(x, conditions)
        return x + in_format_of(mixed.to(x.dtype), x), route

    def _by_token(self, x: Tensor, conditions: Sequence[Tensor]) -> tuple[Tensor, RouteResult]:
        features = self.prepare(x)
        route = self.router(features, conditions)
        tokens = features.permute(0, 2, 3, 1).flatten(0, 2)
        assignment = self._assignment(route)
        mixed = self.experts(tokens if route.regions is None else tokens[route.regions], assignment)
        return assignment.onto_grid(mixed).view(*route.grid, self.channels).permute(0, 3, 1, 2), route

    def _by_window(self, x: Tensor, conditions: Sequence[Tensor]) -> tuple[Tensor, RouteResult]:
        size, surplus = self.window_size, self.surplus
        whole = pad_to_multiple(x, size)
        rows, columns = whole.shape[2] // size, whole.shape[3] // size
        route = self.router(described(whole, rows, columns), _by_region(conditions, rows, columns, size))
        assignment, experts = self._assignment(route), list(cast(nn.ModuleList, self.experts))
        halos = [halo_of(expert) or 0 for expert in experts]
        if computes_all(x):
            wide = pad_to_multiple(x, size, surround=surplus)
            around = [cut(wide, surplus - halo) for halo in halos]
            mixed = masked(experts, around, assignment, run_surrounded, whole)
        else:
            mixed = by_choice(experts, x, assignment, run_surrounded, (size, size), halos)
        return cropped(mixed, x.shape[2], x.shape[3]), route

    def _by_image(self, x: Tensor, conditions: Sequence[Tensor]) -> tuple[Tensor, RouteResult]:
        route = self.router(described(x, 1, 1), _by_region(conditions, 1, 1, 1))
        assignment, experts = self._assignment(route), list(cast(nn.ModuleList, self.experts))
        if computes_all(x):
            return masked(experts, [x] * len(experts), assignment, run_whole, x), route
        return by_choice(experts, x, assignment, run_whole, x.shape[2:], [0] * len(experts)), route

    def _assignment(self, route: RouteResult) -> Assignment:
        """The chosen experts, and behind them those that every region goes to."""
        indices, weights, number = [route.indices], [route.weights], self.router.num_experts
        every = route.indices[:, :1]
        if self.has_shared:
            indices.append(torch.full_like(every, number))
            weights.append(torch.ones_like(route.weights[:, :1]))
        if self.has_fallback:
            weights[0] = route.probabilities.gather(1, route.indices)
            indices.append(torch.full_like(every, number + self.has_shared))
            weights.append(1 - weights[0].sum(1, keepdim=True))
        gate = 1 if route.gate is None else route.gate[:, None]
        return Assignment(torch.cat(indices, 1), torch.cat(weights, 1) * gate, route.grid, route.regions)

    def extra_repr(self) -> str:
        window = f", window_size={self.window_size}" if self.level == "window" else ""
        always = "".join(
            f", {name}" for name, has in (("shared", self.has_shared), ("fallback", self.has_fallback)) if has
        )
        return f"{self.channels}, level={self.level!r}{window}{always}"


def _by_region(conditions: Sequence[Tensor], rows: int, columns: int, multiple: int) -> list[Tensor]:
    """Conditions that are maps, as means over regions."""

    def mean(condition: Tensor) -> Tensor:
        cells = pad_to_multiple(condition, multiple)
        cells = cells.unflatten(3, (columns, cells.shape[3] // columns)).unflatten(2, (rows, cells.shape[2] // rows))
        return cells.mean((3, 5))

    return [mean(condition) if condition.ndim == 4 else condition for condition in conditions]


def _router(router: TopKRouter | None, k: int | None, width: int, experts: int, level: Level) -> TopKRouter:
    if router is None:
        return TopKRouter(width, experts, k=2 if k is None else k)
    if k is not None:
        raise ValueError(f"k must be left out where a router is given, which has its own, got {k}")
    if not isinstance(router, TopKRouter):
        raise TypeError(f"router must be a TopKRouter, got {type(router).__name__}")
    if (router.in_channels, router.num_experts) != (width, experts):
        found = f"{router.in_channels} and {router.num_experts}"
        raise ValueError(f"router must be of {width} channels and {experts} experts at level {level!r}, got {found}")
    if level == "image" and router.gate is not None:
        found = f"{router.keep} and {router.bypass}"
        raise ValueError(f"router must have keep = 1 and bypass = 0 at level 'image', got {found}")
    return router


def _check_experts(
    experts: Sequence[nn.Module], every: Sequence[nn.Module], channels: int, level: Level, window: int
) -> None:
    if len(experts) == 0:
        raise ValueError("experts must be at least one, got none")
    for expert in every:
        if not isinstance(expert, nn.Module):
            raise TypeError(f"experts must be modules, got {expert!r}")
        name, halo, cell = type(expert).__name__, halo_of(expert), tiling_of(expert).tile_multiple
        if isinstance(expert, Expert) and expert.channels != channels:
            raise ValueError(f"experts must have {channels} channels, got {name} with {expert.channels}")
        if level == "token" and halo != 0:
            raise ValueError(f"experts must have halo 0 at level 'token', got {name} with {halo}: take level 'window'")
        if level == "token" and not isinstance(expert, PointwiseExpert):
            raise TypeError(f"experts must be PointwiseExpert at level 'token', got {name}")
        if level == "window" and halo is None:
            raise ValueError(f"experts must have a halo at level 'window', got {name}, which may see the whole map")
        if level == "window" and halo and not isinstance(expert, Expert):
            raise TypeError(f"experts with a halo must derive from Expert at level 'window', got {name}")
        if level == "window" and window % cell:
            raise ValueError(f"window_size must be a multiple of the cells of {name}, {cell}, got {window}")
    widths = {expert.fc1.out_features for expert in every if isinstance(expert, PointwiseExpert)}
    if level == "token" and len(widths) > 1:
        raise ValueError(f"experts must be of one width at level 'token', got {sorted(widths)}")
