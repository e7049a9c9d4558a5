"""The goals of speed that `goals.toml` declares, and the ratios that were measured: from the newest CSV of each."""

import csv
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .runner import NOISY_PERCENT, RESULTS

GOALS = Path(__file__).with_suffix(".toml")
HEAD = "| | goal | measured | spread | `python -m benchmarks.` |\n|---|---|---|---|---|"

Line = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A ratio that shall be at most, or at least, so much.

    Args:
        what: is judged, and against what.
        benchmark: its name in the CSV files.
        case: words of the case's label, such as "length=4096".
        stage: "forward" or "forward+backward".
        ours: the provider that is judged.
        than: the provider that it is compared with, or "floor".
        most: the largest ratio of ours to the other; or
        least: the smallest ratio of the other to ours.
        never: the bound that holds in a noisy run, too.
        than_stage: where the other is of another stage.
        column: what is compared: "median_s" or "peak_bytes".
        command: the file that has the benchmark, where that is not called as it is.
        cuda: whether it is a GPU's.
    """

    what: str
    benchmark: str
    case: str
    stage: str
    ours: str
    than: str
    most: float | None = None
    least: float | None = None
    never: float | None = None
    than_stage: str = ""
    column: str = "median_s"
    command: str = ""
    cuda: bool = False

    def ratio(self, results: Path = RESULTS) -> tuple[float, float] | None:
        """The newest ratio and its spread in percent, that of both medians together, or None where there is none."""
        provider, column = (self.ours, "floor_s") if self.than == "floor" else (self.than, self.column)
        for lines in _runs(results, self.benchmark, cuda=self.cuda):
            ours = _line(lines, self.case, self.stage, self.ours)
            other = _line(lines, self.case, self.than_stage or self.stage, provider)
            if ours and other:
                mine, theirs = float(ours[self.column]), float(other[column])
                spreads = [float(ours["iqr_percent"]), float(other["iqr_percent"]) if self.than != "floor" else 0.0]
                return (theirs / mine if self.most is None else mine / theirs), math.hypot(*spreads)
        return None

    def verdict(self, ratio: float) -> str:
        """Whether the goal is met, or else the bound beside it, if it has one."""
        bounds = {"met": self.least if self.most is None else self.most, "within its bound": self.never}
        kept = (said for said, bound in bounds.items() if bound is not None and self._within(ratio, bound))
        return next(kept, "not met")

    def _within(self, ratio: float, bound: float) -> bool:
        return ratio >= bound if self.most is None else ratio <= bound

    def row(self, results: Path = RESULTS) -> str:
        asked = f"at least {self.least:g}x" if self.most is None else f"at most {self.most:g}x"
        if self.never is not None:
            asked += f", never {'below' if self.most is None else 'above'} {self.never:g}x"
        what = self.what + ", GPU" * self.cuda + ", with backward" * ("backward" in self.stage)
        command = f"`{self.command or self.benchmark}{' --device cuda' * self.cuda}`"
        found = self.ratio(results)
        if found is None:
            return f"| {what} | {asked} | not yet measured | | {command} |"
        ratio, spread = found
        told = "" if self.column == "peak_bytes" else f"{spread:.0f} %"
        noisy = ", noisy" if told and spread > NOISY_PERCENT else ""
        return f"| {what} | {asked} | {ratio:.2f}x: {self.verdict(ratio)}{noisy} | {told} | {command} |"


def goals() -> list[Goal]:
    """The goals that `goals.toml` declares."""
    return [Goal(**goal) for goal in tomllib.loads(GOALS.read_text())["goal"]]


def table(results: Path = RESULTS) -> str:
    """A row for each goal."""
    return "\n".join([HEAD, *(goal.row(results) for goal in goals())])


def _runs(results: Path, benchmark: str, *, cuda: bool) -> list[list[Line]]:
    """The runs of a benchmark in float32, the newest first."""
    runs = []
    for path in results.glob(f"{benchmark}-float32-*.csv"):
        with path.open(newline="") as file:
            lines = list(csv.DictReader(file))
        if (lines[0]["device"] == "cuda") == cuda:
            runs.append(lines)
    return sorted(runs, key=lambda lines: lines[0]["date"], reverse=True)


def _line(lines: Sequence[Line], case: str, stage: str, provider: str) -> Line | None:
    words = set(case.split())
    for line in lines:
        if words <= set(line["case"].split()) and (line["stage"], line["provider"]) == (stage, provider):
            return line if line["status"] == "timed" else None
    return None
