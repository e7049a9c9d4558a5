"""Where the windows of a map lie: groups of equal extent, as strided views of it.

Border windows are smaller, so that nothing need be masked or padded. Along an axis there are at most three extents, so
at most nine groups; more where keys reach beyond their window, or where the dilation does not divide the axis.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

from torch import Tensor

from .operands import Axis, Layout


class Run(NamedTuple):
    """Windows of one extent that follow each other along an axis, `count` of them for each of `residues` pixels."""

    axis: Axis
    residues: int
    count: int
    pixel: int  # where the first begins
    place: int  # of that pixel in a whole window
    size: int
    key_pixel: int
    key_place: int
    key_size: int
    step: int = 1  # from each window to the next, in windows

    @property
    def extent(self) -> tuple[slice, slice]:
        """The part of a whole window that there is, of its queries and of its keys."""
        return slice(self.place, self.place + self.size), slice(self.key_place, self.key_place + self.key_size)

    def part(self, start: int, stop: int, step: int = 1) -> "Run":
        """Return some of these windows."""
        ahead = start * self.axis.window * self.axis.dilation
        pixel, key_pixel = self.pixel + ahead, self.key_pixel + ahead
        return self._replace(count=len(range(start, stop, step)), pixel=pixel, key_pixel=key_pixel, step=step)

    def apart(self) -> list[tuple[slice, "Run"]]:
        """Cut into runs whose keys do not overlap, every second or third window, and say which windows these are."""
        step = min(self.count, -(-self.key_size // self.axis.window))
        return [(slice(start, None, step), self.part(start, self.count, step)) for start in range(step)]


class Group(NamedTuple):
    """Windows of one extent. Their pixels have the axes (B, windows, heads, pixels, d)."""

    rows: Run
    columns: Run

    @property
    def keys_per_window(self) -> int:
        """How many keys a window has."""
        return self.rows.key_size * self.columns.key_size

    def queries(self, x: Tensor, heads: int) -> Tensor:
        """Copy the queries out of (B, H, W, heads * d)."""
        return _by_window(self._query_view(x), heads)

    def keys(self, x: Tensor, heads: int) -> Tensor:
        """Copy what the same windows take their keys from."""
        return _by_window(self._key_view(x), heads)

    def write_queries(self, x: Tensor, windows: Tensor) -> None:
        """Put pixels back where `queries` finds them."""
        view = self._query_view(x)
        pixels = _by_pixel(windows, view)
        view.unflatten(-1, pixels.shape[-2:]).copy_(pixels)

    def add_keys(self, x: Tensor, windows: Tensor) -> None:
        """Add pixels where `keys` finds them, those of neighbours that overlap too."""
        pixels = _by_pixel(windows, self._key_view(x))
        for (i, rows), (j, columns) in product(self.rows.apart(), self.columns.apart()):
            view = Group(rows, columns)._key_view(x)
            view.unflatten(-1, pixels.shape[-2:]).add_(pixels[:, :, i, :, :, j])

    def crop(self, bias: Tensor) -> Tensor:
        """View the part of (heads, *window, *key_window) that these windows have."""
        (i, key_i), (j, key_j) = self.rows.extent, self.columns.extent
        return bias[:, i, j, key_i, key_j]

    def pieces(self, batch: int, most: int) -> Iterator[tuple[slice, "Group"]]:
        """Cut into pieces of `most` windows, or one row of them: some images each, or some rows of one."""
        row = self.rows.residues * self.columns.residues * self.columns.count
        images, count = max(1, most // (row * self.rows.count)), max(1, most // row)
        for image, start in product(range(0, batch, images), range(0, self.rows.count, count)):
            rows = self.rows.part(start, min(start + count, self.rows.count))
            yield slice(image, image + images), Group(rows, self.columns)

    def _query_view(self, x: Tensor) -> Tensor:
        return self._view(x, [(run.pixel, run.size) for run in self])

    def _key_view(self, x: Tensor) -> Tensor:
        return self._view(x, [(run.key_pixel, run.key_size) for run in self])

    def _view(self, x: Tensor, cuts: Sequence[tuple[int, int]]) -> Tensor:
        """View (B, H, W, F) as (B, residues, windows, pixels, the same across, F)."""
        shape, strides, start = [len(x)], [x.stride(0)], x.storage_offset()
        for run, (pixel, size), stride in zip(self, cuts, x.stride()[1:3], strict=True):
            step = run.axis.dilation * stride
            shape += [run.residues, run.count, size]
            strides += [stride, run.step * run.axis.window * step, step]
            start += pixel * stride
        return x.as_strided([*shape, x.shape[3]], [*strides, x.stride(3)], start)


def groups(layout: Layout, size: Sequence[int]) -> Iterator[Group]:
    """Cut a map into groups of windows."""
    return (Group(*runs) for runs in product(*(_runs(axis, layout.zero_border) for axis in layout.axes(size))))


def border(axis: Axis) -> tuple[int, int]:
    """Return how far keys may reach beyond the map, before it and after."""
    return (axis.origin + axis.margin) * axis.dilation, (axis.window + axis.margin) * axis.dilation


def _runs(axis: Axis, with_border: bool) -> list[Run]:
    """Cut an axis. The first of every `dilation` pixels may have one more pixel of their own than the rest."""
    least, longer = divmod(axis.length, axis.dilation)
    runs = []
    for first, residues, tokens in ((0, longer, least + 1), (longer, axis.dilation - longer, least)):
        if residues and tokens:
            runs += _runs_among(axis, first, residues, tokens, with_border)
    return runs


def _runs_among(axis: Axis, first: int, residues: int, tokens: int, with_border: bool) -> list[Run]:
    runs: list[Run] = []
    before = border(axis)[0] if with_border else 0
    for start in range(-axis.origin, tokens, axis.window):
        begin, end = max(start, 0), min(start + axis.window, tokens)
        key_start = start - axis.margin
        key_begin, key_end = key_start, key_start + axis.key_window
        if not with_border:
            key_begin, key_end = max(key_begin, 0), min(key_end, tokens)
        pixel, key_pixel = (first + i * axis.dilation for i in (begin, key_begin))
        run = Run(
            *(axis, residues, 1, pixel, begin - start, end - begin),
            *(before + key_pixel, key_begin - key_start, key_end - key_begin),
        )
        if runs and runs[-1].extent == run.extent:
            runs[-1] = runs[-1]._replace(count=runs[-1].count + 1)
        else:
            runs.append(run)
    return runs


def _by_window(view: Tensor, heads: int) -> Tensor:
    """Copy (B, residues, windows, pixels, the same across, heads * d) to (B, windows, heads, pixels, d)."""
    windows = view.unflatten(-1, (heads, -1)).permute(0, 1, 2, 4, 5, 7, 3, 6, 8)
    return windows.reshape(len(view), -1, heads, view.shape[3] * view.shape[6], view.shape[7] // heads)


def _by_pixel(windows: Tensor, view: Tensor) -> Tensor:
    """Order the pixels of windows as a view of a map has them, heads and d apart."""
    batch, *down, rows = view.shape[:4]
    *across, columns, _ = view.shape[4:]
    heads, _, d = windows.shape[-3:]
    return windows.reshape(batch, *down, *across, heads, rows, columns, d).permute(0, 1, 2, 6, 3, 4, 7, 5, 8)
