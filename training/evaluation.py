"""The figures of restored images: each image's, the means, a table and a CSV file of them."""

import csv
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch

from ..nets.checkpoints import write_whole
from .frechet import FeatureSums, frechet_distance
from .routing import Routing, add_routing, routing_figures

PATCH_FID = "patch_fid"
DECIMALS = {"ssim": 4, "input_ssim": 4, "lpips": 4, "dead_experts": 0}

# By recipe, the features of the restored and of the original patches.
Seen = dict[str, tuple[FeatureSums, FeatureSums]]


class Row(NamedTuple):
    """The figures of one image under one recipe.

    Args:
        number: of the image in its folder.
        image: its path in the folder.
        recipe: how it was degraded, or "pairs".
        scale: of the net.
        figures: by name.
        drawn: the numbers that the recipe drew for it, by name.
    """

    number: int
    image: str
    recipe: str
    scale: int
    figures: Mapping[str, float]
    drawn: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What `evaluate` measured: a row for each image and recipe; `str()` of it is a table with the means.

    Args:
        rows: recipe by recipe, in the order of the images.
        seen: by recipe, what the Inception network sees in the patches of the restored and of the original images.
        routed: by recipe, what the routers of the net did, where it has some.

    >>> rows = [Row(0, "a.png", "clean", 4, {"psnr": 30.0}, {}), Row(1, "b.png", "clean", 4, {"psnr": 33.0}, {})]
    >>> print(Evaluation(tuple(rows)))
    recipe  scale  image       psnr
    clean       4  a.png      30.00
    clean       4  b.png      33.00
    clean       4  mean of 2  31.50
    """

    rows: tuple[Row, ...]
    seen: Seen = field(default_factory=dict)
    routed: Routing = field(default_factory=dict)

    @property
    def recipes(self) -> list[str]:
        """The recipes, in their order."""
        return list(dict.fromkeys(row.recipe for row in self.rows))

    def means(self) -> dict[str, dict[str, float]]:
        """The mean figures of each recipe; with them, what only a whole set of images has.

        >>> Evaluation((Row(0, "a.png", "clean", 4, {"psnr": 30.0}, {}),)).means()
        {'clean': {'psnr': 30.0}}
        """
        found = {}
        for recipe in self.recipes:
            rows = self._rows_of(recipe)
            # fsum: the same whatever the order, so whatever the number of processes.
            found[recipe] = {name: math.fsum(row.figures[name] for row in rows) / len(rows) for name in rows[0].figures}
            if recipe in self.seen:
                found[recipe][PATCH_FID] = frechet_distance(*self.seen[recipe])
            found[recipe] |= routing_figures(self.routed.get(recipe, {}))
        return found

    @staticmethod
    def merge(parts: Iterable["Evaluation"]) -> "Evaluation":
        """Put together what several processes measured, each its share of the images.

        Raises:
            ValueError: if the scales differ, or an image was measured more than once under a recipe.

        >>> a, b = (Evaluation((Row(i, f"{i}.png", "clean", 4, {"psnr": 30.0 + i}, {}),)) for i in range(2))
        >>> Evaluation.merge([b, a]).means()
        {'clean': {'psnr': 30.5}}
        """
        parts = list(parts)
        rows = [row for part in parts for row in part.rows]
        if len(scales := sorted({row.scale for row in rows})) > 1:
            raise ValueError(f"evaluations of one scale can be merged, got scales {', '.join(map(str, scales))}")
        if len({(row.recipe, row.number) for row in rows}) < len(rows):
            raise ValueError("evaluations of different images can be merged: one of these was measured twice")
        order = {recipe: place for place, recipe in enumerate(dict.fromkeys(row.recipe for row in rows))}
        seen: Seen = {}
        routed: Routing = {}
        for part in parts:
            for recipe, (restored, original) in part.seen.items():
                add_seen(seen, recipe, restored, original)
            for recipe, sums in part.routed.items():
                add_routing(routed, recipe, sums)
        return Evaluation(tuple(sorted(rows, key=lambda row: (order[row.recipe], row.number))), seen, routed)

    def write_csv(self, path: str | PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the table to a file, figures in full and with the numbers drawn; it appears whole or not at all.

        Raises:
            FileExistsError: if the file exists and `overwrite` is not set.
        """
        path = Path(path)
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists; pass overwrite=True to replace it")
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(self._table(drawn=True))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.getvalue().encode())
        return path

    def __str__(self) -> str:
        header, *lines = self._table()
        told = [header, *([*line[:3], *map(_rounded, header[3:], line[3:])] for line in lines)]
        widths = [max(len(str(line[column])) for line in told) for column in range(len(header))]
        # Recipe and image to the left, numbers to the right.
        signs = ["<", ">", "<", *">" * (len(header) - 3)]
        cells = [
            [f"{cell:{sign}{width}}" for cell, sign, width in zip(line, signs, widths, strict=True)] for line in told
        ]
        return "\n".join("  ".join(line).rstrip() for line in cells)

    def _rows_of(self, recipe: str) -> list[Row]:
        return [row for row in self.rows if row.recipe == recipe]

    def _table(self, *, drawn: bool = False) -> list[list[str | float]]:
        """Header, the rows of each recipe and below them their means; what a line does not have is empty."""
        means = self.means()
        figures = list(dict.fromkeys(name for mean in means.values() for name in mean))
        names = list(dict.fromkeys(name for row in self.rows for name in row.drawn)) if drawn else []
        table: list[list[str | float]] = [["recipe", "scale", "image", *figures, *names]]
        for recipe in self.recipes:
            rows = self._rows_of(recipe)
            for row in rows:
                values = [row.figures.get(name, "") for name in figures] + [row.drawn.get(name, "") for name in names]
                table.append([recipe, row.scale, row.image, *values])
            last = [means[recipe].get(name, "") for name in figures] + [""] * len(names)
            table.append([recipe, rows[0].scale, f"mean of {len(rows)}", *last])
        return table


def add_seen(seen: Seen, recipe: str, restored: FeatureSums, original: FeatureSums) -> None:
    """Add the features of further patches to those of a recipe.

    >>> sums = FeatureSums.of(torch.zeros(3, 2))
    >>> seen = {}
    >>> add_seen(seen, "clean", sums, sums)
    >>> add_seen(seen, "clean", sums, sums)
    >>> seen["clean"][0].count
    6
    """
    if recipe in seen:
        restored, original = seen[recipe][0] + restored, seen[recipe][1] + original
    seen[recipe] = restored, original


def _rounded(name: object, value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.{DECIMALS.get(str(name), 2)}f}"


def gathered(found: Evaluation, processes: int) -> list[Evaluation]:
    """What each of several processes found, in all of them."""
    parts: list[Evaluation] = [found] * processes
    if processes > 1:
        torch.distributed.all_gather_object(parts, found)
    return parts
