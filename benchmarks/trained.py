"""Nets trained alike and measured on the same pictures: the rows of a comparison, as a table, a CSV and a plot."""

import csv
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from claritycore.blocks import reparameterize_model
from claritycore.blocks.reparam import count_parameters
from claritycore.deploy import flop_formulas
from claritycore.nets import AutoModel, BaseConfig
from claritycore.training import ImageFolder, TrainingSettings, degrade, evaluate, read_state, train

from .dncnn import suited
from .machine import Stamp, iqr_percent, time_in_turns
from .report import file_stem
from .runner import NOISY_PERCENT

# Every net is clocked on a degraded crop of this side, and its multiply-adds are those of this crop: routers decide.
SIDE = 256
FIGURES = ("psnr", "ssim", "lf_psnr", "hf_psnr", "input_psnr")


T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One net: what it costs and what it makes of the pictures, means over all.

    Args:
        table: of which comparison.
        net: its name there.
        parameters: as trained.
        macs: multiply-adds for a degraded crop of 256 x 256 pixels, deployed; what routers leave out is not counted.
        seconds: median time of that in float32.
        spread: inter-quartile range of the times, in percent of the median.
        recipe: by which the pictures were degraded.
        images: how many they were, but for those that drew no fault.
        psnr, ssim, lf_psnr, hf_psnr: as `claritycore evaluate` tells them.
        input_psnr: of the degraded pictures.
        steps, batch_size, patch_size, lr, seed: of the training.
    """

    table: str
    net: str
    parameters: int
    macs: int
    seconds: float
    spread: float
    recipe: str
    images: int
    psnr: float
    ssim: float
    lf_psnr: float
    hf_psnr: float
    input_psnr: float
    steps: int
    batch_size: int
    patch_size: int
    lr: float
    seed: int


def trained(name: str, config: BaseConfig, settings: TrainingSettings) -> nn.Module:
    """Train a net, go on with a run that was interrupted, or take one that is done."""
    settings = suited(config, replace(settings, name=name))
    folder, state = Path(settings.runs) / name, None
    if (folder / "last.ckpt").exists():
        state = read_state(folder)
        made = replace(state.settings, data=settings.data, runs=settings.runs)
        if (state.config, made) != (config, settings):
            raise ValueError(f"{folder} is a run of another net or other settings: give another --runs, or remove it")
    if state is None or state.step < settings.steps:
        train(config, settings, state=state, tell=print)
    return AutoModel.from_pretrained(folder).eval()


def measured(
    table: str, nets: dict[str, nn.Module], images: ImageFolder, settings: TrainingSettings, recipe: str
) -> Iterator[Row]:
    """Measure nets side by side: their times are clocked in turns, in one process."""
    deployed = {name: reparameterize_model(net) for name, net in nets.items()}
    crop = degrade(_middle(images[0]), recipe, seeds=[0]).image
    with torch.no_grad():  # the counter of flops does not go with inference mode
        macs = {name: _macs(net, crop) for name, net in deployed.items()}
        calls = {name: lambda net=net: net(crop) for name, net in deployed.items()}
        times = time_in_turns(calls, torch.device("cpu"), repeats=7, seconds=20 * len(nets))
        for name, net in deployed.items():
            every = [row.figures for row in evaluate(net, images, recipes=[recipe]).rows]
            # Of a picture that drew no fault, a net that does nothing has an infinite PSNR: it would hide all others.
            figures = [row for row in every if math.isfinite(row["input_psnr"])]
            yield Row(
                table=table,
                net=name,
                parameters=count_parameters(nets[name]),
                macs=macs[name],
                seconds=statistics.median(times[name]),
                spread=iqr_percent(times[name]),
                recipe=recipe,
                images=len(figures),
                **{key: statistics.fmean(row[key] for row in figures) for key in FIGURES},
                steps=settings.steps,
                batch_size=settings.batch_size,
                patch_size=settings.patch_size or 0,
                lr=suited(nets[name].config, settings).lr,
                seed=settings.seed,
            )


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table, times as multiples of the first's."""
    lines = ["| | parameters | MACs at 256 x 256 | time | PSNR | low | high |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        noisy = ", noisy" if row is not rows[0] and math.hypot(row.spread, rows[0].spread) > NOISY_PERCENT else ""
        cost = f"{row.parameters:,} | {row.macs / 1e9:.1f} G | {row.seconds / rows[0].seconds:.1f}x{noisy}"
        lines.append(f"| {row.net} | {cost} | {row.psnr:.2f} | {row.lf_psnr:.2f} | {row.hf_psnr:.2f} |")
    lines.append(f"| the degraded pictures | | | | {rows[0].input_psnr:.2f} | | |")
    return "\n".join(lines)


def write(rows: Iterable[Any], name: str, folder: Path) -> Path:
    """Write dataclasses and the machine to a CSV whose name says what they are of; a second run replaces it."""
    rows, stamp = list(rows), Stamp.take(torch.device("cpu"))
    path = folder / f"{file_stem(name, 'float32', 'cpu', stamp)}.csv"
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in (*fields(rows[0]), *fields(Stamp))])
        writer.writeheader()
        writer.writerows(asdict(row) | asdict(stamp) for row in rows)
    return path


def read(path: Path, kind: type[T]) -> list[T]:
    """Read what `write` wrote."""
    kinds = get_type_hints(kind)
    with path.open(newline="") as file:
        return [kind(**{name: of(line[name]) for name, of in kinds.items()}) for line in csv.DictReader(file)]


def newest(name: str, folder: Path) -> Path:
    """Find the newest CSV file that `write` made of this.

    Raises:
        FileNotFoundError: if there is none.
    """

    def date(path: Path) -> str:
        with path.open(newline="") as file:
            return next(csv.DictReader(file))["date"]

    found = list(folder.glob(f"{name}-float32-*.csv"))
    if not found:
        raise FileNotFoundError(f"{folder} has no CSV file of {name}")
    return max(found, key=date)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw PSNR against multiply-adds and against time, a point for each net."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    costs = {
        f"G multiply-adds at {SIDE} x {SIDE}": [row.macs / 1e9 for row in rows],
        f"seconds at {SIDE} x {SIDE}, one thread": [row.seconds for row in rows],
    }
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    for panel, (label, values) in zip(axes, costs.items(), strict=True):
        for row, value in zip(rows, values, strict=True):
            panel.plot(value, row.psnr, "o")
            panel.annotate(row.net, (value, row.psnr), xytext=(5, 4), textcoords="offset points", fontsize="small")
        panel.set(xlabel=label, xscale="log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.margins(x=0.3)
        panel.grid(alpha=0.3)
    axes[0].set_ylabel(f"PSNR in dB, recipe {rows[0].recipe}")
    figure.suptitle(f"{rows[0].steps} steps of {rows[0].batch_size} crops, seed {rows[0].seed}")
    figure.savefig(path)


def _middle(image: Tensor) -> Tensor:
    top, left = ((side - SIDE) // 2 for side in image.shape[1:])
    return image[None, :, top : top + SIDE, left : left + SIDE] / 255


def _macs(net: nn.Module, image: Tensor) -> int:
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        net(image)
    return counter.get_total_flops() // 2
