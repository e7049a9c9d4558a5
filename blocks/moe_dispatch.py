"""Taking regions to their experts and back: to those alone that were chosen for each, or to all of them, masked."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .experts import Expert, cut
from .precision import at_least_float32

Run = Callable[[nn.Module, Tensor], Tensor]
Take = Callable[[Sequence[Tensor]], Sequence[Tensor]]

EPS = 1e-5


class Assignment(NamedTuple):
    """Which experts a region goes to, and by how much their outputs count: T regions, m experts each.

    Args:
        indices: ``(T, m)``.
        weights: ``(T, m)``.
        grid: images, rows and columns of regions.
        regions: where the T are not all regions of the grid, their places in it.

    >>> Assignment(torch.tensor([[1]]), torch.tensor([[0.5]]), (1, 1, 3), torch.tensor([2])).table(2)
    tensor([[0.0000, 0.0000],
            [0.0000, 0.0000],
            [0.0000, 0.5000]])
    """

    indices: Tensor
    weights: Tensor
    grid: tuple[int, int, int]
    regions: Tensor | None

    def table(self, num_experts: int) -> Tensor:
        """The weight of every expert for every region of the grid, 0 where it was not chosen: (B h w, E)."""
        spread = self.weights.new_zeros(self.weights.shape[0], num_experts).scatter(1, self.indices, self.weights)
        return self.onto_grid(spread)

    def chosen(self, num_experts: int) -> Tensor:
        """Whether it was chosen, likewise: a weight may be 0, too."""
        return self._replace(weights=torch.ones_like(self.weights)).table(num_experts) > 0

    def places(self) -> Tensor:
        """Where the T regions lie in the grid: (T,)."""
        return torch.arange(len(self.indices), device=self.indices.device) if self.regions is None else self.regions

    def onto_grid(self, values: Tensor) -> Tensor:
        """Values of the T regions, (T, ...), as values of all: zero for those that are left alone."""
        if self.regions is None:
            return values
        images, rows, columns = self.grid
        everywhere = values.new_zeros(images * rows * columns, *values.shape[1:])
        return everywhere.index_put((self.regions,), values)


def by_choice(experts: Sequence[nn.Module], take: Take, assignment: Assignment, run: Run, like: Tensor) -> Tensor:
    """Add up the outputs of the chosen experts, which alone are computed.

    Where there are gradients, experts without a region run on none: their parameters get gradients of zeros, as
    DistributedDataParallel needs.

    Args:
        experts: in their order.
        take: gives each expert those of the T regions that it asks for by number, (n, C, h, w), with whatever
            surrounds them.
        assignment: which of them go where.
        run: applies an expert.
        like: of the shape and dtype of what is returned.
    """
    mixed = torch.zeros_like(like)
    chosen = [(assignment.indices == number).nonzero(as_tuple=True) for number in range(len(experts))]
    for (rows, places), expert, x in zip(chosen, experts, take([rows for rows, _ in chosen]), strict=True):
        if len(rows) or torch.is_grad_enabled():
            made = _checked(run(expert, x), like, expert)
            # Each row comes once: nothing is added up in an order that could vary.
            mixed.index_add_(0, rows, _weighted(made, assignment.weights[rows, places][:, None, None, None], like))
    return mixed


def masked(experts: Sequence[nn.Module], x: Tensor, assignment: Assignment, run: Run, like: Tensor) -> Tensor:
    """Add up the same with every expert computed for whole maps.

    Args:
        experts: in their order.
        x: the map, with whatever surrounds it.
        assignment: which regions go where.
        run: applies an expert.
        like: of the shape (B, C, H, W) and dtype of what is returned; regions share it out evenly.
    """
    weights, chosen = assignment.table(len(experts)), assignment.chosen(len(experts))
    mixed = torch.zeros_like(like)
    for number, expert in enumerate(experts):
        weight, mask = (_as_map(values[:, number], assignment.grid, like) for values in (weights, chosen))
        made = _weighted(_checked(run(expert, x), like, expert), weight, like)
        # Not a product with zero: what was not chosen may be NaN.
        mixed = mixed + torch.where(mask, made, 0)
    return mixed


def computes_all(x: Tensor) -> bool:
    """Whether every expert is computed for everything: what is chosen is not known before a program runs."""
    tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return x.is_meta or torch.compiler.is_compiling() or tracing


def run_whole(expert: nn.Module, x: Tensor) -> Tensor:
    """Apply an expert to whole images, which it pads as it likes."""
    return expert(x)


def run_surrounded(expert: nn.Module, x: Tensor, surplus: int) -> Tensor:
    """Apply an expert to a map that has `surplus` pixels more at each side, of which it takes its halo."""
    x = cut(x, surplus - (halo_of(expert) or 0))
    return expert.valid(x) if isinstance(expert, Expert) else expert(x)


def halo_of(expert: nn.Module) -> int | None:
    """How far an expert sees; None where it sees the whole map, or does not say.

    >>> halo_of(nn.AdaptiveAvgPool2d(1)) is None
    True
    """
    return cast("int | None", getattr(expert, "halo", None))


class Grid(NamedTuple):
    """How a map is cut into windows: their side without and their distance from what surrounds them."""

    size: int
    surplus: int

    def view(self, x: Tensor) -> Tensor:
        """All windows of a map, without a copy: (B, h, w, C, side, side). They overlap."""
        side = self.size + 2 * self.surplus
        return x.unfold(2, side, self.size).unfold(3, side, self.size).permute(0, 2, 3, 1, 4, 5)

    def places(self, x: Tensor, regions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image, row and column of regions."""
        rows, columns = ((side - 2 * self.surplus) // self.size for side in x.shape[2:])
        return regions // (rows * columns), regions // columns % rows, regions % columns


def windows_of(x: Tensor, size: int, surplus: int, regions: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Copy windows out of a map, each with the pixels around it, for several who ask.

    Shape:
        ``(B, C, h size + 2 surplus, w size + 2 surplus)``, each ``(T,)`` -> each
        ``(T, C, size + 2 surplus, size + 2 surplus)``

    Args:
        x: the map.
        size: of a window.
        surplus: how many pixels around it come along.
        regions: for each who asks the places of T different windows, by rows.

    >>> windows_of(torch.arange(6.0).view(1, 1, 1, 6), 1, 0, [torch.tensor([4, 1])])[0].flatten()
    tensor([4., 1.])
    """
    return _Windows.apply(x, Grid(size, surplus), *regions)


class _Windows(torch.autograd.Function):
    """`windows_of`; autograd's own gradient takes three times as long, and makes a map for each who asks."""

    @staticmethod
    def forward(x: Tensor, grid: Grid, *regions: Tensor) -> tuple[Tensor, ...]:
        view = grid.view(x)
        return tuple(view[grid.places(x, some)] for some in regions)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.grid, *regions = inputs
        ctx.shape = x.shape
        ctx.save_for_backward(*regions)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        spread = _Spread.apply(ctx.grid, ctx.shape, *ctx.saved_tensors, *gradients)
        return spread, None, *(None for _ in gradients)


class _Spread(torch.autograd.Function):
    """Its adjoint: the windows of all added into a map of zeros."""

    @staticmethod
    def forward(grid: Grid, shape: torch.Size, *regions_and_windows: Tensor) -> Tensor:
        asked = len(regions_and_windows) // 2
        x = regions_and_windows[asked].new_zeros(shape)
        view, apart = grid.view(x), -(-(grid.size + 2 * grid.surplus) // grid.size)
        for regions, windows in zip(regions_and_windows[:asked], regions_and_windows[asked:], strict=True):
            places = grid.places(x, regions)
            kind = places[1] % apart * apart + places[2] % apart
            for number in range(apart * apart if len(regions) else 0):
                some = (kind == number).nonzero()[:, 0]  # these do not meet, and so may be written at once
                here = tuple(place[some] for place in places)
                view[here] = view[here] + windows[some]
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.grid, _, *regions_and_windows = inputs
        ctx.save_for_backward(*regions_and_windows[: len(regions_and_windows) // 2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        windows = _Windows.apply(gradient, ctx.grid, *ctx.saved_tensors)
        return None, None, *(None for _ in windows), *windows


def put_together(windows: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Put windows (B h w, C, size, size) side by side: (B, C, h size, w size).

    >>> put_together(torch.arange(4.0).view(2, 1, 1, 2), (1, 1, 2))
    tensor([[[[0., 1., 2., 3.]]]])
    """
    cells = windows.view(*grid, *windows.shape[1:])
    return cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def described(x: Tensor, rows: int, columns: int) -> Tensor:
    """Mean and root mean square of each channel over a grid of windows: (B, C, H, W) -> (B, 2 C, rows, columns).

    Texture has a mean of nothing: what tells it is the second.

    >>> described(torch.tensor([[[[1.0, -1.0, 2.0, 2.0]]]]), 1, 2).round(decimals=3)
    tensor([[[[0., 2.]],
    <BLANKLINE>
             [[1., 2.]]]])
    """
    cells = at_least_float32(x).unflatten(3, (columns, x.shape[3] // columns)).unflatten(2, (rows, x.shape[2] // rows))
    root = (cells.square().mean((3, 5)) + EPS).sqrt()
    return torch.cat([cells.mean((3, 5)), root], dim=1)


def _as_map(values: Tensor, grid: tuple[int, int, int], like: Tensor) -> Tensor:
    """What is known by region, (B h w,), for every pixel: (B, 1, H, W)."""
    images, rows, columns = grid
    height, width = like.shape[2:]
    cells = values.view(images, 1, rows, 1, columns, 1)
    return cells.expand(-1, -1, -1, height // rows, -1, width // columns).flatten(4, 5).flatten(2, 3)


def _weighted(made: Tensor, weights: Tensor, like: Tensor) -> Tensor:
    return (made * weights.to(made.dtype)).to(like.dtype)


def _checked(made: Tensor, like: Tensor, expert: nn.Module) -> Tensor:
    if made.shape[1:] != like.shape[1:]:
        wanted, found = tuple(like.shape[1:]), tuple(made.shape[1:])
        raise ValueError(f"experts must keep the shape of a map, {wanted}; {type(expert).__name__} makes {found} of it")
    return made
