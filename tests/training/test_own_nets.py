"""Nets of the user's own on the command line: a module of theirs is imported, and its names are known to every verb."""

import re
import subprocess
import sys

import pytest

from claritycore.cli import main
from claritycore.images import read_image

MODULE = '''
from dataclasses import dataclass
from torch import nn
from claritycore.nets import BaseConfig, RestorationNet, register_config, register_presets
from claritycore.training import TrainingSettings

class Enlarger(RestorationNet):
    """Enlarges by one convolution."""
    def __init__(self, config):
        super().__init__(config)
        self.scale, self.in_channels = config.scale, 3
        self.tile_safe, self.receptive_radius, self.tile_multiple = True, 1, 1
        self.conv = nn.Conv2d(3, 3 * config.scale**2, 3, padding=1)
    def forward(self, image):
        return nn.functional.pixel_shuffle(self.conv(image), self.scale)

@register_config("{name}")
@dataclass(frozen=True)
class EnlargerConfig(BaseConfig):
    scale: int = 2
    def build(self):
        return Enlarger(self)

register_presets({{"{name}x2": (EnlargerConfig(), TrainingSettings(steps=3, batch_size=2, patch_size=16))}})
'''
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def own_net(tmp_path, monkeypatch):
    """A file in the folder that one is in, which registers a net; the name of both."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    (tmp_path / "enlarger_of_mine.py").write_text(MODULE.format(name="enlarger-of-mine"))
    yield "enlarger_of_mine"
    sys.modules.pop("enlarger_of_mine", None)


def test_every_verb_knows_the_nets_of_an_imported_module(own_net, photos, tmp_path, capsys):
    known = ["--import", own_net]
    train = [*known, "--data", str(photos), "--device", "cpu", "--no-amp", "--workers", "0"]
    assert main(["enlarger-of-minex2", *train]) == 0
    assert main(["resume", "runs/enlarger-of-minex2", "--steps", "4", *known]) == 0
    by_name = ["--scale", "3", "--steps", "1", "--patch-size", "18", "--name", "by-name"]
    assert main(["train", "--model", "enlarger-of-mine", *train, *by_name]) == 0
    run = "runs/enlarger-of-minex2"
    assert main(["restore", "-i", str(photos / "0.png"), "-o", "large.png", "-m", run, "--device", "cpu", *known]) == 0
    assert read_image(tmp_path / "large.png").pixels.shape == (1, 3, 96, 112)
    assert main(["evaluate", "--model", run, "--data", str(photos), "--device", "cpu", *known]) == 0
    capsys.readouterr()
    for verb in (["list"], ["info", run], ["summary", "enlarger-of-mine"]):
        assert main([*known, *verb]) == 0
        assert "nlarger" in capsys.readouterr().out, verb


def test_a_net_is_known_in_a_fresh_process_that_imports_its_module_alone(own_net):
    def listed(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "claritycore", "list", *arguments], capture_output=True, text=True, check=True
        ).stdout

    assert re.search(r"  enlarger-of-mine +Enlarges by one convolution", listed(f"--import={own_net}"))
    assert "enlarger-of-mine" not in listed()


def test_a_module_that_is_not_there_or_lacks_one_is_told(own_net, tmp_path, capsys):
    for arguments, message in {
        ("list", "--import", "nowhere.nets"): "there is no module nowhere to import, neither here nor installed",
        ("list", "--import"): "--import needs a value",
        ("list", "--import", "./nowhere.py"): "there is no file ./nowhere.py",
        ("list", "--import", "./nowhere"): "--import takes a dotted name, as in my_nets, or a file",
    }.items():
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "lacking.py").write_text("import nowhere_at_all")
    assert main(["list", "--import", "lacking"]) == 2
    assert capsys.readouterr().err == "claritycore: --import lacking: No module named 'nowhere_at_all'\n"


def test_a_file_may_be_given_by_its_path(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "by_its_path.py").write_text("print('found')")
    (tmp_path / "json.py").write_text("")
    assert main(["--version", "--import", str(tmp_path / "by_its_path.py")]) == 0
    assert "found" in capsys.readouterr().out
    sys.modules.pop("by_its_path")
    assert main(["--version", "--import", str(tmp_path / "json.py")]) == 2
    assert "another module is called json: give the file another name" in capsys.readouterr().err
