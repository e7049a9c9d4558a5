"""The table of what the shipped net restores: who is measured on what, and what is left out of the means."""

import math
import sys
from pathlib import Path

import pytest
import torch
from skimage.restoration import denoise_nl_means
from torch import nn

import claritycore
from claritycore.images import Picture, write_image
from claritycore.nets import PLKSRConfig, registry
from claritycore.training import ImageFolder, evaluate

ROOT = Path(claritycore.__file__).parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # benchmarks run from a checkout and are never installed

from benchmarks import restoration, trained  # noqa: E402
from benchmarks.dncnn import DnCNNConfig  # noqa: E402
from benchmarks.restoration import NonLocalMeans, Row  # noqa: E402


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Two clean images, and two pairs of a noisy one and its original."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("photographs")
    for folder in ("clean", "pairs"):
        (place / folder).mkdir()
    ramp = torch.linspace(0.2, 0.8, 40).expand(1, 3, 32, 40)
    for name in ("a", "b"):
        write_image(place / "clean" / f"{name}.png", Picture(ramp))
        write_image(place / "pairs" / f"{name}_mean.png", Picture(ramp))
        write_image(place / "pairs" / f"{name}_real.png", Picture(ramp + 0.05 * torch.randn_like(ramp)))
    return place


@pytest.fixture(scope="module")
def measured(photographs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(restoration, "STRENGTHS", (0.1, 12))
        nets = {"dncnn": nn.Identity(), "restored": NonLocalMeans(12)}
        return restoration.rows(nets, photographs / "clean", photographs / "pairs")


def test_there_is_a_row_for_each_photograph_and_recipe(measured):
    assert [(row.recipe, row.image) for row in measured] == [
        (recipe, f"{name}.png") for recipe in (*restoration.RECIPES, "real noise") for name in ("a", "b")
    ]


def test_each_column_is_of_who_is_named(measured, photographs):
    """A net that does nothing has the figure of the input, and non-local means that of its better strength."""
    for row in measured:
        assert row.dncnn == row.degraded
        assert row.non_local_means >= row.restored
    real = [row for row in measured if row.recipe == "real noise"]
    assert all(row.non_local_means == row.restored > row.degraded + 3 for row in real)
    alone = evaluate(NonLocalMeans(12), ImageFolder(photographs / "clean"), recipes=["joint"])
    assert [row.figures["psnr"] for row in alone.rows] == [row.restored for row in measured if row.recipe == "joint"]


def test_photographs_without_a_fault_are_left_out_but_of_the_recipe_that_has_none():
    clean, fault = Row("clean", "a", math.inf, 30, 30, 40), Row("joint", "a", 25, 26, 27, 28)
    spared = Row("joint", "b", math.inf, 90, 90, 20)
    assert restoration.degraded_only([clean, fault, spared], "joint") == [fault]
    assert restoration.degraded_only([clean, fault, spared], "clean") == [clean]
    table = restoration.markdown([clean, fault, spared])
    assert "| clean | ∞ | 30.00 | 30.00 | 40.00 |  |" in table
    assert "| joint | 25.00 | 26.00 | 27.00 | 28.00 | 1 of 1 |" in table


@pytest.mark.parametrize(("degraded", "other", "best"), [(25, 26, True), (25, 28, False), (29, 26, False)])
def test_best_is_better_than_the_input_and_than_non_local_means(degraded, other, best):
    assert Row("joint", "a", degraded, other, 30, 28).best is best


def test_non_local_means_is_that_of_scikit_image():
    """Of 8 levels of noise, at a width of 0.8 times that, for each picture of a batch by itself."""
    images = torch.rand(2, 3, 20, 24, generator=torch.Generator().manual_seed(0))
    expected = denoise_nl_means(
        images[1].permute(1, 2, 0).double().numpy(),
        patch_size=5,
        patch_distance=6,
        h=0.8 * 8 / 255,
        sigma=8 / 255,
        channel_axis=-1,
        fast_mode=True,
    )
    found = NonLocalMeans(8)(images)[1]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.permute(1, 2, 0).double(), torch.from_numpy(expected), atol=1e-6, rtol=0)


def test_dncnn_is_trained_as_the_shipped_net_was(photographs, tmp_path, monkeypatch):
    """By its recipes in turn: the same steps, samples and losses, a quarter of the rate, and no option of the net."""
    recipe = 'model = "plksr"\nscale = 1\nnum-feat = 8\nrecipe = "photographs"\npatch-size = 16\nbatch-size = 2\n'
    (tmp_path / "stand-in-first.toml").write_text(
        f'{recipe}steps = 1\nlr = 4e-3\nloss = "l1"\nname = "stand-in-first"\n'
    )
    start = 'start = "runs/stand-in-first"'
    (tmp_path / "stand-in.toml").write_text(f'{recipe}{start}\nsteps = 2\nloss = "charbonnier"\nname = "stand-in"\n')
    PLKSRConfig(scale=1, num_feat=8, num_block=1, kernel_size=5).build().save_pretrained(tmp_path / "net.safetensors")
    monkeypatch.setattr(restoration, "FOLDER", tmp_path)
    monkeypatch.setattr(restoration, "NET", "stand-in")
    monkeypatch.setattr(restoration, "STRENGTHS", (12,))
    monkeypatch.setattr(restoration, "DnCNNConfig", lambda: DnCNNConfig(num_feat=4, depth=3))
    monkeypatch.setattr(registry, "_NETS", dict(registry._NETS))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    load = restoration.AutoModel.from_pretrained
    monkeypatch.setattr(
        restoration.AutoModel,
        "from_pretrained",
        lambda name: load(tmp_path / "net.safetensors" if name == "stand-in" else name),
    )
    files = ["--data", str(photographs / "clean"), "--validation", str(photographs / "clean")]
    restoration.main([*files, "--runs", str(tmp_path / "runs"), "--csv", str(tmp_path / "results")])
    first, made = (trained.read_state(tmp_path / "runs" / name) for name in ("stand-in-first", "stand-in"))
    assert (first.step, first.settings.loss, first.settings.start) == (1, "l1", None)
    assert first.settings.lr == 1e-3
    assert (made.step, made.settings.recipe, made.settings.loss) == (2, "photographs", "charbonnier")
    assert made.settings.start == str(tmp_path / "runs" / "stand-in-first")
    assert made.config == DnCNNConfig(num_feat=4, depth=3)
    (path,) = (tmp_path / "results").glob("restoration-*.csv")
    assert {row.recipe for row in trained.read(path, Row)} == set(restoration.RECIPES)
