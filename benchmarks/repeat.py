"""Whether two runs of the same benchmarks agree within the spread that they print.

make benchmark CSV=first
make benchmark CSV=second
python -m benchmarks.repeat first second  # lists the ratios that do not, and exits with 1 if there are any

Compared is what a run stands by: how much faster than the reference each provider is. Times drift with the machine.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .report import Result, read_csv

Key = tuple[str, str, str, str]


@dataclass(frozen=True)
class Pair:
    """A provider's ratio to the reference in two runs, and how far these may lie apart.

    Args:
        name: benchmark, case, stage and provider.
        first, second: the reference's median over the provider's.
        spread: of a ratio, as a part of it: the inter-quartile ranges of both medians, the larger of the two runs.
    """

    name: str
    first: float
    second: float
    spread: float

    @property
    def apart(self) -> float:
        """How far the two lie apart, as a part of the smaller."""
        return max(self.first, self.second) / min(self.first, self.second) - 1

    @property
    def agrees(self) -> bool:
        return self.apart <= self.spread


def pairs(first: Path, second: Path) -> Iterator[Pair]:
    """What both folders have a ratio of.

    Raises:
        ValueError: if that is nothing.
    """
    runs = [_timed(folder) for folder in (first, second)]
    keys = [key for key in runs[0] if key in runs[1] and key[-1] != "reference"]
    if not keys:
        raise ValueError(f"{first} and {second} have no CSV file of the same benchmark")
    for key in keys:
        rows = [run[key] for run in runs]
        # A ratio of two medians, each with a range of its own.
        spreads = [
            math.hypot(row.iqr_percent, run[*key[:3], "reference"].iqr_percent)
            for row, run in zip(rows, runs, strict=True)
        ]
        yield Pair("  ".join(key), rows[0].vs_reference, rows[1].vs_reference, max(spreads) / 100)


def _timed(folder: Path) -> dict[Key, Result]:
    rows = (row for path in sorted(folder.glob("*.csv")) for row in read_csv(path) if row.vs_reference)
    return {(row.benchmark, row.case, row.stage, row.provider): row for row in rows}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Whether two runs of benchmarks agree within their spread.")
    parser.add_argument("first", type=Path, help="folder of CSV files")
    parser.add_argument("second", type=Path, help="another, of the same benchmarks")
    options = parser.parse_args(argv)
    found = list(pairs(options.first, options.second))
    wrong = [pair for pair in found if not pair.agrees]
    for pair in wrong:
        print(f"{pair.first:.2f}x and {pair.second:.2f}x, spread {pair.spread:.1%}: {pair.name}")
    print(f"{len(found) - len(wrong)} of {len(found)} ratios agree within their spread")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
