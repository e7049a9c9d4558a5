"""The shipped weights: their cards say what was measured, and they still give it."""

import os
import sys
from pathlib import Path

import pytest

import claritycore
from claritycore.nets import AutoModel
from claritycore.nets.shipped import FOLDER
from claritycore.training import ImageFolder, evaluate

ROOT = Path(claritycore.__file__).parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # benchmarks run from a checkout and are never installed

from benchmarks.readme import ENLARGES, SETS, means  # noqa: E402


@pytest.mark.parametrize("folder", SETS)
def test_the_card_has_the_figures_that_were_measured(folder):
    found = means(ENLARGES, folder)
    psnr, ssim = (
        f"{found[key]:{form}} ({found['input_' + key]:{form}})" for key, form in {"psnr": ".2f", "ssim": ".4f"}.items()
    )
    (row,) = (
        line for line in (FOLDER / f"{ENLARGES}.md").read_text().splitlines() if line.startswith(f"| {SETS[folder]}")
    )
    assert row.endswith(f"| {psnr} | {ssim} |")


@pytest.mark.skipif("CLARITYCORE_DATA" not in os.environ, reason="needs the test sets")
def test_the_net_gives_them():
    images = ImageFolder(Path(os.environ["CLARITYCORE_DATA"]) / "set5" / "HR")
    found = evaluate(AutoModel.from_pretrained(ENLARGES).eval(), images).means()["clean"]
    assert {key: found[key] for key in ("psnr", "ssim")} == pytest.approx(
        {key: means(ENLARGES, "set5")[key] for key in ("psnr", "ssim")}, abs=1e-3
    )
