"""Draw a figure of each net from its modules, as they are: `python docs/draw_nets.py` writes docs/nets/*.png.

Parts that are made in `claritycore.nets` are opened until blocks are reached; equal neighbours are counted.
"""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from claritycore.blocks.reparam import count_parameters
from claritycore.nets import AutoConfig, AutoModel, Stage, UNet

FOLDER = Path(__file__).parent / "nets"
NETS = ("swin-unet", "hersr", "harmonic", "rsfmoe", "rrdbnet", "plksr", "span")
SKELETON = ("stem", "encoder", "downs", "bottleneck", "ups", "fusions", "decoder", "refinement", "head")
COLOURS = {"stage": "#dbe9f6", "way": "#fde9d0", "end": "#e4f1df", "else": "#efe6f5"}
SILENT = (nn.Identity, nn.Dropout)
GAP = 0.9  # between boxes, for an arrow and what lies on it


def blocks(module: nn.Module) -> Iterator[str]:
    """Names of the blocks of a part, in order."""
    opened = isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict)
    if opened or (type(module).__module__.startswith("claritycore.nets") and any(module.children())):
        for child in module.children():
            yield from blocks(child)
    elif not isinstance(module, (*SILENT, Stage)):  # a stage of no blocks
        yield type(module).__name__


def words(module: nn.Module) -> str:
    """The blocks of a part, a line each, equal neighbours counted."""
    counted = ((name, len(list(group))) for name, group in groupby(repeats(list(blocks(module)))))
    return "\n".join(name if count == 1 else f"{count} x {name}" for name, count in counted)


def repeats(names: list[str]) -> list[str]:
    """Write a sequence that repeats, but for the last block, as its period in brackets."""
    for last in (0, 1):
        most = len(names) - last
        for period in range(2, most // 2 + 1 if len(set(names)) > 1 else 0):
            if most % period == 0 and names[:most] == names[:period] * (most // period):
                return ["[" + ",\n".join(names[:period]) + "]"] * (most // period) + names[most:]
    return names


def box(axes: Axes, x: float, y: float, text: str, kind: str) -> None:
    """A part with its blocks in it."""
    style = {"boxstyle": "round,pad=0.4", "facecolor": COLOURS[kind], "edgecolor": "#555555", "linewidth": 0.8}
    axes.text(x, y, text, ha="center", va="center", fontsize=8, bbox=style, zorder=2)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    """The way from one part to the next, and what lies on it."""
    style = {"arrowstyle": "-|>", "color": "#777777", "linewidth": 1, "shrinkA": 2, "shrinkB": 2}
    axes.annotate("", end, start, arrowprops=style, zorder=1)
    if text:
        middle = [(a + b) / 2 for a, b in zip(start, end, strict=True)]
        backed = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axes.text(*middle, text, fontsize=7, ha="center", va="center", bbox=backed)


def height(text: str) -> float:
    """Of the box that holds a text."""
    return 0.22 + 0.23 * (text.count("\n") + 1)


def draw_unet(axes: Axes, net: UNet) -> float:
    """Encoder down on the left, decoder up on the right; returns the height that it took."""
    left, right, y = 0.0, 5.6, 0.0
    widths = [*(down.in_channels for down in net.downs), net.ups[-1].in_channels]
    box(axes, left - 2.6, y, f"image\n{words(net.stem)}", "end")
    ends = "\n".join(filter(None, (words(net.refinement), words(net.head))))
    box(axes, right + 3.0, y, f"{ends}\n+ image" if net.adds_image else ends, "end")
    floors = tops = [y, y]  # of the boxes above and of those that are drawn, on the left and on the right
    for level, (encoder, decoder) in enumerate(zip(net.encoder, net.decoder, strict=True)):
        size = "H x W" if level == 0 else f"H/{2**level} x W/{2**level}"
        texts = [words(stage) for stage in (encoder, decoder)]
        halves = [height(text) / 2 for text in texts]
        y = y if level == 0 else min(floors) - GAP - max(halves)
        tops = [y + half for half in halves]
        for x, text in zip((left, right), texts, strict=True):
            box(axes, x, y, text, "stage")
        if level == 0:
            arrow(axes, (left - 2.0, y), (left - 0.9, y))
            arrow(axes, (right + 0.9, y), (right + 2.0, y))
        else:
            arrow(axes, (left, floors[0]), (left, tops[0]), words(net.downs[level - 1]))
            arrow(axes, (right, tops[1]), (right, floors[1]), words(net.ups[level - 1]))
        join = words(net.fusions[level]) if net.fusions else "no skip"
        arrow(axes, (left + 1.0, y), (right - 1.0, y), f"{join}, {widths[level]} channels, {size}")
        floors = [y - half for half in halves]
    level = len(net.encoder)
    bottom = f"{words(net.bottleneck)}\n{widths[-1]} channels, H/{2**level} x W/{2**level}"
    y = min(floors) - GAP - height(bottom) / 2
    box(axes, (left + right) / 2, y, bottom, "stage")
    arrow(axes, (left, floors[0]), ((left + right) / 2 - 1.5, y), words(net.downs[-1]))
    arrow(axes, ((left + right) / 2 + 1.5, y), (right, floors[1]), words(net.ups[-1]))
    beside = [(name, part) for name, part in net.named_children() if name not in SKELETON and words(part)]
    y -= height(bottom) / 2
    for name, part in beside:
        text = f"{name}\n{words(part)}"
        y -= height(text) / 2 + 0.35
        box(axes, (left + right) / 2, y, text, "else")
        y -= height(text) / 2
    return -y + 0.8


def draw_chain(axes: Axes, net: nn.Module) -> float:
    """Children one after the other, from left to right."""
    x, end = 0.0, 0.0
    for name, part in net.named_children():
        text = words(part)
        if text:
            if x:
                arrow(axes, (x - 1.75, 0), (x - 1.0, 0))
            box(axes, x, 0, f"{name}\n{text}", "stage" if "\n" in text or " x " in text else "end")
            x, end = x + 2.6, x
    axes.set_xlim(-1.2, end + 1.2)
    return 0.8


def draw(name: str) -> None:
    """Write the figure of one net."""
    with torch.device("meta"):
        net = AutoModel.from_config(AutoConfig.from_name(name))
    parameters = count_parameters(net) / 1e6
    figure = Figure(figsize=(9, 4), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 0.93))
    axes.axis("off")
    deep = (draw_unet if isinstance(net, UNet) else draw_chain)(axes, net)
    if isinstance(net, UNet):
        axes.set_xlim(-3.6, 10.0)
    axes.set_ylim(-deep, 0.9)
    figure.set_size_inches(9, max(1.1, 0.62 * (deep + 0.9)))
    figure.suptitle(f"{type(net).__name__} ({name}, {parameters:.2f} M parameters)", fontsize=10)
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / f"{name}.png", metadata={"Software": None})


if __name__ == "__main__":
    for each in NETS:
        draw(each)
