"""What nets of about equal size learn in the same steps, and what the parts of two of them are worth.

Each row trains one net on crops of clean images degraded by a recipe, through `claritycore.training`, and measures it
on other images. A run that was interrupted goes on, one that is done is not made again: remove its folder for that.

python -m benchmarks.comparison nets --data FOLDER --validation FOLDER              # 7 nets, 400 steps: 40 min
python -m benchmarks.comparison harmonic swin-unet --data FOLDER --validation FOLDER --steps 200  # parts: 50 min
python -m benchmarks.comparison nets harmonic swin-unet --quick                     # a step each, scikit-image's photos

The minutes are those of one core of a Xeon that multiplies bfloat16 in tiles (AMX), with nothing beside it.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from skimage import data

from claritycore.images import Picture, write_image
from claritycore.nets import (
    AutoConfig,
    BaseConfig,
    HARMONICConfig,
    PLKSRConfig,
    RRDBNetConfig,
    SwinUNetConfig,
)
from claritycore.nets.harmonic import SIZES as HARMONIC_SIZES
from claritycore.nets.swin_unet import SIZES as SWIN_SIZES
from claritycore.training import ImageFolder, TrainingSettings

from .dncnn import DnCNNConfig, register
from .runner import RESULTS
from .trained import markdown, measured, plot, trained, write


def _harmonic(**parts: object) -> HARMONICConfig:
    return HARMONICConfig(**{**HARMONIC_SIZES["harmonic-tiny"], **parts})


def _swin(**parts: object) -> SwinUNetConfig:
    return SwinUNetConfig(**{**SWIN_SIZES["swin-unet-tiny"], **parts})


TABLES: Mapping[str, Mapping[str, BaseConfig]] = {
    "nets": {
        "RSFMoE-Net": AutoConfig.from_name("rsfmoe-tiny"),
        "HERSR": AutoConfig.from_name("hersr-tiny"),
        "HARMONIC": _harmonic(),
        "SwinUNet": _swin(),
        "PLKSR": PLKSRConfig(scale=1, num_feat=32, num_block=8, kernel_size=13),
        "RRDBNet": RRDBNetConfig(scale=1, num_feat=32, num_block=3, num_grow_ch=16),
        "DnCNN": DnCNNConfig(),
    },
    # A chain is among them: the U-Net alone, no experts and no noise, no noise, texture head.
    "harmonic": {
        "whole": _harmonic(),
        "U-Net alone": _harmonic(branches="none"),
        "low frequencies alone": _harmonic(branches="low"),
        "no experts, no noise": _harmonic(moe=False, noise=False),
        "no experts": _harmonic(moe=False),
        "no noise": _harmonic(noise=False),
        "no noise, texture head": _harmonic(noise=False, texture_head=True),
        "fast path": _harmonic(fast_path=True),
    },
    "swin-unet": {
        "tiny": _swin(),
        "skips added": _swin(skip="add"),
        "no skips": _swin(skip="none"),
        "residuals halved": _swin(residual_scale=0.5),
        "windows of 4": _swin(window_size=4),
        "windows of 16": _swin(window_size=16),
        "half as deep": _swin(depths=(1, 1, 1), refinement=1),
        "deeper by half": _swin(depths=(3, 3, 3), refinement=3),
    },
}


def compare(table: str, settings: TrainingSettings, pictures: Path, results: Path) -> None:
    """Train and measure the nets of a table, print it, write its CSV and its plot."""
    print(f"\n{table}: {settings.steps} steps of {settings.batch_size} crops, recipe {settings.recipe}", flush=True)
    nets = {
        name: trained(f"{table}-{name.replace(' ', '-').replace(',', '')}", config, settings)
        for name, config in TABLES[table].items()
    }
    rows = list(measured(table, nets, ImageFolder(pictures), settings, settings.recipe))
    print(f"\n{markdown(rows)}\n")
    path = write(rows, table, results)
    plot(rows, path.with_suffix(".png"))
    print(path)


def photographs(folder: Path) -> Path:
    """Write four photographs of scikit-image into a folder."""
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        image = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1)[None] / 255
        write_image(folder / f"{name}.png", Picture(image[..., :288, :288]))
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    register()
    parser = argparse.ArgumentParser(description="Nets of about equal size, trained alike.")
    parser.add_argument("tables", nargs="+", choices=TABLES, metavar="TABLE", help=f"of {', '.join(TABLES)}")
    parser.add_argument("--data", type=Path, help="folder of clean images to train on")
    parser.add_argument("--validation", type=Path, help="folder of clean images to measure on")
    parser.add_argument("--recipe", default="noise25")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs") / "comparison")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="a step each, on scikit-image; no file stays")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if options.quick:
            (place / "images").mkdir()
            options.data = options.validation = photographs(place / "images")
            options.steps, options.runs, options.csv = 1, place / "runs", place
        if not (options.data and options.validation):
            parser.error("give --data and --validation, or --quick")
        settings = TrainingSettings(
            data=str(options.data),
            runs=str(options.runs),
            recipe=options.recipe,
            steps=options.steps,
            seed=options.seed,
            patch_size=64,
            batch_size=8,
            loss="charbonnier",
            lr=2e-3,
            schedule="cosine",
            warmup=options.steps // 20,
            ema=True,
            ema_decay=0.99,
            device="cpu",
            save_every=100,
        )
        for table in options.tables:
            compare(table, settings, options.validation, options.csv)


if __name__ == "__main__":
    main()
