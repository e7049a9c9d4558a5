"""Runs as TOML: what is written reads the same, keys may be spelled as flags, and bad ones are told."""

import pytest

from claritycore.nets import AutoConfig
from claritycore.training.run_config import read_config, write_config
from claritycore.training.settings import TrainingSettings


def test_what_is_written_reads_the_same(tmp_path):
    config = AutoConfig.from_name("plksr", scale=2, branches=("17x17", "5x5@2"))
    settings = TrainingSettings(data='da"ta\\x', steps=7, ema=True, milestones=(0.25, 0.5), clip=None, min_lr=1e-7)
    write_config(tmp_path / "run.toml", config, settings)
    assert read_config(tmp_path / "run.toml", None, TrainingSettings()) == (config, settings)


def test_a_file_overrides_what_stood_before(tmp_path):
    (tmp_path / "run.toml").write_text('model = "span"\nscale = 2\nbatch-size = 4\nema_decay = 0.9\n')
    standing = AutoConfig.from_name("span", num_feat=12)
    config, settings = read_config(tmp_path / "run.toml", standing, TrainingSettings(steps=5))
    assert config == AutoConfig.from_name("span", scale=2, num_feat=12)
    assert (settings.batch_size, settings.ema_decay, settings.steps) == (4, 0.9, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = 'span'\nbatch-sise = 3", r"run.toml: there is no field 'batch_sise'; did you mean batch_size\?"),
        ("model = 'spam'", r"there is no net 'spam'; did you mean span\?"),
        ("model = 'span'\nlr = -1.0", r"run.toml: lr must be positive and finite, got -1\.0"),
        ("model = 'span'\nscale = 5", r"run.toml: scale must be one of 1, 2, 3, 4, 8, got 5"),
        ("model = 'span'\nshrink = 1.5", r"run.toml: shrink must be in \(0, 1\], and 1 for pairs, got 1\.5"),
        ("model = 'span'\nshrink = 0.5\ndegraded = 'x'", r"run.toml: shrink must be in \(0, 1\], and 1 for pairs"),
        ("scale 4", r"run.toml is no TOML"),
        ("model = 'span'\namp = 'no'", r"amp must be true or false, got 'no'"),
        ("model = 'span'\nlr = '2e-4'", r"lr must be a number, got '2e-4'"),
        ("model = 'span'\nmilestones = 0.5", r"milestones must be a list, each a number, got 0\.5"),
        ("model = 'span'\nmilestones = ['a']", r"milestones must be a list, each a number, got \['a'\]"),
        ("model = 'span'\nvalidation-recipes = 'clean'", r"recipes must be a list, each a text in quotes, got 'clean'"),
        ("model = 'span'\nname = 5", r"run.toml: name must be a text in quotes, got 5"),
        ("model = 'span'\nworkers = 'two'", r"run.toml: workers must be an integer, got 'two'"),
        ("model = 'span'\nworkers = true", r"run.toml: workers must be an integer, got True"),
        ("model = 'span'\nclip = 'two'", r"run.toml: clip must be a number, got 'two'"),
        ("model = 'span'\noptimizer = 3", r"run.toml: optimizer must be a text in quotes, got 3"),
        ("scale = 4", r"run.toml must name its net"),
    ],
)
def test_bad_files_are_told(tmp_path, text, message):
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / "run.toml", None, TrainingSettings())


def test_a_file_for_another_net_is_refused(tmp_path):
    (tmp_path / "run.toml").write_text("model = 'span'")
    with pytest.raises(ValueError, match=r"run.toml is for span, and not for rrdbnet: give one of them"):
        read_config(tmp_path / "run.toml", AutoConfig.from_name("rrdbnet"), TrainingSettings())


def test_whole_numbers_may_stand_for_others(tmp_path):
    (tmp_path / "run.toml").write_text("model = 'span'\nclip = 1\nlr = 1")
    assert read_config(tmp_path / "run.toml", None, TrainingSettings())[1].lr == 1.0
    assert type(read_config(tmp_path / "run.toml", None, TrainingSettings())[1].clip) is float


def test_a_file_must_be_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_config(tmp_path / "run.toml", None, TrainingSettings())
