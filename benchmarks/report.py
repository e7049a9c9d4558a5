"""What a benchmark says: progress while it runs, a table and a CSV when it ends, a plot if asked for."""

import csv
import math
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO, get_args, get_type_hints

from .machine import Stamp

WIDTH = 120
CEILING_UNITS = {"copy": "B/s", "matmul": "flop/s", "exp": "exp/s"}


@dataclass(frozen=True)
class Result:
    """One provider on one case: a row of the CSV. Numbers are None where nothing was timed or no floor declared.

    Args:
        benchmark: name of the benchmark.
        case: label of the case.
        stage: "forward" or "forward+backward".
        provider: name of the provider.
        status: "timed"; "absent" (cannot run here); "refused" (disagrees with the reference); "failed" (raised).
        reason: why it was not timed; "noisy" where the spread is too large for the median to say much.
        dtype: of the inputs.
        device: "cpu" or "cuda".
        peer: name of the provider that `vs_peer` compares with.
        median_s: median time of one call, in seconds.
        iqr_percent: inter-quartile range of the times, in percent of the median.
        repeats: number of times taken.
        peak_bytes: most bytes of tensors held at once, over what was held before the call.
        vs_reference: the reference's median over this one: above 1 is faster than the reference.
        vs_peer: the same for the peer.
        floor_s: shortest time that this machine could need, in seconds.
        over_floor: this median over the floor.
        bound_by: the ceiling that sets the floor: "copy", "matmul" or "exp".
    """

    benchmark: str
    case: str
    stage: str
    provider: str
    status: str
    reason: str
    dtype: str
    device: str
    peer: str = ""
    median_s: float | None = None
    iqr_percent: float | None = None
    repeats: int | None = None
    peak_bytes: int | None = None
    vs_reference: float | None = None
    vs_peer: float | None = None
    floor_s: float | None = None
    over_floor: float | None = None
    bound_by: str = ""


class Progress:
    """One line on stderr that follows the run: rewritten in place on a terminal, one below the other elsewhere."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.start, self.end = ("\r\033[K", "") if self.stream.isatty() else ("", "\n")

    def show(self, text: str) -> None:
        print(f"{self.start}{textwrap.shorten(text, WIDTH)}", end=self.end, file=self.stream, flush=True)

    def clear(self) -> None:
        print(self.start, end="", file=self.stream, flush=True)


def label(case: Mapping[str, Any]) -> str:
    """Name a case by its keys and values: "batch=1 channels=48"."""
    return " ".join(f"{key}={str(value).removeprefix('torch.')}" for key, value in case.items())


def table(results: Sequence[Result], stamp: Stamp, ceilings: dict[str, float]) -> str:
    """Lay the results out for reading: a block per case, a line per provider, no line over 120 columns."""
    threads = f"{stamp.threads} thread{'s' if stamp.threads > 1 else ''}"
    lines = [
        f"{stamp.machine}, {stamp.cores} cores, {threads}, {stamp.os}",
        f"python {stamp.python}, torch {stamp.torch}, triton {stamp.triton}, commit {stamp.commit}, {stamp.date}",
    ]
    if ceilings:
        best = (f"{name} {_scaled(rate)}{CEILING_UNITS[name]}" for name, rate in ceilings.items())
        lines.append(f"ceilings measured here: {', '.join(best)}")
    for (benchmark, case), rows in groupby(results, key=lambda row: (row.benchmark, row.case)):
        lines += ["", f"{benchmark}  {case}"]
        for stage, block in groupby(rows, key=lambda row: row.stage):
            lines += _block(stage, list(block))
    return "\n".join(line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..." for line in lines)


def write_csv(results: Iterable[Result], stamp: Stamp, ceilings: dict[str, float], path: Path) -> None:
    """Write a row per result, each with the machine's stamp and its ceilings in units per second."""
    rates = {f"{name}_per_s": ceilings.get(name) for name in CEILING_UNITS}
    columns = [field.name for field in fields(Result)] + [field.name for field in fields(Stamp)] + list(rates)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(asdict(result) | asdict(stamp) | rates for result in results)


def read_csv(path: Path) -> list[Result]:
    """Read the results that `write_csv` wrote."""
    kinds = get_type_hints(Result)
    with path.open(newline="") as file:
        return [
            Result(**{name: _read(row[name], kind) for name, kind in kinds.items()}) for row in csv.DictReader(file)
        ]


def plot(results: Sequence[Result], path: Path) -> None:
    """Draw time and memory against case as a PNG, a line per provider and the floor dashed; a column per stage."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stages = {stage: [r for r in results if r.stage == stage] for stage in dict.fromkeys(r.stage for r in results)}
    figure = Figure(figsize=(6 * len(stages), 6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, len(stages), squeeze=False, sharex="col", height_ratios=(3, 2))
    for times, memory, (stage, rows) in zip(above, below, stages.items(), strict=True):
        places = _places(list(dict.fromkeys(row.case for row in rows)))
        for provider in dict.fromkeys(row.provider for row in rows if row.median_s):
            timed = [row for row in rows if row.provider == provider and row.median_s]
            at = [places[row.case] for row in timed]
            times.plot(at, [row.median_s for row in timed], "o-", label=provider)
            memory.plot(at, [row.peak_bytes or math.nan for row in timed], "o-")
        floors = {places[row.case]: row.floor_s for row in rows if row.floor_s}
        if floors:
            times.plot(floors.keys(), floors.values(), "k_--", label="floor")
        if times.lines:
            times.legend()
        for axes, unit in ((times, "seconds"), (memory, "bytes")):
            axes.set(yscale="log" if axes.lines else "linear", ylabel=unit)
            axes.grid(alpha=0.3)
        if len(set(places.values())) > 1 and max(places.values()) >= 2 * len(places):
            memory.set_xscale("log")
        names, common = _names(list(places))
        memory.set_xticks(list(places.values()), names, fontsize="small")
        memory.set_xlabel(common, fontsize="small")
        memory.set_xticks([], minor=True)
        times.set_title(f"{rows[0].benchmark}, {rows[0].dtype}, {stage}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _places(cases: Sequence[str]) -> dict[str, float]:
    """Where cases stand on the axis: at the number that alone tells them apart, else in a row."""
    settings, varied = _settings(cases)
    values = [each.get(varied[0], "") for each in settings] if len(varied) == 1 else []
    if values and all(value.isdecimal() for value in values):
        return dict(zip(cases, map(float, values), strict=True))
    return {case: float(place) for place, case in enumerate(cases)}


def _names(cases: Sequence[str]) -> tuple[list[str], str]:
    """What is written below each case, a line for each key that varies, and what all have in common."""
    settings, varied = _settings(cases)
    if not varied:
        return [case.replace(" ", "\n") for case in cases], ""
    common = " ".join(f"{key}={value}" for key, value in settings[0].items() if key not in varied)
    if len(varied) == 1:
        return [each.get(varied[0], "") for each in settings], f"{varied[0]}  ({common})"
    return ["\n".join(f"{key}={each.get(key, '')}" for key in varied) for each in settings], common


def _settings(cases: Sequence[str]) -> tuple[list[dict[str, str]], list[str]]:
    """The keys and values of each case, and the keys that tell them apart."""
    settings = [dict(part.partition("=")[::2] for part in case.split(" ")) for case in cases]
    return settings, [key for key in settings[0] if len({each.get(key) for each in settings}) > 1] if settings else []


def _read(text: str, kind: Any) -> Any:
    """A value of a CSV: text, or a number where there is one."""
    if kind is str:
        return text
    return (int if int in get_args(kind) else float)(text) if text else None


def file_stem(benchmark: str, dtype: str, device: str, stamp: Stamp) -> str:
    """Name a run by what its figures hang on: benchmark, dtype, machine, threads of a CPU, commit."""
    machine = stamp.machine if device == "cuda" else f"{stamp.machine} {stamp.threads}t"
    return "-".join([benchmark, dtype, re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-"), stamp.commit])


def _block(stage: str, rows: list[Result]) -> list[str]:
    peer = rows[0].peer
    floor = f", floor {_scaled(rows[0].floor_s)}s set by {rows[0].bound_by}" if rows[0].floor_s else ""
    heads = (
        ["median", "spread", "memory", "vs reference"] + [f"vs {peer}"[:16]] * bool(peer) + ["over floor"] * bool(floor)
    )
    name_width = max(12, *(len(row.provider) for row in rows))
    widths = [max(10, len(head)) for head in heads]
    lines = [f"{stage}, {rows[0].dtype}{floor}", _line("", heads, name_width, widths)]
    for row in rows:
        if row.status != "timed":
            lines.append(f"  {row.provider:<{name_width}}  {row.status}: {row.reason}")
            continue
        cells = [f"{_scaled(row.median_s)}s", f"{row.iqr_percent:.1f} %", f"{_scaled(row.peak_bytes)}B"]
        cells += [_ratio(row.vs_reference)]
        cells += [_ratio(row.vs_peer)] * bool(peer) + [_ratio(row.over_floor)] * bool(floor)
        lines.append(_line(row.provider, cells, name_width, widths) + f"  {row.reason}".rstrip())
    return lines


def _line(name: str, cells: list[str], name_width: int, widths: list[int]) -> str:
    return f"  {name:<{name_width}}" + "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _scaled(value: float) -> str:
    """Format with three digits and an SI prefix, a space before the prefix: 0.0123 -> "12.3 m"."""
    if value == 0:
        return "0 "
    scales = zip(range(12, -12, -3), ("T", "G", "M", "k", "", "m", "u", "n"), strict=True)
    exponent, prefix = next((scale for scale in scales if abs(value) >= 0.9995 * 10.0 ** scale[0]), (-9, "n"))
    digits = value / 10.0**exponent
    return f"{digits:.{0 if digits >= 99.95 else 1 if digits >= 9.995 else 2}f} {prefix}"


if __name__ == "__main__":
    for file in map(Path, sys.argv[1:]):
        plot(read_csv(file), file.with_suffix(".png"))
