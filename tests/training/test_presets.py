"""The presets against the figures that they are to have, by name and by hand; and the page that lists them."""

import doctest
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import claritycore
from claritycore.blocks import reparameterize_model
from claritycore.deploy import summarize
from claritycore.nets import AutoConfig, AutoModel, RRDBNetConfig, list_models, register_presets
from claritycore.training.degradations import find_recipe
from claritycore.training.presets import PRESETS, U_NETS, Preset, find_preset, preset_names
from claritycore.training.settings import TrainingSettings

ROOT = Path(claritycore.__file__).parent

# Scale: steps, batch size and patch size.
FULL = {2: (400_000, 16, 128), 3: (400_000, 16, 192), 4: (400_000, 16, 256), 8: (500_000, 8, 512)}
LITE = {2: (200_000, 32, 128), 3: (200_000, 32, 192), 4: (200_000, 32, 256), 8: (250_000, 16, 512)}


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("name", "sizes", "training"), [("rrdbnet", (64, 23, 32), FULL), ("rrdbnet-lite", (32, 6, 16), LITE)]
)
def test_rrdbnets(name, sizes, training, scale):
    config, settings = find_preset(f"{name}x{scale}")
    assert isinstance(config, RRDBNetConfig)
    assert (config.num_feat, config.num_block, config.num_grow_ch) == sizes
    assert (config.scale, config.upsampler) == (scale, "pixelshuffle")
    assert (settings.steps, settings.batch_size, settings.patch_size) == training[scale]
    assert (settings.lr, settings.loss, settings.recipe) == (2e-4, "l1", "clean")
    assert settings.amp
    assert not settings.ema


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("name", ["plksr", "plksr-tiny"])
def test_plksrs_halve_their_learning_rate_when_their_authors_do(name, scale):
    config, settings = find_preset(f"{name}x{scale}")
    assert config == AutoConfig.from_name(name, scale=scale)
    assert (settings.steps, settings.batch_size, settings.patch_size) == (450_000, 64, 96 * scale)
    rates = {step: settings.lr_at(step) for step in range(0, 450_000, 1)}
    falls = [step for step in range(1, 450_000) if rates[step] != rates[step - 1]]
    assert falls == [100_000, 200_000, 300_000, 400_000, 425_000]
    assert rates[449_999] == 2e-4 / 32


def test_the_names():
    scales = {"rrdbnet": "2348", "rrdbnet-lite": "2348", "plksr": "234", "plksr-tiny": "234", "realplksr": "4"}
    expected = [
        f"{name}x{scale}"
        for name, every in {**scales, "span": "24", **dict.fromkeys(U_NETS, "124")}.items()
        for scale in every
    ]
    assert preset_names() == list(PRESETS) == expected


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_can_be_trained(name):
    config, settings = find_preset(name)
    assert settings.name == name
    assert find_recipe(settings.recipe).name == settings.recipe
    assert settings.patch_size % config.scale == 0
    assert config.scale == int(name[-1])
    with torch.device("meta"):
        net = AutoModel.from_config(config)
        assert net(torch.zeros(1, 3, 8, 8)).shape == (1, 3, 8 * config.scale, 8 * config.scale)


def test_presets_of_ones_own():
    config = AutoConfig.from_name("span", scale=3)
    register_presets({"mine": (config, {"steps": 7}), "yours": (config, TrainingSettings(name="run"))})
    assert find_preset("mine") == Preset(config, TrainingSettings(steps=7, name="mine"))
    assert find_preset("yours").settings.name == "run"
    assert preset_names()[-2:] == ["mine", "yours"]
    register_presets({"bad": (config, 7)})
    with pytest.raises(TypeError, match="settings of the preset 'bad' must be TrainingSettings, got 7"):
        find_preset("bad")
    with pytest.raises(ValueError, match="the preset name 'rrdbnetx4' is taken"):
        register_presets({"rrdbnetx4": (config, {"steps": 7})})


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="there is no preset 'rrdbnet-x4'; did you mean rrdbnetx4"):
        find_preset("rrdbnet-x4")


def test_the_nets_do_not_load_the_presets():
    code = "import sys, claritycore.nets; print(*[name for name in sys.modules if 'training' in name])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


# The page


@pytest.fixture(scope="module")
def page():
    return (ROOT / "MODELS.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_page_says_what_is(page):
    spec = importlib.util.spec_from_file_location("make_models", ROOT / "docs" / "make_models.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert page == script.document(), "run python docs/make_models.py"


@pytest.mark.parametrize("name", ["rrdbnet-lite", "swin-unet-tiny", "rsfmoe-tiny"])
def test_the_page_gives_the_costs_at_x4(page, name):
    with torch.device("meta"):
        net = AutoModel.from_config(AutoConfig.from_name(name, scale=4)).eval()
    multiply_adds = summarize(reparameterize_model(net, inplace=True), (1, 3, 180, 320)).macs / 1e9
    (cells,) = (line.split(" | ") for line in page.splitlines() if line.startswith(f"| `{name}` | "))
    assert f"{multiply_adds:,.1f} G" in cells
    assert f"{net.receptive_radius} px" in cells


def test_the_page_names_every_net_and_every_preset(page):
    for name in list_models():
        assert f"`{name}`" in page
    assert re.findall(r"^\| `claritycore (\S+)`", page, flags=re.MULTILINE) == list(PRESETS)
    assert not re.search(r"\{\{|\}\}", page)


def test_the_examples_of_the_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(examples) == 8
    for number, example in enumerate(examples):
        test = doctest.DocTestParser().get_doctest(example, {"nn": nn}, f"example {number}", None, None)
        assert doctest.DocTestRunner().run(test).failed == 0
