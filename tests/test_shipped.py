"""The shipped weights: their cards say what was measured, and they still give it."""

import os
import sys
from pathlib import Path

import pytest

import claritycore
from claritycore.nets import AutoModel
from claritycore.nets.shipped import FOLDER, shipped_weights
from claritycore.training import ImageFolder, TrainingSettings, evaluate
from claritycore.training.run_config import read_config

ROOT = Path(claritycore.__file__).parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # benchmarks run from a checkout and are never installed

from benchmarks import restoration, trained  # noqa: E402
from benchmarks.readme import DOUBLES, ENLARGES, SETS, means  # noqa: E402
from benchmarks.runner import RESULTS  # noqa: E402

MEGABYTE = 2**20


@pytest.mark.parametrize(
    ("name", "folder", "recipe", "row"),
    [
        *((ENLARGES, folder, "clean", told) for folder, told in SETS.items()),
        *((DOUBLES, "val", recipe, recipe) for recipe in restoration.RECIPES),
    ],
)
def test_the_card_has_the_figures_that_were_measured(name, folder, recipe, row):
    found = means(name, folder, recipe=recipe)
    psnr, ssim = (
        f"{found[key]:{form}} ({found['input_' + key]:{form}})" for key, form in {"psnr": ".2f", "ssim": ".4f"}.items()
    )
    (line,) = (line for line in (FOLDER / f"{name}.md").read_text().splitlines() if line.startswith(f"| {row}"))
    assert line.endswith(f"| {psnr} | {ssim} |")


@pytest.mark.parametrize("name", shipped_weights())
def test_each_is_small_and_has_a_card_and_the_recipe_that_it_was_made_by(name):
    assert shipped_weights()[name].stat().st_size <= 4 * MEGABYTE
    assert (FOLDER / f"{name}.md").read_text().startswith(f"# {name}\n")
    made, settings = read_config(FOLDER / f"{name}.toml", None, TrainingSettings())
    assert settings.name == name
    assert made == AutoModel.from_pretrained(name).config


@pytest.mark.parametrize("row", ["clean", "mild", "joint", "stress", "real noise"])
def test_the_card_of_the_net_that_restores_has_the_figures_that_were_measured(row):
    table = restoration.markdown(trained.read(trained.newest("restoration", RESULTS), restoration.Row))
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {row} "))
    assert line in (FOLDER / f"{restoration.NET}.md").read_text()


@pytest.mark.skipif("CLARITYCORE_DATA" not in os.environ, reason="needs the test sets")
def test_the_net_gives_them():
    images = ImageFolder(Path(os.environ["CLARITYCORE_DATA"]) / "set5" / "HR")
    found = evaluate(AutoModel.from_pretrained(ENLARGES).eval(), images).means()["clean"]
    assert {key: found[key] for key in ("psnr", "ssim")} == pytest.approx(
        {key: means(ENLARGES, "set5")[key] for key in ("psnr", "ssim")}, abs=1e-3
    )


@pytest.mark.skipif("CLARITYCORE_DATA" not in os.environ, reason="needs the photographs")
def test_the_net_that_restores_gives_what_was_measured():
    images = ImageFolder(Path(os.environ["CLARITYCORE_DATA"]) / "val")
    found = evaluate(AutoModel.from_pretrained(restoration.NET).eval(), images, recipes=["joint"], max_images=2).rows
    rows = trained.read(trained.newest("restoration", RESULTS), restoration.Row)
    measured = {row.image: row.restored for row in rows if row.recipe == "joint"}
    assert len(found) == 2
    for row in found:
        assert row.figures["psnr"] == pytest.approx(measured[row.image], abs=1e-2)
