"""Taking regions to their experts and back: to those alone that were chosen for each, or to all of them, masked."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor

from ..kernels.memory_format import is_channels_last
from .experts import Expert, cut
from .padding import mirrored
from .precision import at_least_float32

Run = Callable[[nn.Module, Tensor], Tensor]
Size = Sequence[int]

EPS = 1e-5
STRETCH = 1024


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

    def pixels(self, size: Size, shape: Size, halo: int = 0) -> Tensor:
        """The numbers of the pixels of all T regions in a batch of maps: (T, height + 2 halo, width + 2 halo).

        Args:
            size: height and width of a region.
            shape: of a map; what lies outside is mirrored.
            halo: how many pixels around a region are of it.

        >>> Assignment(torch.tensor([[0], [0]]), torch.ones(2, 1), (1, 1, 2), None).pixels((1, 2), (1, 4), 1)[1]
        tensor([[1, 2, 3, 2],
                [1, 2, 3, 2],
                [1, 2, 3, 2]])
        """
        _, rows, columns = self.grid
        every = torch.arange(len(self.indices), device=self.indices.device) if self.regions is None else self.regions
        place = every[:, None]
        down, across = (torch.arange(-halo, side + halo, device=place.device) for side in size)
        down = mirrored(place // columns % rows * size[0] + down, shape[0])
        across = mirrored(place % columns * size[1] + across, shape[1])
        return ((place // (rows * columns) * shape[0] + down) * shape[1])[:, :, None] + across[:, None]

    def onto_grid(self, values: Tensor) -> Tensor:
        """Values of the T regions, (T, ...), as values of all: zero for those that are left alone."""
        if self.regions is None:
            return values
        images, rows, columns = self.grid
        everywhere = values.new_zeros(images * rows * columns, *values.shape[1:])
        return everywhere.index_put((self.regions,), values)


def by_choice(
    experts: Sequence[nn.Module], x: Tensor, assignment: Assignment, run: Run, size: Size, halos: Sequence[int]
) -> Tensor:
    """Add up the outputs of the chosen experts, which alone are computed, for regions that lie channels-last.

    Where there are gradients, experts without a region run on none: their parameters get gradients of zeros, as
    DistributedDataParallel needs.

    Args:
        experts: in their order.
        x: the map, (B, C, H, W).
        assignment: which regions go where.
        run: applies an expert.
        size: height and width of a region.
        halos: how many pixels around its regions each expert gets, mirrored where the map ends.
    """
    (images, rows, columns), channels, surplus = assignment.grid, x.shape[1], max(halos)
    shape = images, rows * size[0], columns * size[1], channels
    around = assignment.pixels(size, x.shape[2:], surplus)
    within = assignment.pixels(size, shape[1:3])
    chosen = [(assignment.indices == number).nonzero(as_tuple=True) for number in range(len(experts))]
    wanted = [cut(around[some], surplus - halo) for (some, _), halo in zip(chosen, halos, strict=True)]
    mixed = x.new_zeros(images * shape[1] * shape[2], channels)
    for expert, (some, choice), region in zip(experts, chosen, rows_of(tokens_of(x), wanted), strict=True):
        if len(some) or torch.is_grad_enabled():
            made = _checked(run(expert, region.permute(0, 3, 1, 2)), (channels, *size), expert)
            made = _weighted(made, assignment.weights[some, choice][:, None, None, None], x)
            # Each pixel comes once: nothing is added up in an order that could vary.
            mixed.index_add_(0, within[some].flatten(), made.permute(0, 2, 3, 1).flatten(0, 2))
    return map_of(mixed.view(shape), x)


def masked(
    experts: Sequence[nn.Module], maps: Sequence[Tensor], assignment: Assignment, run: Run, like: Tensor
) -> Tensor:
    """Add up the same with every expert computed for whole maps.

    Args:
        experts: in their order.
        maps: for each expert the map, with whatever surrounds it.
        assignment: which regions go where.
        run: applies an expert.
        like: of the shape (B, C, H, W) and dtype of what is returned; regions share it out evenly.
    """
    weights, chosen = assignment.table(len(experts)), assignment.chosen(len(experts))
    mixed = torch.zeros_like(like)
    for number, (expert, x) in enumerate(zip(experts, maps, strict=True)):
        weight, mask = (_as_map(values[:, number], assignment.grid, like) for values in (weights, chosen))
        made = _weighted(_checked(run(expert, x), tuple(like.shape[1:]), expert), weight, like)
        # Not a product with zero: what was not chosen may be NaN.
        mixed = mixed + torch.where(mask, made, 0)
    return mixed


def computes_all(x: Tensor) -> bool:
    """Whether every expert is computed for everything: what is chosen is not known before a program runs."""
    tracing = torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return x.is_meta or torch.compiler.is_compiling() or tracing or is_batchedtensor(x)


def run_whole(expert: nn.Module, x: Tensor) -> Tensor:
    """Apply an expert to whole images, which it pads as it likes."""
    return expert(x)


def run_surrounded(expert: nn.Module, x: Tensor) -> Tensor:
    """Apply an expert to a map that has its halo around it."""
    return expert.valid(x) if isinstance(expert, Expert) else expert(x)


def halo_of(expert: nn.Module) -> int | None:
    """How far an expert sees; None where it sees the whole map, or does not say.

    >>> halo_of(nn.AdaptiveAvgPool2d(1)) is None
    True
    """
    return cast("int | None", getattr(expert, "halo", None))


def tokens_of(x: Tensor) -> Tensor:
    """The pixels of a map, (B, C, H, W) -> (B H W, C)."""
    return (x.permute(0, 2, 3, 1).flatten(1, 2) if is_channels_last(x) else _transposed(x.flatten(2), 2)).flatten(0, 1)


def map_of(tokens: Tensor, x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, C, H, W), in the memory format of `x`."""
    if is_channels_last(x):
        return tokens.permute(0, 3, 1, 2)
    return _transposed(tokens.flatten(1, 2), 1).unflatten(2, tokens.shape[1:3])


def rows_of(tokens: Tensor, wanted: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Copy rows, (N, C), by number for several who ask: each (...) -> (..., C). There is one gradient for all."""
    every = torch.cat([numbers.flatten() for numbers in wanted])
    # Of the two, which do the same, each has a gradient that repeats bit for bit on these devices alone.
    rows = tokens.index_select(0, every) if tokens.is_cpu else tokens[every]
    parts = rows.split([numbers.numel() for numbers in wanted])
    return tuple(part.view(*numbers.shape, tokens.shape[1]) for part, numbers in zip(parts, wanted, strict=True))


def _transposed(x: Tensor, pixels: int) -> Tensor:
    """Exchange the last two dimensions by stretches of pixels, which stay in the cache of a CPU; so is the gradient."""
    stretch = STRETCH if x.is_cpu else max(1, x.shape[pixels])
    return torch.cat([part.mT for part in x.split(stretch, pixels)], 3 - pixels)


def described(x: Tensor, rows: int, columns: int) -> Tensor:
    """Mean and root mean square of each channel over a grid of windows: (B, C, H, W) -> (B, 2 C, rows, columns).

    Texture has a mean of nothing: what tells it is the second.

    >>> described(torch.tensor([[[[1.0, -1.0, 2.0, 2.0]]]]), 1, 2).round(decimals=3)
    tensor([[[[0., 2.]],
    <BLANKLINE>
             [[1., 2.]]]])
    """
    cells = at_least_float32(x).unflatten(3, (columns, x.shape[3] // columns)).unflatten(2, (rows, x.shape[2] // rows))
    number = cells.shape[3] * cells.shape[5]
    # Sums: the gradient of a mean would be written out for every pixel.
    mean, square = cells.sum((3, 5)) / number, cells.square().sum((3, 5)) / number
    return torch.cat([mean, (square + EPS).sqrt()], dim=1)


def _as_map(values: Tensor, grid: tuple[int, int, int], like: Tensor) -> Tensor:
    """What is known by region, (B h w,), for every pixel: (B, 1, H, W)."""
    images, rows, columns = grid
    height, width = like.shape[2:]
    cells = values.view(images, 1, rows, 1, columns, 1)
    return cells.expand(-1, -1, -1, height // rows, -1, width // columns).flatten(4, 5).flatten(2, 3)


def _weighted(made: Tensor, weights: Tensor, like: Tensor) -> Tensor:
    return (made * weights.to(made.dtype)).to(like.dtype)


def _checked(made: Tensor, wanted: tuple[int, ...], expert: nn.Module) -> Tensor:
    found = tuple(made.shape[1:])
    if found != wanted:
        raise ValueError(f"experts must keep the shape of a map, {wanted}; {type(expert).__name__} makes {found} of it")
    return made
