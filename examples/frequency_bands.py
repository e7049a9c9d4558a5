"""A photograph split into low and high frequencies by every kind of `FreqSplit2d`, as a picture.

python examples/frequency_bands.py [PATH]

Above the low frequencies, below the high ones, twice as strong and on grey. What adds up to the photograph is the same
for all; what differs is what is left of edges above, and of cells below.
"""

import sys
from pathlib import Path
from typing import get_args

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from skimage import data
from torch import Tensor

from claritycore.blocks import FreqBands, FreqSplit2d
from claritycore.blocks.frequency import Kind

TOP, LEFT, SIDE = 60, 135, 120


def photograph() -> Tensor:
    """A crop of scikit-image's Chelsea (CC0), (1, 3, SIDE, SIDE) in [0, 1]."""
    crop = data.chelsea()[TOP : TOP + SIDE, LEFT : LEFT + SIDE]
    return torch.from_numpy(crop).permute(2, 0, 1)[None] / 255


def split(image: Tensor) -> dict[str, FreqBands]:
    return {kind: FreqSplit2d(3, kind=kind).eval()(image) for kind in get_args(Kind)}


@torch.no_grad()
def draw(path: Path) -> None:
    image = photograph()
    mpl.rcParams.update({"font.size": 9, "axes.titlesize": 10})
    figure, axes = plt.subplots(2, 7, figsize=(9, 2.9), layout="constrained")
    show(axes[0, 0], image, "photograph")
    axes[1, 0].text(0.5, 0.5, "low above,\nhigh below,\ntwice as strong", ha="center", va="center")
    axes[1, 0].set_axis_off()
    for column, (kind, bands) in zip(axes.T[1:], split(image).items(), strict=True):
        show(column[0], bands.low, kind)
        show(column[1], 0.5 + 2 * bands.high)
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.03, wspace=0.01, hspace=0.01)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=96)
    print(f"{path} ({path.stat().st_size / 1000:.0f} kB)")


def show(axis: plt.Axes, image: Tensor, title: str = "") -> None:
    axis.imshow(image[0].permute(1, 2, 0).clamp(0, 1), interpolation="nearest")
    axis.set(xticks=[], yticks=[], title=title)


def main() -> None:
    mpl.use("Agg")
    root = Path(__file__).parents[1]
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else root / "docs" / "frequency_bands.png")


if __name__ == "__main__":
    main()
