"""The tables of README.md that come from CSV files: made from the newest of each.

python -m benchmarks.readme          # writes them into README.md
python -m benchmarks.readme --check  # exits with 1 if others are there
"""

import argparse
import csv
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from claritycore.blocks.reparam import count_parameters
from claritycore.nets import AutoModel

from . import goals, restoration, scaling, trained
from .runner import RESULTS
from .trained import newest, read

README = Path(__file__).parent.parent / "README.md"
ENLARGES, DOUBLES = "claritycore-x4", "claritycore-joint-x2"
SETS = {"set5": "Set5", "set14": "Set14", "cbsd68": "CBSD68", "scikit-image": "scikit-image"}


def means(name: str, folder: str, results: Path = RESULTS, *, recipe: str = "clean") -> dict[str, float]:
    """What `claritycore evaluate --model NAME --data FOLDER --csv FILE` found, means over the pictures."""
    with (results / f"{name}-{folder}.csv").open(newline="") as file:
        *_, line = (line for line in csv.DictReader(file) if line["recipe"] == recipe)
    return {key: float(line[key]) for key in ("psnr", "ssim", "input_psnr", "input_ssim")}


def enlarging(name: str, found: Mapping[str, Mapping[str, float]]) -> str:
    """PSNR of a net that enlarges, beside bicubic: a column for each of these means."""
    parameters = count_parameters(AutoModel.from_pretrained(name))
    net, bicubic = (" | ".join(f"{mean[key]:.2f}" for mean in found.values()) for key in ("psnr", "input_psnr"))
    lines = [
        f"| PSNR of the luma in dB | | {' | '.join(found)} |",
        f"|---|---|{'---|' * len(found)}",
        f"| `{name}` | {parameters:,} parameters, [card](weights/{name}.md) | {net} |",
        f"| bicubic | | {bicubic} |",
    ]
    return "\n".join(lines)


def shipped(results: Path) -> str:
    """The net that enlarges what was made smaller and nothing else, on the usual test sets."""
    return enlarging(ENLARGES, {told: means(ENLARGES, folder, results) for folder, told in SETS.items()})


def doubled(results: Path) -> str:
    """The net that restores and enlarges, by recipe, on the photographs that `restored` is about."""
    found = {recipe: means(DOUBLES, "val", results, recipe=recipe) for recipe in restoration.RECIPES}
    return enlarging(DOUBLES, found)


def compared(table: str) -> Callable[[Path], str]:
    """Nets that were trained alike: what each costs and what it makes of photographs, as a table and a picture."""

    def made(results: Path) -> str:
        path = newest(table, results)
        table_of_rows = trained.markdown(read(path, trained.Row))
        return f"{table_of_rows}\n\n{picture('PSNR against multiply-adds and against time', path)}"

    return made


def grown(results: Path) -> str:
    """How kernels grow: the pictures of `python -m benchmarks.scaling --plot`."""
    return "\n".join(picture(told, newest(name, results)) for name, told in scaling.SWEEPS.items())


def picture(told: str, path: Path) -> str:
    """The plot that lies beside a CSV file, with words for who cannot see it."""
    return f"![{told}]({RESULTS.parent.name}/{RESULTS.name}/{path.stem}.png)"


def restored(results: Path) -> str:
    """PSNR of the net that restores, beside others."""
    return restoration.markdown(read(newest("restoration", results), restoration.Row))


MADE: Mapping[str, Callable[[Path], str]] = {
    "shipped": shipped,
    "restored": restored,
    "doubled": doubled,
    "goals": goals.table,
    "scaling": grown,
    "nets": compared("nets"),
    "harmonic": compared("harmonic"),
    "swin-unet": compared("swin-unet"),
}


def filled(page: str, results: Path = RESULTS) -> str:
    """The page with what these results say between the marks of each.

    Raises:
        ValueError: if a mark is missing.
    """
    for name, make in MADE.items():
        begin, end = f"<!-- {name}: python -m benchmarks.readme -->", f"<!-- end of {name} -->"
        before, begun, rest = page.partition(begin)
        _, ended, after = rest.partition(end)
        if not begun or not ended:
            raise ValueError(f"the page must have {begin} and {end}")
        page = f"{before}{begin}\n{make(results)}\n{end}{after}"
    return page


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What README.md has from CSV files.")
    parser.add_argument("--check", action="store_true", help="only say whether it is that of the CSV files")
    check, page = parser.parse_args(argv).check, README.read_text()
    made = filled(page)
    if check:
        print("README.md is as the CSV files say" if made == page else "run python -m benchmarks.readme")
    else:
        README.write_text(made)
    return int(check and made != page)


if __name__ == "__main__":
    sys.exit(main())
