"""What the shipped net makes of photographs degraded in known ways, beside a denoiser without weights and a plain net.

Degraded photographs as they are; scikit-image's non-local means, at the best of nine strengths for each photograph,
which nobody knows beforehand; a DnCNN, trained here by the recipes of the shipped net; and the shipped net.

python -m benchmarks.restoration --data FOLDER --validation FOLDER [--real FOLDER]
python -m benchmarks.restoration --quick              # one step, four photographs of scikit-image, no file stays

Training DnCNN takes about as long as the shipped net's card says of it, and can be interrupted: the same command goes
on. `--real` names photographs in pairs, as the PolyU set has them: NAME_real.JPG, noisy, and NAME_mean.JPG beside it.
"""

import argparse
import math
import shutil
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from skimage.restoration import denoise_nl_means
from torch import Tensor, nn

from claritycore.nets import AutoModel
from claritycore.nets.shipped import FOLDER
from claritycore.training import ImageFolder, TrainingSettings, evaluate
from claritycore.training.evaluation import Row as Measured
from claritycore.training.run_config import read_config

from .comparison import photographs
from .dncnn import DnCNNConfig, register
from .runner import RESULTS
from .trained import trained, write

NET = "claritycore-joint-x1"
RECIPES = ("clean", "mild", "joint", "stress")
REAL = "real noise"
STRENGTHS = (1, 2, 4, 7, 10, 15, 20, 30, 45)  # of non-local means, in grey levels


@dataclass(frozen=True)
class Row:
    """PSNR in dB of one photograph, infinite where it is the original.

    Args:
        recipe: by which it was degraded, or "real noise".
        image: its file.
        degraded: as it is.
        non_local_means: by scikit-image, at the strength of nine that suits this photograph best.
        dncnn: by a DnCNN that was trained by the recipes of the shipped net.
        restored: by the shipped net.
    """

    recipe: str
    image: str
    degraded: float
    non_local_means: float
    dncnn: float
    restored: float

    @property
    def best(self) -> bool:
        """Whether the net restores it better than non-local means, and leaves none worse than it was."""
        return self.restored > max(self.degraded, self.non_local_means)


class NonLocalMeans(nn.Module):
    """scikit-image's non-local means, 5 x 5 patches up to 6 pixels away, for noise of so many grey levels.

    Its filter is 0.8 times as wide as the noise, as its documentation has it for the fast form.
    """

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma / 255

    def forward(self, image: Tensor) -> Tensor:
        arrays = [picture.permute(1, 2, 0).double().numpy() for picture in image]
        options = {"patch_size": 5, "patch_distance": 6, "fast_mode": True, "channel_axis": -1}
        found = [denoise_nl_means(x, h=0.8 * self.sigma, sigma=self.sigma, **options) for x in arrays]
        return torch.stack([torch.from_numpy(x).permute(2, 0, 1) for x in found]).to(image)


def rows(nets: Mapping[str, nn.Module], clean: Path, real: Path | None) -> list[Row]:
    """Measure all on clean photographs by each recipe, and on pairs."""
    every = {name: _figures(net, clean, real) for name, net in nets.items()}
    strengths = [_figures(NonLocalMeans(sigma), clean, real) for sigma in STRENGTHS]
    found = []
    for place, own in enumerate(every["restored"]):
        others = {name: figures[place].figures["psnr"] for name, figures in every.items()}
        best = max(figures[place].figures["psnr"] for figures in strengths)
        found.append(Row(own.recipe, own.image, own.figures["input_psnr"], non_local_means=best, **others))
    return found


def degraded_only(found: Sequence[Row], recipe: str) -> list[Row]:
    """The rows of a recipe without photographs that drew no fault, whose PSNR is infinite; all where none drew any."""
    of_recipe = [row for row in found if row.recipe == recipe]
    return [row for row in of_recipe if math.isfinite(row.degraded)] or of_recipe


def markdown(found: Sequence[Row]) -> str:
    """Means by recipe, and how many photographs the net makes better than they were and than non-local means does."""
    lines = ["| recipe | degraded | non-local means | DnCNN | " + f"`{NET}` | best on |", "|---|---|---|---|---|---|"]
    for recipe in dict.fromkeys(row.recipe for row in found):
        of_recipe = degraded_only(found, recipe)
        columns = ("degraded", "non_local_means", "dncnn", "restored")
        means = [statistics.fmean(getattr(row, column) for row in of_recipe) for column in columns]
        cells = ["∞" if math.isinf(mean) else f"{mean:.2f}" for mean in means]
        best = f"{sum(row.best for row in of_recipe)} of {len(of_recipe)}" if math.isfinite(means[0]) else ""
        lines.append(f"| {recipe} | {' | '.join(cells)} | {best} |")
    return "\n".join(lines)


def _figures(net: nn.Module, clean: Path, real: Path | None) -> list[Measured]:
    found = list(evaluate(net, ImageFolder(clean), recipes=RECIPES).rows)
    if real is not None:
        with tempfile.TemporaryDirectory() as folder:
            originals, noisy = (_copied(real, f"_{kind}", Path(folder) / kind) for kind in ("mean", "real"))
            pairs = evaluate(net, ImageFolder(originals), degraded=ImageFolder(noisy)).rows
            found += [row._replace(recipe=REAL) for row in pairs]
    return found


def _copied(folder: Path, ending: str, to: Path) -> Path:
    """Copy the files whose names end so, without that ending: pairs have the same name in two folders."""
    to.mkdir()
    for path in sorted(folder.glob(f"*{ending}.*")):
        shutil.copy(path, to / f"{path.stem.removesuffix(ending)}{path.suffix}")
    return to


def recipes(name: str) -> list[TrainingSettings]:
    """How a shipped net was trained: by one recipe after another, each from the weights of the one before."""
    _, settings = read_config(FOLDER / f"{name}.toml", None, TrainingSettings())
    before = [] if settings.start is None else recipes(Path(settings.start).name)
    return [*before, settings]


def _dncnn(data: Path, runs: Path, steps: int | None) -> nn.Module:
    """Train a DnCNN by the recipes of the shipped net in turn."""
    start = None
    for recipe in recipes(NET):
        settings = replace(recipe, data=str(data), runs=str(runs), device="cpu", save_every=100, start=start)
        if steps:
            settings = replace(settings, steps=steps, warmup=0)
        trained(recipe.name, DnCNNConfig(), settings)
        start = str(runs / recipe.name)
    return AutoModel.from_pretrained(start).eval()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The shipped net for photographs, beside others.")
    parser.add_argument("--data", type=Path, help="folder of the clean images that DnCNN is trained on")
    parser.add_argument("--validation", type=Path, help="folder of clean images to measure on")
    parser.add_argument("--real", type=Path, help="folder of pairs, NAME_real and NAME_mean, to measure on too")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "restoration")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="one step, on scikit-image; no file stays")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    register()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if options.quick:
            (place / "images").mkdir()
            options.data = options.validation = photographs(place / "images")
            options.runs, options.csv = place / "runs", place
        if not (options.data and options.validation):
            parser.error("give --data and --validation, or --quick")
        dncnn = _dncnn(options.data, options.runs, 1 if options.quick else None)
        nets = {"dncnn": dncnn, "restored": AutoModel.from_pretrained(NET).eval()}
        found = rows(nets, options.validation, options.real)
        print(f"\n{markdown(found)}\n\n{write(found, 'restoration', options.csv)}")


if __name__ == "__main__":
    main()
