"""How far a pixel sees in one scan, in two and in four, as a picture: `python examples/scan_reach.py [PATH]`.

Each panel is the magnitude of the gradient of the centre output pixel of a fresh `SelectiveScan2d` with respect to its
input, averaged over channels, images and blocks. A pixel sees what its scans came to before it: half of the map in one,
three quarters in two, and all of it once both are run backwards too. Of the flat grey it sees nothing.
"""

import sys
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm
from torch import Tensor

from claritycore.blocks import SelectiveScan2d

PANELS = {
    "one direction": ("row",),
    "two directions": ("row", "column"),
    "four directions": ("row", "column", "row_reversed", "column_reversed"),
}
SIDE, CHANNELS, IMAGES, BLOCKS = 49, 16, 4, 4
WEAKEST, STRONGEST = 3e-7, 3e-4
NOTHING = "0.88"


def reach(directions: tuple[str, ...]) -> Tensor:
    """The mean magnitude of the gradient of the centre pixel, (SIDE, SIDE), 1 at the centre itself."""
    total = torch.zeros(SIDE, SIDE)
    for seed in range(BLOCKS):
        torch.manual_seed(seed)
        x = torch.randn(IMAGES, CHANNELS, SIDE, SIDE, requires_grad=True)
        centre = SelectiveScan2d(CHANNELS, directions=directions)(x)[:, :, SIDE // 2, SIDE // 2]
        (gradient,) = torch.autograd.grad((centre * torch.randn_like(centre)).sum(), x)
        total += gradient.abs().mean((0, 1))
    return total / total[SIDE // 2, SIDE // 2]


def draw(path: Path) -> None:
    maps = {title: reach(directions) for title, directions in PANELS.items()}
    mpl.rcParams.update({"font.size": 9, "axes.titlesize": 10})
    figure, axes = plt.subplots(1, 3, figsize=(8.4, 3.05), layout="constrained")
    for axis, (title, values) in zip(axes, maps.items(), strict=True):
        reached = values.masked_fill(values == 0, torch.nan).numpy()
        cmap = mpl.colormaps["magma"].with_extremes(bad=NOTHING)
        image = axis.imshow(reached, norm=LogNorm(WEAKEST, STRONGEST), cmap=cmap)
        axis.plot(SIDE // 2, SIDE // 2, marker="o", markersize=6, markerfacecolor="none", markeredgecolor="cyan")
        axis.set(xticks=[], yticks=[], title=title)
        axis.set_xlabel(", ".join(PANELS[title][:2]) + (", and reversed" if len(PANELS[title]) == 4 else ""))
    figure.colorbar(image, ax=axes, shrink=0.85, pad=0.01, extend="both", label="|gradient|, 1 at the centre")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"{path} ({path.stat().st_size / 1000:.0f} kB)")


def main() -> None:
    mpl.use("Agg")
    root = Path(__file__).parents[1]
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else root / "docs" / "scan_reach.png")


if __name__ == "__main__":
    main()
